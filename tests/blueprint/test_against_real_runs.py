"""What is captured is what runs: ops, FLOPs and saved bytes equal those of a real run on CPU, exactly."""

import copy
from typing import Any

import pytest
import torch
from blueprint_zoo import CASES, LongShortTerm, tokens
from real_run import one_block, whole_model

from meshwright.blueprint.inspection import inspect

BATCH = 4


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model, batch = CASES[request.param]()
    with torch.device("meta"):
        bare = copy.deepcopy(model).to("meta")
    return model, batch, inspect(bare, batch)


def test_whole_model(pair: Any) -> None:
    model, batch, blueprint = pair
    run = whole_model(model, batch)
    assert blueprint.forward_flops(BATCH) == run.forward_flops
    assert blueprint.backward_flops(BATCH) == run.backward_flops
    assert blueprint.saved_bytes(BATCH) == run.saved_without_state


def test_a_fused_recurrent_kernel_says_what_is_left_out() -> None:
    """FlopCounterMode counts this kernel as zero: 2 per weight and step forward, twice that backward."""
    model = LongShortTerm()
    blueprint = inspect(model, tokens())
    weights = sum(p.numel() for name, p in model.cells.named_parameters() if "weight" in name)
    head = 2 * 24 * 24 * 96
    assert blueprint.forward_flops(1) == 2 * 24 * weights + head
    assert blueprint.backward_flops(1) == 4 * 24 * weights + 2 * head
    assert any("workspace" in note for note in blueprint.notes)


def test_each_kind_of_block(pair: Any) -> None:
    model, batch, blueprint = pair
    for unit in blueprint.kinds:
        run = one_block(model, unit.instances[0], batch)
        assert [op.name for op in unit.forward] == run.forward_ops
        assert [op.name for op in unit.backward] == run.backward_ops
        assert unit.forward_flops.at(BATCH) == run.forward_flops
        assert unit.backward_flops.at(BATCH) == run.backward_flops
        assert unit.saved_bytes.at(BATCH) == run.saved_bytes
        assert unit.forward_peak.at(BATCH) == run.forward_peak
        assert unit.backward_peak.at(BATCH) == pytest.approx(run.backward_peak, rel=0 if "experts" not in str(unit) else 0.02)
