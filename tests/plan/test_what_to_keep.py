"""What to keep is the best there is, and the bytes that were predicted from a Blueprint are those that live when a model runs."""

from __future__ import annotations

import gc
import weakref
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import meshwright as mw
from meshwright.errors import PlanError
from meshwright.models.decoder import Decoder, gpt, llama
from meshwright.plan.recompute import (
    BlockCosts,
    Item,
    budget_bytes,
    fit,
    front,
    hull,
    saved_bytes,
    selective,
    shared_out,
    steps,
    unit_costs,
)
from meshwright.plan.stages import CPU

items = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=6)


def block_of(entry: int, found: list[tuple[int, int]]) -> BlockCosts:
    results = tuple(Item(nbytes, float(seconds)) for nbytes, seconds in found)
    return BlockCosts(entry, entry + sum(i.bytes for i in results) + 20, 5.0 + sum(i.seconds for i in results), results)


def every_choice(costs: BlockCosts) -> list[tuple[int, float]]:
    found = [(costs.saved, 0.0)]
    for count in range(len(costs.items) + 1):
        for kept in combinations(costs.items, count):
            found.append((costs.entry + sum(i.bytes for i in kept), costs.forward - sum(i.seconds for i in kept)))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), items)
def test_nothing_beats_the_front(entry: int, found: list[tuple[int, int]]) -> None:
    costs = block_of(entry, found)
    points = [(choice.bytes, choice.seconds) for choice in front(costs)]
    assert points == sorted(points)
    for nbytes, seconds in every_choice(costs):
        assert any(b <= nbytes and s <= seconds + 1e-9 for b, s in points)
    half = selective(costs)
    allowed = [s for b, s in every_choice(costs) if 2 * b <= costs.saved]
    assert not allowed or half.seconds == pytest.approx(min(allowed))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 3),
    st.integers(0, 400),
)
def test_a_budget_takes_the_least_time_that_fits(found: Any, flying: int, budget: int) -> None:
    blocks = [(block_of(entry, results), flying) for entry, results in found]
    sums = [(10, 0.0)]
    for costs, times in blocks:
        sums = [(b + times * c, s + times * t) for b, s in sums for c, t in every_choice(costs)]
    least = min(b for b, _ in sums)
    if budget < least:
        with pytest.raises(PlanError, match=f"at least {least} bytes"):
            fit(blocks, 10, budget)
        return
    chosen = fit(blocks, 10, budget)
    assert 10 + flying * sum(choice.bytes for choice in chosen) <= budget
    assert flying * sum(choice.seconds for choice in chosen) == pytest.approx(min(s for b, s in sums if b <= budget))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), items, st.integers(1, 6), st.integers(0, 2000))
def test_the_planner_comes_within_one_block_of_the_best(entry: int, found: list[tuple[int, int]], count: int, room: int) -> None:
    block = block_of(entry, found)
    points = front(block)
    more, longest = points[-1].bytes - points[0].bytes, points[0].seconds
    spent, spared = shared_out(steps([(count, more, longest, hull(block))]), [count], room)
    assert spent <= room
    best = sum(choice.seconds for choice in fit([(block, 1)] * count, 0, count * points[0].bytes + room))
    took = count * longest - spared
    assert best - 1e-9 <= took <= best + longest + 1e-9


def test_bytes_are_read_as_they_are_written() -> None:
    assert [budget_bytes(f"budget={text}") for text in ("12", "3K", "4MB", "1G")] == [12, 3000, 4_000_000, 10**9]
    assert budget_bytes("full") is None


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, 16), nn.GELU(), nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 16, 3, padding=1)
            )
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x.mean((2, 3))


class Living(TorchDispatchMode):
    """Bytes of storages that were made inside and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before | self.known:
                storage = tensor.untyped_storage()
                self.alive += storage.nbytes()
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return result

    def gone(self, key: int, nbytes: int) -> None:
        self.alive -= nbytes
        self.known.discard(key)


def case(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    if name == "conv":
        x = torch.randn(4, 3, 24, 24)
        return Conv(), x, lambda out, _: out.square().mean()
    make = {"gpt": gpt, "llama": llama}[name]
    tokens = torch.randint(0, 64, (4, 48))
    config = make(layers=6, hidden=64, heads=4, vocab=64, sequence=48)
    return Decoder(config), (tokens, tokens), lambda out, batch: F.cross_entropy(out.flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("mode", ["none", "full", "selective", "budget"])
@pytest.mark.parametrize("name", ["gpt", "llama", "conv"])
def test_predicted_bytes_live(name: str, mode: str) -> None:
    model, batch, loss_fn = case(name)
    blueprint = mw.inspect(model, batch, loss_fn=loss_fn)
    none, least = (saved_bytes(blueprint, m, 4, CPU)[0] for m in ("none", "full"))
    rest = blueprint.saved_bytes(4) - none
    if mode == "budget":
        mode = f"budget={rest + (none + least) // 2}"
    predicted = rest + saved_bytes(blueprint, mode, 4, CPU)[0]
    engine = mw.parallelize(model, f"recompute={mode}", optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=loss_fn)
    engine.step(batch)
    gc.collect()
    with Living() as living:
        loss = engine._loss_of(batch)
        gc.collect()
        assert living.alive == pytest.approx(predicted, rel=0.03)
        loss.backward()


@pytest.mark.parametrize("name", ["gpt", "llama", "conv"])
def test_the_planner_and_the_run_choose_the_same(name: str) -> None:
    model, batch, loss_fn = case(name)
    blueprint = mw.inspect(model, batch, loss_fn=loss_fn)
    engine = mw.parallelize(model, "recompute=selective", optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=loss_fn)
    engine.step(batch)
    found = {name: facts.choice.kept for (name, *_), facts in engine._applied.recompute._facts.items()}
    expected = {call.name: selective(unit_costs(blueprint.kinds[call.kind], 4, CPU)).kept for call in blueprint.calls}
    assert found == expected


@pytest.mark.parametrize("mode", ["none", "full"])
def test_of_what_is_offloaded_two_blocks_live(mode: str, tmp_path: Any) -> None:
    model, batch, loss_fn = case("gpt")
    blueprint = mw.inspect(model, batch, loss_fn=loss_fn)
    rest = blueprint.saved_bytes(4) - saved_bytes(blueprint, "none", 4, CPU)[0]
    engine = mw.parallelize(
        model,
        f"recompute={mode} offload=activations:nvme={tmp_path}",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss_fn=loss_fn,
    )
    engine.step(batch)
    gc.collect()
    two = saved_bytes(blueprint, mode, 4, CPU)[0] * 2 / len(blueprint.calls)  # the last block's, and those that travel
    with Living() as living:
        loss = engine._loss_of(batch)
        gc.collect()
        small = 6 * 2 * 4 * 48 * 4 * (1 + 4) if mode == "none" else 0  # a norm's statistics, attention's sums
        assert rest + two * 0.97 <= living.alive <= (rest + two) * 1.03 + small
        loss.backward()
