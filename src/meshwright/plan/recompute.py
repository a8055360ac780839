"""Which results a block keeps and which its backward computes again: the least extra time for the bytes there are.

A block that is recomputed keeps what enters it and, by choice, results of ops that have FLOPs (matrix products, attention,
convolutions); the rest of its forward, up to the last op that saves anything, runs again in the backward. With `K` what is kept,

    bytes(K)   = entry + sum of the kept results' bytes                 (none: what autograd saves; full: entry)
    seconds(K) = forward - sum of the kept results' seconds             (none: 0; full: forward)

Both are sums, so the choices worth making are a Pareto front, found exactly by adding one result after another and dropping what is
dominated (a 0/1 knapsack; arXiv:1604.06174 and arXiv:2205.05198 are the two ends of it). Fronts of blocks add up in the same way.

Times the micro-batches in flight, over the blocks of a rank, these are its saved activations; what lies outside of the blocks comes
on top, with the logits and what the loss makes of them divided by `loss_chunks`. Blocks under `offload=activations` keep what is
smaller than a transfer, and of two blocks at a time everything.

The runtime (`parallel/recompute.py`) and the planner call the same functions, one with measured and one with captured costs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from meshwright.blueprint.costs import PRODUCTS
from meshwright.blueprint.record import Blueprint, Unit
from meshwright.errors import PlanError
from meshwright.plan.plan import Plan
from meshwright.plan.stages import CPU, Rates

_WIDEST = 2048
"""Points of a front that are kept; beyond, neighbours closer than a thousandth of its range become one (the cheaper in bytes)."""


@dataclass(frozen=True)
class Item:
    """The results of one op: their bytes, and the seconds of making them again."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class BlockCosts:
    """One call of a block on one micro-batch: bytes that enter it and have a gradient (masks and tables are every block's), bytes
    that autograd saves without recompute, the seconds of its forward up to the last op that saves anything, and the results that
    may be kept, in the order in which they are made.
    """

    entry: int
    saved: int
    forward: float
    items: tuple[Item, ...] = ()


Front = tuple[tuple[float, float], ...]
Step = tuple[int, float, float]
"""A kind of block, and the bytes and the seconds of one step along its hull."""


@dataclass(frozen=True)
class Choice:
    """What to keep (places in `BlockCosts.items`; None: everything, nothing is recomputed), its bytes and its extra seconds."""

    kept: frozenset[int] | None
    bytes: int
    seconds: float


def front(costs: BlockCosts) -> list[Choice]:
    """The choices of a block of which none is better than another in both, fewest bytes first."""
    choices = [Choice(frozenset(), costs.entry, costs.forward)]
    for place, item in enumerate(costs.items):
        more = [Choice((c.kept or frozenset()) | {place}, c.bytes + item.bytes, c.seconds - item.seconds) for c in choices]
        choices = _thinned(_pareto([*choices, *more]))
    return _pareto([*choices, Choice(None, costs.saved, 0.0)])


def full(costs: BlockCosts) -> Choice:
    """Keep what enters, or everything where that is no more."""
    return front(costs)[0]


def selective(costs: BlockCosts) -> Choice:
    """The least extra time that halves the saved bytes; full recompute where nothing does."""
    fitting = [choice for choice in front(costs) if 2 * choice.bytes <= costs.saved]
    return fitting[-1] if fitting else full(costs)


def fit(blocks: Sequence[tuple[BlockCosts, int]], outside: int, budget: int) -> list[Choice]:
    """A choice for every block, of the least extra time whose bytes fit in `budget` together.

    `blocks` are (costs, micro-batches in flight on its stage), `outside` the bytes that are saved whatever is chosen. Raises
    `PlanError` below the minimum, and says it.
    """
    refuse(budget, minimum(blocks, outside))
    fronts: dict[tuple[BlockCosts, int], list[tuple[int, float, Choice]]] = {}
    for costs, flying in blocks:
        if (costs, flying) not in fronts:
            fronts[costs, flying] = [(c.bytes * flying, c.seconds * flying, c) for c in front(costs)]
    # Points are (bytes, seconds, choice of the last block, the point it was added to).
    points: list[tuple[int, float, Choice | None, object]] = [(outside, 0.0, None, None)]
    for block in blocks:
        grown: list[tuple[int, float, Choice | None, object]]
        grown = [(p[0] + b, p[1] + s, c, p) for p in points for b, s, c in fronts[block] if p[0] + b <= budget]
        grown.sort(key=lambda point: (point[0], point[1]))
        best = float("inf")
        kept: list[tuple[int, float, Choice | None, object]] = []
        for point in grown:
            if point[1] < best:
                best = point[1]
                kept.append(point)
        points = kept if len(kept) <= _WIDEST else [*kept[:: len(kept) // _WIDEST + 1], kept[-1]]
    at: tuple[int, float, Choice | None, object] = points[-1]
    chosen: list[Choice] = []
    while at[2] is not None:
        chosen.append(at[2])
        at = at[3]  # type: ignore[assignment]
    return chosen[::-1]


def minimum(blocks: Sequence[tuple[BlockCosts, int]], outside: int) -> int:
    """The bytes that `fit` can't go below."""
    return outside + sum(full(costs).bytes * flying for costs, flying in blocks)


def hull(costs: BlockCosts) -> Front:
    """The choices that a budget over many equal blocks is made of, as parts of what full recompute spares and of what it takes:
    the corners of the front's lower hull, from (0, 1), everything computed again, to (1, 0), nothing.
    """
    choices = front(costs)
    low, high, most = choices[0].bytes, choices[-1].bytes, choices[0].seconds
    if high <= low or most <= 0:
        return ((0.0, 0.0),)
    corners: list[tuple[float, float]] = []
    for choice in choices:
        point = (choice.bytes - low) / (high - low), choice.seconds / most
        while len(corners) > 1 and _steepness(corners[-2], corners[-1]) <= _steepness(corners[-2], point):
            corners.pop()
        corners.append(point)
    return tuple(corners)


def _steepness(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def steps(blocks: Sequence[tuple[int, float, float, Front]]) -> list[Step]:
    """What to keep first: a step from corner to corner of each kind's `hull`, those that spare most seconds per byte first.

    `blocks` are, by kind, (how many, bytes and seconds from full recompute to none, hull).
    """
    found = []
    for kind, (count, nbytes, seconds, corners) in enumerate(blocks):
        for a, b in pairwise(corners):
            if count and nbytes > 0:
                found.append((-_steepness(a, b) * seconds / nbytes, kind, (b[0] - a[0]) * nbytes, (a[1] - b[1]) * seconds))
    return [step[1:] for step in sorted(found)]


def shared_out(ordered: Sequence[Step], counts: Sequence[int], room: float) -> tuple[float, float]:
    """Bytes kept beyond full recompute, and seconds of recompute that they spare, with `room` bytes for all blocks of a rank.

    Within one step of one block of what `fit` finds, in no time.
    """
    left, spared = max(0.0, room), 0.0
    reached = list(counts)
    for kind, nbytes, seconds in ordered:
        reached[kind] = min(reached[kind], int(left / nbytes))
        left -= reached[kind] * nbytes
        spared += reached[kind] * seconds
    return max(0.0, room) - left, spared


def refuse(budget: int, least: int) -> None:
    """Raise `PlanError` for a budget below the `least` bytes of a rank."""
    if least > budget:
        raise PlanError(
            f"recompute=budget={budget}: a rank keeps at least {least} bytes of activations with everything recomputed: give "
            f"budget={least} or more, a smaller micro-batch, or recompute=full with offload=activations in place of a budget"
        )


def check_budget(blueprint: Blueprint, plan: Plan, items: int) -> None:
    """Raise `PlanError` for a budget that micro-batches of `items` can't be kept in, with the minimum; nothing has to run for it.

    Where the model is cut it is an even share of what enters the blocks, a lower bound; the first backward knows the rest.
    """
    budget = budget_bytes(plan.recompute)
    if budget is None or not blueprint.captured:
        return
    least, shares = saved_bytes(blueprint, "full", items, CPU)[0], plan.tp * plan.cp * plan.pp
    whole = shares == 1 and plan.loss_chunks == 1
    refuse(budget, least // shares + whole * blueprint.rest.activation_bytes.at(items))


@functools.cache
def budget_bytes(recompute: str) -> int | None:
    """The bytes of `recompute=budget=BYTES` (`200M`, `1GB`, `65536`: powers of ten), None for another mode."""
    found = re.fullmatch(r"budget=(\d+)([KMGT]?)B?", recompute)
    return int(found[1]) * 1000 ** " KMGT".index(found[2] or " ") if found else None


def unit_costs(unit: Unit, items: int, rates: Rates) -> BlockCosts:
    """What a captured block costs for a micro-batch of `items`: the same terms that the runtime measures."""
    last = _last(unit)
    returned = {saved.producer for saved in unit.saved if saved.output}
    priced = [(place, op) for place, op in enumerate(unit.forward) if op.kind in PRODUCTS]
    offered = tuple(
        Item(op.written_bytes.at(items), rates.seconds(op, items))
        if place < last and place not in returned
        else Item(op.written_bytes.at(items), 0.0)
        for place, op in priced
    )
    forward = sum(rates.seconds(op, items) for op in unit.forward[: max(0, last)])
    entry = sum(tensor.bytes.at(items) for tensor in unit.inputs if tensor.needs_gradient)
    # Inputs that are the same for every item (position tables) are every block's: none of them keeps them.
    made = [s for s in unit.saved if s.role == "activation" or (s.role == "input" and s.bytes.per_item)]
    saved = sum(s.bytes.at(items) for s in made if not s.output)
    return BlockCosts(entry, saved, forward, offered)


def repeated(unit: Unit, choice: Choice) -> set[int]:
    """The places of the forward's ops that the backward of a captured block computes again under a choice."""
    if choice.kept is None:
        return set()
    priced = [place for place, op in enumerate(unit.forward) if op.kind in PRODUCTS]
    return {*range(max(0, _last(unit)))} - {priced[n] for n in choice.kept}


def _last(unit: Unit) -> int:
    """The last op that saves anything, from where nothing has to be computed again."""
    return max((saver for saved in unit.saved for saver in saved.savers), default=-1)


def saved_bytes(blueprint: Blueprint, recompute: str, items: int, rates: Rates, in_flight: int = 1) -> tuple[int, float]:
    """Bytes saved in all blocks for `in_flight` micro-batches of `items`, and the extra seconds of one, under `recompute`."""
    costs = [unit_costs(blueprint.kinds[call.kind], items, rates) for call in blueprint.calls]
    budget = budget_bytes(recompute)
    if budget is not None:
        chosen = fit([(cost, in_flight) for cost in costs], blueprint.rest.activation_bytes.at(items) * in_flight, budget)
    else:
        pick = {"none": lambda c: Choice(None, c.saved, 0.0), "full": full, "selective": selective}[recompute]
        chosen = [pick(cost) for cost in costs]
    return sum(choice.bytes for choice in chosen) * in_flight, sum(choice.seconds for choice in chosen)


def _pareto(choices: list[Choice]) -> list[Choice]:
    best, kept = float("inf"), []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.seconds)):
        if choice.seconds < best:
            best = choice.seconds
            kept.append(choice)
    return kept


def _thinned(choices: list[Choice]) -> list[Choice]:
    return choices if len(choices) <= _WIDEST else [*choices[:: len(choices) // _WIDEST + 1], choices[-1]]
