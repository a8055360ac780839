"""Weights that can be split together are found by following the split; executing the split in slices gives the same
result.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

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
        made = [saved for saved in unit.saved if saved.role == "activation"]
        sized = [saved for saved in made if 24 in [size.at(1) for size in saved.shape]]
        assert all(saved.has_sequence for saved in sized if len(saved.shape) > 2)


def chunks(tensor: Tensor, split: Split, degree: int) -> list[Tensor]:
    """The shards of a weight by the record's own description."""
    parts = tensor.split(list(split.segments) * split.repeat, dim=split.dim)
    return [torch.cat([part.chunk(degree, dim=split.dim)[rank] for part in parts], split.dim) for rank in range(degree)]


@pytest.mark.parametrize("case", ["gpt", "llama", "vision", "transformer"])
def test_shards_of_a_feed_forward_sum_to_the_whole(case: str) -> None:
    """Splitting exactly what the region names, and summing at its end, gives the unsplit result (float64)."""
    torch.manual_seed(0)
    model, batch = CASES[case]()
    model = model.double().eval()
    blueprint = inspect(model, batch.double() if batch.is_floating_point() else batch)
    unit = blueprint.kinds[0]
    block = model.get_submodule(unit.instances[0])
    region = next(r for r in unit.regions if not r.attention)
    cut = {split.tensor: split for split in (*region.columns, *region.rows, *region.vectors)}
    state = dict(block.named_parameters())
    names = {name.rpartition(".")[0] for name in cut}
    row = block.get_submodule(weights(region.rows)[0].rpartition(".")[0])
    column = block.get_submodule(weights(region.columns)[0].rpartition(".")[0])
    x = torch.randn(2, 5, column.in_features, dtype=torch.float64)

    def run(rank: int, degree: int) -> Tensor:
        parts = {name: chunks(state[name], cut[name], degree)[rank] if name in cut else state[name] for name in state}
        weight = lambda module, kind: parts.get(f"{module}.{kind}")  # noqa: E731
        inner = [
            F.linear(x, weight(name, "weight"), weight(name, "bias"))
            for name in names
            if block.get_submodule(name) is not row
        ]
        y = F.silu(inner[0]) * inner[1] if len(inner) == 2 else F.gelu(inner[0])
        return F.linear(y, parts[weights(region.rows)[0]])

    whole = run(0, 1)
    for degree in (2, 4):
        total = sum(run(rank, degree) for rank in range(degree))
        if len(region.columns) == 1:
            torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
        else:
            assert total.shape == whole.shape
