"""Weights that can be split together are found by following the split; executing the split in slices gives the same
result.
"""

from inspect import signature as inspect_signature
from typing import Any

import pytest
import torch
from blueprint_zoo import CASES
from huggingface import build
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.record import Region, Split
from meshwright.models import decoder


def weights(splits: tuple[Split, ...]) -> list[str]:
    return [split.tensor for split in splits]


def regions_of(model: nn.Module, batch: Any) -> list[Region]:
    return list(inspect(model, batch).kinds[0].regions)


def test_grouped_heads_limit_the_degree() -> None:
    model = decoder.Decoder(decoder.llama(layers=2, hidden=64, heads=8, kv_heads=2, vocab=64))
    attention, ffn = regions_of(model, torch.zeros(2, 16, dtype=torch.long))
    assert attention.units == 2
    assert attention.attention
    assert weights(attention.columns) == ["attention.query.weight", "attention.key.weight", "attention.value.weight"]
    assert weights(attention.rows) == ["attention.output.weight"]
    assert weights(ffn.columns) == ["ffn.gate.weight", "ffn.up.weight"]
    assert weights(ffn.rows) == ["ffn.down.weight"]
    assert attention.reduced_bytes.at(3) == 3 * 16 * 64 * 4


def test_fused_weights_are_split_in_segments() -> None:
    model, batch = CASES["vision"]()
    attention, ffn = regions_of(model, batch)
    (column,) = attention.columns
    assert column.repeat * len(column.segments) == 3  # query, key and value are each split by heads
    assert attention.units == 4
    assert ffn.units == 128


def test_embedding_and_head_are_split_over_the_vocabulary() -> None:
    for tied in (True, False):
        model = decoder.Decoder(decoder.llama(layers=2, hidden=64, heads=4, vocab=96, tied=tied))
        rest = inspect(model, torch.zeros(2, 16, dtype=torch.long)).rest
        assert {r.kind for r in rest.regions} == ({"embedding"} if tied else {"embedding", "head"})
        assert all(r.units == 96 for r in rest.regions)
        assert any(r.open_ended for r in rest.regions)


def test_experts_and_routing() -> None:
    for case, stacked in (("mixture", False), ("stacked mixture", True)):
        model, batch = CASES[case]()
        unit = inspect(model, batch).kinds[-1]
        assert unit.experts is not None
        assert (unit.experts.experts, unit.experts.choices) == (4, 2)
        assert bool(unit.experts.stacked) == stacked
        assert len(unit.experts.modules) == (0 if stacked else 4)
        routed = [region for region in unit.regions if region.experts]
        assert len(routed) == (1 if stacked else 4)
        assert all(region.units == 48 for region in routed)
        assert "ffn.router.weight" not in {s.tensor for r in unit.regions for s in (*r.columns, *r.rows)}


class Mixed(nn.Module):
    """A norm over the features between two matrices: nothing may be split."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.norm(self.up(x))))


def test_a_norm_over_split_features_refuses() -> None:
    unit = inspect(nn.Sequential(Mixed(), Mixed()), torch.randn(2, 5, 16)).kinds[0]
    assert unit.regions == ()
    reasons = dict(unit.whole)
    assert "native_layer_norm" in reasons["up.weight"]
    assert "output" in reasons["down.weight"]


def test_positions_meet_only_in_attention() -> None:
    for case in ("gpt", "llama", "llama eager"):
        model, batch = CASES[case]()
        unit = inspect(model, batch).kinds[0]
        mixing = {op.kind for op in unit.forward if op.mixes_sequence}
        assert mixing in ({"attention"}, {"reduction", "matmul"})


def only(tensor: Tensor, split: Split, rank: int, degree: int) -> Tensor:
    """A weight with everything but one rank's shard zeroed, by the record's own description of the shard."""
    mask = torch.zeros_like(tensor)
    parts = mask.split(list(split.segments) * split.repeat, dim=split.dim)
    for part in parts:
        part.chunk(degree, dim=split.dim)[rank].fill_(1)
    return tensor * mask


def degree_of(region: Region) -> int:
    return next((degree for degree in (2, 3, 5) if region.units % degree == 0), 1)


def given_to(model: nn.Module, block: nn.Module, batch: Any) -> tuple[Any, Any]:
    """The arguments of a block's first call."""
    given: list[tuple[Any, Any]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return given[0]


def check_regions(model: nn.Module, batch: Any, dtype: torch.dtype) -> int:
    """What a rank's row shard adds to a block's result must not depend on any other rank's column shard."""
    model = model.to(dtype).eval()
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    checked = 0
    for unit in inspect(model, batch).kinds:
        block = model.get_submodule(unit.instances[0])
        args, kwargs = given_to(model, block, batch)
        state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        for region in unit.regions:
            degree = degree_of(region)
            for rank in range(degree):
                rows = {split.tensor: only(state[split.tensor], split, rank, degree) for split in region.rows}
                cut = (*region.columns, *region.vectors)
                columns = {split.tensor: only(state[split.tensor], split, rank, degree) for split in cut}
                with torch.no_grad():
                    alone = torch.func.functional_call(block, {**state, **rows, **columns}, args, kwargs)
                    among = torch.func.functional_call(block, {**state, **rows}, args, kwargs)
                first, second = (x[0] if isinstance(x, tuple) else x for x in (alone, among))
                torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
                checked += 1
    return checked


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("shared", "recurrent", "recommender")])
def test_a_shard_needs_no_other_shard(case: str) -> None:
    torch.manual_seed(0)
    model, batch = CASES[case]()
    if not isinstance(batch, dict):
        batch = {next(iter(inspect_signature(model.forward).parameters)): batch}
    dtype = torch.float32 if case == "stacked mixture" else torch.float64  # grouped products have no float64 kernel
    assert check_regions(model, batch, dtype) > 0 or case in ("resnet", "u-net")


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "phi3", "mixtral", "deepseek_v3", "qwen3_next", "beam"])
def test_a_shard_needs_no_other_shard_in_library_models(architecture: str) -> None:
    batch = {"input_ids": torch.randint(3, 128, (2, 32))}
    model, _ = build(architecture, batch)
    assert check_regions(model, batch, torch.float32) > 0
