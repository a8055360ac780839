"""Stages are cut where the slowest is fastest: against every possible cut, and on real blueprints."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import meshwright as mw
from meshwright.blueprint.record import Blueprint
from meshwright.errors import PlanError
from meshwright.plan import Plan
from meshwright.plan.stages import CPU, Rates, balance, cut


def every_cut(cells: int, stages: int) -> list[list[int]]:
    return [[*ends, cells] for ends in itertools.combinations(range(1, cells), stages - 1)]


def slowest(seconds: list[float], ends: list[int]) -> float:
    return max(sum(seconds[first:last]) for first, last in itertools.pairwise([0, *ends]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_no_cut_is_better(seconds: list[int], data) -> None:
    stages = data.draw(st.integers(1, len(seconds)))
    sent = data.draw(st.lists(st.integers(0, 3), min_size=len(seconds), max_size=len(seconds)))
    found = balance(seconds, stages, sent)
    assert found in every_cut(len(seconds), stages)

    def quality(ends: list[int]) -> tuple[float, int, int]:
        parts = [sum(seconds[first:last]) for first, last in itertools.pairwise([0, *ends])]
        return max(parts), sum(sent[end - 1] for end in ends[:-1]), sum(part * part for part in parts)

    assert quality(found) == min(map(quality, every_cut(len(seconds), stages)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=8), st.integers(2, 4), st.integers(1, 30))
def test_no_fitting_cut_is_better_and_none_is_missed(cells: list[tuple[int, int]], stages: int, limit: int) -> None:
    stages = min(stages, len(cells))
    seconds, sizes = [list(column) for column in zip(*cells, strict=True)]

    def fits(stage: int, first: int, last: int) -> bool:
        return (stage + 1) * sum(sizes[first:last]) <= limit

    legal = [
        ends
        for ends in every_cut(len(cells), stages)
        if all(fits(stage, *at) for stage, at in enumerate(itertools.pairwise([0, *ends])))
    ]
    found = balance(seconds, stages, fits=fits)
    assert bool(found) == bool(legal)
    if legal:
        assert found in legal
        assert slowest(seconds, found) == min(slowest(seconds, ends) for ends in legal)


@pytest.fixture(scope="module")
def big_head() -> Blueprint:
    """A vocabulary so large that the head costs as much as several blocks."""
    return mw.inspect("gpt:layers=8,hidden=64,heads=4,vocab=4096,tied=on", seq=32)


def test_the_head_weighs_on_the_last_stage(big_head: Blueprint) -> None:
    stages = cut(big_head, Plan(pp=4), items=2, rates=CPU)
    sizes = [stage.stop - stage.start for stage in stages]
    assert sum(sizes) == 8
    assert sizes[-1] < min(sizes[:-1])
    even = cut(big_head, Plan(pp=4, split="2,2,2,2"), items=2, rates=CPU)
    assert max(stage.seconds for stage in stages) < max(stage.seconds for stage in even)


def test_nothing_is_lost_between_the_stages(big_head: Blueprint) -> None:
    rates = Rates(1.0, float("inf"))  # seconds are FLOPs
    for split in ("balanced", "1,4,2,1", "blocks.3,blocks.5,blocks.6"):
        stages = cut(big_head, Plan(pp=4, split=split), items=3, rates=rates)
        assert sum(stage.cost.forward_s for stage in stages) == big_head.forward_flops(3)
        assert sum(stage.cost.seconds("B") for stage in stages) == big_head.backward_flops(3)
        assert [stage.start for stage in stages[1:]] == [stage.stop for stage in stages[:-1]]
        tied = 4096 * 64 * 4  # on the first stage and on the last
        buffers = sum(p.bytes for unit, n in big_head.units() for p in unit.parameters if p.buffer)
        assert sum(stage.parameter_bytes for stage in stages) == big_head.parameter_bytes + tied + buffers
        assert [stage.sent_bytes for stage in stages] == [3 * 32 * 64 * 4] * 3 + [0]


def test_matmul_gradients_are_told_apart(big_head: Blueprint) -> None:
    """A linear layer's two gradients have equal FLOPs; attention's products have no weight."""
    block = big_head.kinds[0]
    attention = sum(op.flops.at(1) for op in block.backward if op.kind == "attention")
    stage = cut(big_head, Plan(pp=2, split="4,4"), rates=Rates(1.0, float("inf")))[0]
    assert stage.cost.weight_gradient_s == pytest.approx(4 * (block.backward_flops.at(1) - attention) / 2)


def test_named_and_counted_splits_agree(big_head: Blueprint) -> None:
    named = cut(big_head, Plan.parse("pp=2 virtual=2 schedule=interleaved microbatches=4 split=blocks.3,blocks.5,blocks.6"))
    assert [stage.stop - stage.start for stage in named] == [3, 2, 1, 2]
    assert named == cut(big_head, Plan.parse("pp=2 virtual=2 schedule=interleaved microbatches=4 split=3,2,1,2"))


def test_memory_moves_the_cut_and_is_never_exceeded(big_head: Blueprint) -> None:
    free = cut(big_head, Plan(pp=2), items=4, in_flight=[2, 1])
    needed = [4 * stage.parameter_bytes + n * stage.cost.saved_bytes for stage, n in zip(free, (2, 1), strict=True)]
    limit = max(needed) - 1
    tight = cut(big_head, Plan(pp=2), items=4, in_flight=[2, 1], memory_limit_bytes=limit)
    assert tight != free
    assert all(4 * stage.parameter_bytes + n * stage.cost.saved_bytes <= limit for stage, n in zip(tight, (2, 1), strict=True))
    with pytest.raises(PlanError, match="nearest that works is") as caught:
        cut(big_head, Plan(pp=2), items=4, in_flight=[2, 1], memory_limit_bytes=1000)
    least = float(str(caught.value).split("works is ")[1].split()[0])
    assert cut(big_head, Plan(pp=2), items=4, in_flight=[2, 1], memory_limit_bytes=least * 1.01)


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("pp=9 microbatches=9", ["pp=9", "8 blocks", "pp=8"]),
        ("pp=5 virtual=2 schedule=interleaved", ["pp=5 virtual=2", "10 stages", "pp=4 virtual=2"]),
        ("pp=2 virtual=5 schedule=interleaved", ["10 stages", "8 blocks", "nearest that works is pp=2 virtual=4"]),
        ("pp=6 virtual=2 schedule=zbv", ["12 stages", "8 blocks", "nearest that works is pp=4 virtual=2"]),
        ("pp=2 split=4,5", ["split=4,5", "9 blocks", "split=4,4"]),
        ("pp=2 split=8,0", ["split=8,0", "split=4,4"]),
        ("pp=2 split=block.4", ["'block.4'", "'blocks.4'"]),
        ("pp=2 split=blocks.0", ["'blocks.0'", "first"]),
        ("pp=2 split=blocks.1,blocks.2", ["names 2 cuts", "have 1"]),
        ("pp=3 split=blocks.4,blocks.2", ["blocks.2,blocks.4"]),
    ],
)
def test_cuts_that_cannot_be_made_name_the_nearest_that_can(big_head: Blueprint, text: str, hints: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        cut(big_head, Plan.parse(text))
    assert all(hint in str(caught.value) for hint in hints), caught.value
    assert "\n" not in str(caught.value)


class Skips(nn.Module):
    """Blocks of one kind, and one tensor that jumps over most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.layers[0](x)
        for layer in self.layers[1:5]:
            x = layer(x)
        return self.layers[5](x + first)


def test_what_jumps_over_a_cut_is_counted_as_sent() -> None:
    blueprint = mw.inspect(Skips(), torch.randn(4, 16))
    sent = [stage.sent_bytes for stage in cut(blueprint, Plan(pp=6, microbatches=6), items=4)]
    one = 4 * 16 * 4
    assert sent == [one, 2 * one, 2 * one, 2 * one, 2 * one, 0]
    assert [stage.stop for stage in cut(blueprint, Plan(pp=2), items=4)] == [3, 6]
