"""A blueprint serves every micro-batch size, round-trips through JSON, and says what differs from another."""

import copy
from pathlib import Path

import pytest
import torch
from blueprint_zoo import CASES
from hypothesis import given
from hypothesis import strategies as st
from real_run import whole_model
from torch import nn
from torch.utils._pytree import tree_map

from meshwright.blueprint.compare import differences
from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.record import Blueprint, Count
from meshwright.errors import ConfigError
from meshwright.models import decoder


@pytest.mark.parametrize("case", ["gpt", "llama", "resnet", "u-net", "encoder-decoder", "recommender", "diffusion"])
@pytest.mark.parametrize("items", [1, 7])
def test_amounts_hold_for_any_micro_batch(case: str, items: int) -> None:
    """One capture, taken at other sizes, gives what a real run at this size does."""
    model, batch = CASES[case]()
    blueprint = inspect(copy.deepcopy(model).to("meta"), batch)
    rows = torch.arange(items) % 4
    run = whole_model(model, tree_map(lambda t: t[rows], batch))
    assert blueprint.forward_flops(items) == run.forward_flops
    assert blueprint.backward_flops(items) == run.backward_flops
    assert blueprint.saved_bytes(items) == run.saved_without_state


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(1, 64), st.integers(65, 128), st.integers(1, 10**4))
def test_a_line_goes_through_both_measurements(fixed: int, slope: int, one: int, two: int, at: int) -> None:
    true = Count(fixed, slope)
    assert Count.through((one, true.at(one)), (two, true.at(two))) == true
    assert Count.total([true, true, Count(3)]).at(at) == 2 * (fixed + slope * at) + 3


@pytest.mark.parametrize("case", ["llama", "mixture", "encoder-decoder", "recurrent"])
def test_json_round_trip(case: str, tmp_path: Path) -> None:
    blueprint = inspect(*CASES[case]())
    assert Blueprint.from_json(blueprint.to_json()) == blueprint
    blueprint.save(tmp_path / "model.json")
    assert Blueprint.load(tmp_path / "model.json") == blueprint
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


def test_files_that_are_no_blueprints_are_refused(tmp_path: Path) -> None:
    for text in ("", "[]", '{"class": "Plan"}', '{"class": "Blueprint", "record": [1], "layouts": {}}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ConfigError, match="not a saved blueprint"):
            Blueprint.load(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="can't be read"):
        Blueprint.load(tmp_path / "missing.json")


def test_differences_are_named() -> None:
    small = inspect("llama:layers=2,hidden=64,heads=4", seq=16)
    assert differences(small, inspect("llama:layers=2,hidden=64,heads=4", seq=16)) == []
    deeper = differences(small, inspect("llama:layers=3,hidden=64,heads=4", seq=16))
    assert any("blocks.2 is new" in line for line in deeper)
    eager = differences(small, inspect("llama:layers=2,hidden=64,heads=4,attention=eager", seq=16))
    assert any("_softmax" in line for line in eager)
    assert not any("parameters" in line for line in eager)


def test_parameters_are_counted_once() -> None:
    for tied in (True, False):
        model = decoder.Decoder(decoder.llama(layers=3, hidden=32, heads=4, vocab=64, tied=tied))
        blueprint = inspect(model, torch.zeros(2, 8, dtype=torch.long))
        assert blueprint.n_parameters == sum(p.numel() for p in model.parameters())
        assert blueprint.parameter_bytes == sum(p.numel() * 4 for p in model.parameters())


def test_frozen_parameters_are_marked_and_get_no_gradient_work() -> None:
    model = decoder.Decoder(decoder.gpt(layers=2, hidden=32, heads=4, vocab=64))
    whole = inspect(model, torch.zeros(2, 8, dtype=torch.long))
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    frozen = inspect(model, torch.zeros(2, 8, dtype=torch.long))
    assert not any(p.trainable for p in frozen.kinds[0].parameters)
    # Only the gradients of activations remain: half of the matrix products' backward.
    attention = sum(op.flops.at(1) for op in whole.kinds[0].backward if op.kind == "attention")
    assert frozen.kinds[0].backward_flops.at(1) - attention == (whole.kinds[0].backward_flops.at(1) - attention) // 2


def test_a_capture_in_another_dtype_halves_what_is_float() -> None:
    full = inspect("gpt:layers=2,hidden=64,heads=4", seq=32)
    half = inspect("gpt:layers=2,hidden=64,heads=4", seq=32, dtype=torch.bfloat16)
    assert half.parameter_bytes * 2 == full.parameter_bytes
    assert half.forward_flops(1) == full.forward_flops(1)
    assert half.saved_bytes(8) < 0.6 * full.saved_bytes(8)


def test_nothing_is_allocated_and_text_is_readable() -> None:
    blueprint = inspect("llama3-405b")
    text = str(blueprint)
    assert "126 x A Block 0..125" in text
    assert "406 G parameters" in text
    assert all(len(line) < 400 for line in text.splitlines())


def test_outputs_of_any_kind_pass() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

        def forward(self, x: torch.Tensor, *, scale: float = 1.0, mask: torch.Tensor | None = None) -> dict:  # type: ignore[type-arg]
            kept = []
            for layer in list(self.layers)[::-1]:
                x = layer(x) * scale
                kept.append(x)
            return {"x": x, "kept": tuple(kept), "none": None}

    blueprint = inspect(Odd(), {"x": torch.randn(3, 4), "scale": 2.0, "unknown": torch.zeros(3)})
    assert [call.name for call in blueprint.calls] == ["layers.2", "layers.1", "layers.0"]


class RowByRow(nn.Module):
    """Python that loops over the rows of the batch: two micro-batch sizes have different ops, in the blocks and outside."""

    def __init__(self, width: int, depth: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.layers = nn.ModuleList(RowByRow(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        x = torch.stack([self.down(self.up(row).relu()) for row in y]) + x
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("depth", [0, 3])
def test_ops_that_depend_on_the_batch_size_are_counted_in_proportion(depth: int) -> None:
    blueprint = inspect(RowByRow(8, depth), torch.randn(4, 8))
    assert len([note for note in blueprint.notes if "proportional" in note]) == (2 if depth else 1)
    for unit, _ in blueprint.units():
        assert [tensor.shape for tensor in unit.outputs] == [(Count(0, 1), Count(8))]
        assert unit.forward_flops.at(6) == pytest.approx(6 * 2 * 2 * 8 * 16, rel=0.02)
        assert unit.backward_flops.at(6) == pytest.approx(2 * unit.forward_flops.at(6), rel=0.3)
    assert [boundary.flows[0].bytes for boundary in blueprint.boundaries] == [Count(0, 32)] * depth
