"""Cuts a model's blocks into pipeline stages: contiguous, balanced by cost or where `split=` says.

A cell is a block call with whatever runs outside the blocks right before it (and, for the last, after it: final norm, head, loss),
so the embedding weighs on the first stage and the head on the last. Costs come from the Blueprint's own ops; `balance` knows only
numbers, and its answer is exact. What a schedule makes of the stages is `simulate.py`'s business.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

from meshwright.blueprint.record import Blueprint, Op, ParameterRecord, Saved, Unit
from meshwright.errors import PlanError
from meshwright.plan.orders import check_counts
from meshwright.plan.plan import Plan
from meshwright.plan.simulate import StageCost

_TIE = 1 + 1e-9  # sums of floats in another order are the same bottleneck


@dataclass(frozen=True)
class Rates:
    """What prices an op: max(FLOPs / `flops_per_s`, bytes read and written / `bytes_per_s`). Only their ratio moves a cut."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, op: Op, items: int) -> float:
        """Seconds of one op for a micro-batch of `items`; a view costs nothing."""
        if op.kind == "view":
            return 0.0
        moved = op.read_bytes.at(items) + op.written_bytes.at(items)
        return max(op.flops.at(items) / self.flops_per_s, moved / self.bytes_per_s)


GPU = Rates(2e14, 1.5e12)
"""The order of a data-centre GPU in 16 bits, as reached (A100: 312 TFLOP/s and 2.0 TB/s at about 0.7)."""
CPU = Rates(5e10, 1e10)
"""The order of one CPU core in float32."""


@dataclass(frozen=True)
class Stage:
    """Block calls `start` to `stop` (excluded) of `Blueprint.calls`, and what else runs between the cuts before and after them.

    `cost` is for one micro-batch; `parameter_bytes` counts each tensor used here once, frozen and tied ones included;
    `sent_bytes` is what is alive across the cut after this stage and has to be sent (0 for the last).
    """

    start: int
    stop: int
    cost: StageCost
    parameter_bytes: int
    sent_bytes: int

    @property
    def seconds(self) -> float:
        """Seconds of forward and backward of one micro-batch."""
        return self.cost.forward_s + self.cost.seconds("B")


@dataclass(frozen=True)
class _Cell:
    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    saved_bytes: int
    parameters: tuple[tuple[str, int], ...]

    @property
    def seconds(self) -> float:
        return self.forward_s + self.input_gradient_s + self.weight_gradient_s


Memory: TypeAlias = Callable[[int, int, int], float]
"""(stage number, first cell, last cell + 1) -> bytes that the stage needs."""


def cut(
    blueprint: Blueprint,
    plan: Plan,
    items: int = 1,
    rates: Rates = GPU,
    memory_limit_bytes: float = math.inf,
    in_flight: Sequence[float] | None = None,
    state_factor: float = 4,
) -> tuple[Stage, ...]:
    """Return the `pp * virtual` stages of a plan for micro-batches of `items`, as `plan.split` says or balanced.

    Balanced: of all cuts whose every stage fits `memory_limit_bytes`, the one with the fastest slowest stage; of those that which
    sends the least, then the most even. A stage's bytes are `state_factor` (4: weights, gradients and two Adam states) times its
    parameters plus `in_flight[stage]` (default 1) times what a micro-batch saves. Raises `PlanError` naming the nearest that works.
    """
    stages = plan.pp * plan.virtual
    names = [call.name for call in blueprint.calls]
    check_blocks(plan, len(names), blueprint.model)
    if not blueprint.captured:
        raise PlanError(f"{blueprint.model} could not be captured, only read: its stages can't be weighed")
    cells = _cells(blueprint, items, rates)
    sent = [_sent(blueprint, number, items) for number in range(len(names))]
    if plan.split != "balanced" or math.isinf(memory_limit_bytes):
        ends = place(plan, names, [cell.seconds for cell in cells], sent)
    else:
        memory = _memory(cells, in_flight or [1] * stages, state_factor)
        ends = balance([cell.seconds for cell in cells], stages, sent, lambda *at: memory(*at) <= memory_limit_bytes)
        if not ends:
            raise PlanError(_least_memory(cells, stages, memory, memory_limit_bytes))
    return tuple(_stage(cells, sent, first, last) for first, last in pairwise([0, *ends]))


def place(plan: Plan, names: Sequence[str], seconds: Sequence[float], sent: Sequence[float]) -> list[int]:
    """Return where each stage ends, as numbers of block calls `names`: as `plan.split` says, or by `balance`."""
    check_blocks(plan, len(names), "the model")
    stages = plan.pp * plan.virtual
    return balance(seconds, stages, sent) if plan.split == "balanced" else _ends(names, plan.split, stages)


def check_blocks(plan: Plan, blocks: int, model: str) -> None:
    """Raise `PlanError`, naming the nearest that works, if a plan cuts more stages than a model has blocks."""
    stages = plan.pp * plan.virtual
    if stages > blocks:
        raise PlanError(f"{_where(plan)} cuts {stages} stages, but {model} has {blocks} blocks: {_fewer(plan, blocks)}")


def balance(
    seconds: Sequence[float], stages: int, sent: Sequence[float] | None = None, fits: Callable[[int, int, int], bool] | None = None
) -> list[int]:
    """Return where each stage ends (cell numbers, the last is `len(seconds)`), or nothing if no cut has only stages that fit.

    Exact, in two passes of dynamic programming over (stages, cells): first the least possible slowest stage, then, among all cuts
    that reach it, the least (sum of `sent` at the cuts, sum of squared stage seconds). `fits(stage, first, last)` may exclude some.
    O(stages x cells^2).
    """
    cells = len(seconds)
    upto = [0.0, *accumulate(seconds)]
    allowed = fits or (lambda *_: True)
    crossing = sent or [0.0] * cells
    bound = (_least_slowest(upto, stages) if fits is None else _least_allowed(upto, stages, allowed)) * _TIE
    if math.isinf(bound):
        return []
    least: list[dict[int, tuple[float, float, int]]] = [{} for _ in range(stages + 1)]  # cell -> (sent, squares, previous end)
    least[0][0] = (0.0, 0.0, 0)
    for stage in range(stages):
        for first, (bytes_so_far, squares, _) in least[stage].items():
            for last in range(first + 1, cells - (stages - stage - 1) + 1):
                time = upto[last] - upto[first]
                if time > bound:
                    break
                new = (bytes_so_far + (crossing[last - 1] if last < cells else 0), squares + time * time, first)
                if new < least[stage + 1].get(last, (math.inf, math.inf, 0)) and allowed(stage, first, last):
                    least[stage + 1][last] = new
    ends = [cells]
    for stage in range(stages, 1, -1):
        ends.append(least[stage][ends[-1]][2])
    return ends[::-1]


def _least_slowest(upto: Sequence[float], stages: int) -> float:
    """The least possible slowest stage, from running sums: raised to the next sum that lets a greedy cut do with `stages`."""
    cells = len(upto) - 1
    bound = max(upto[-1] / stages, *(upto[i + 1] - upto[i] for i in range(cells)))
    while True:
        first, more = 0, math.inf
        for _ in range(stages):
            last = max(first, bisect_right(upto, upto[first] + bound * _TIE) - 1)
            if last < cells:
                more = min(more, upto[last + 1] - upto[first])
            first = last
        if first >= cells:
            return bound
        bound = more


def _least_allowed(upto: Sequence[float], stages: int, allowed: Callable[[int, int, int], bool]) -> float:
    """The same where some stages are excluded, by dynamic programming; infinite if no cut has only allowed ones."""
    cells = len(upto) - 1
    worst: list[list[float]] = [[math.inf] * (cells + 1) for _ in range(stages + 1)]
    worst[0][0] = 0
    for stage in range(stages):
        for last in range(stage + 1, cells - (stages - stage - 1) + 1):
            for first in range(stage, last):
                slowest = max(worst[stage][first], upto[last] - upto[first])
                if slowest < worst[stage + 1][last] and allowed(stage, first, last):
                    worst[stage + 1][last] = slowest
    return worst[stages][cells]


def cell_seconds(blueprint: Blueprint) -> tuple[float, ...]:
    """What the executor weighs when it cuts: seconds of each block call with what runs before it (and after the last)."""
    if not blueprint.calls:
        return ()
    return tuple(cell.seconds for cell in _cells(blueprint, 1, CPU if blueprint.device == "cpu" else GPU))


def _cells(blueprint: Blueprint, items: int, rates: Rates) -> list[_Cell]:
    last = len(blueprint.calls) - 1
    priced = [_priced(unit, unit.forward, unit.backward, unit.saved, items, rates) for unit in blueprint.kinds]
    outside = _rest_parameters(blueprint)
    cells = []
    for number, call in enumerate(blueprint.calls):
        here = (number, number + 1) if number == last else (number,)
        rest = blueprint.rest
        forward = [op for op in rest.forward if op.position in here]
        backward = [op for op in rest.backward if op.position in here]
        around = _priced(rest, forward, backward, [saved for saved in rest.saved if saved.position in here], items, rates)
        own = [_named(call.name, parameter) for parameter in blueprint.kinds[call.kind].parameters]
        held = dict(own) | {name: size for place in here for name, size in outside.get(place, ())}
        sums = [one + other for one, other in zip(priced[call.kind], around, strict=True)]
        cells.append(_Cell(sums[0], sums[1], sums[2], round(sums[3]), tuple(held.items())))
    return cells


def _priced(
    unit: Unit, forward: Iterable[Op], backward: Iterable[Op], saved: Iterable[Saved], items: int, rates: Rates
) -> tuple[float, float, float, float]:
    """Seconds of forward, input gradients, weight gradients, and bytes that one more micro-batch keeps.

    A backward op whose whole result has the same size for every micro-batch has summed over the batch: a weight's gradient. A
    convolution's backward makes both, and is counted half and half.
    """
    inputs = weights = 0.0
    for op in backward:
        seconds = rates.seconds(op, items)
        written = op.written_bytes
        share = 0.5 if "convolution_backward" in op.name else float(written.fixed > 0 and written.per_item == 0)
        inputs, weights = inputs + seconds * (1 - share), weights + seconds * share
    kept = sum(s.bytes.at(items) for s in saved if s.role in ("activation", "input") and not s.output)
    return sum(rates.seconds(op, items) for op in forward), inputs, weights, kept


def _named(call: str, parameter: ParameterRecord) -> tuple[str, int]:
    if parameter.shared_with:
        return parameter.shared_with, parameter.bytes
    return f"{call}.{parameter.name}" if parameter.name else call, parameter.bytes


def _rest_parameters(blueprint: Blueprint) -> dict[int, list[tuple[str, int]]]:
    """Parameters outside the blocks by the position at which their module runs first; position 0 if it never runs by itself."""
    runs_at: dict[str, int] = {}
    for op in blueprint.rest.forward:
        runs_at.setdefault(op.module, op.position)
    placed: dict[int, list[tuple[str, int]]] = {}
    for parameter in blueprint.rest.parameters:
        module = parameter.name.rpartition(".")[0]
        within = [at for name, at in runs_at.items() if name == module or name.startswith(module + ".")]
        at = runs_at.get(module, min(within, default=0))
        placed.setdefault(at, []).append((parameter.shared_with or parameter.name, parameter.bytes))
    return placed


def _parameter_bytes(cells: Iterable[_Cell]) -> int:
    held: dict[str, int] = {}
    for cell in cells:
        held.update(cell.parameters)
    return sum(held.values())


def _memory(cells: Sequence[_Cell], in_flight: Sequence[float], state_factor: float) -> Memory:
    saved = [0, *accumulate(cell.saved_bytes for cell in cells)]
    parameters: list[list[int]] = []  # [first][last - first]: bytes of the distinct tensors in between
    for first in range(len(cells)):
        held: dict[str, int] = {}
        row = [total := 0]
        for cell in cells[first:]:
            for name, size in cell.parameters:
                if name not in held:
                    total += size
                    held[name] = size
            row.append(total)
        parameters.append(row)

    def memory(stage: int, first: int, last: int) -> float:
        return state_factor * parameters[first][last - first] + in_flight[stage] * (saved[last] - saved[first])

    return memory


def _sent(blueprint: Blueprint, call: int, items: int) -> int:
    boundary = blueprint.boundaries[call]
    return sum(tensor.bytes.at(items) for tensor in (*boundary.flows, *boundary.alive) if not tensor.recomputable)


def _stage(cells: Sequence[_Cell], sent: Sequence[int], first: int, last: int) -> Stage:
    mine = cells[first:last]
    cost = StageCost(
        sum(cell.forward_s for cell in mine),
        sum(cell.input_gradient_s for cell in mine),
        sum(cell.weight_gradient_s for cell in mine),
        sum(cell.saved_bytes for cell in mine),
    )
    return Stage(first, last, cost, _parameter_bytes(mine), sent[last - 1] if last < len(cells) else 0)


def _ends(names: Sequence[str], split: str, stages: int) -> list[int]:
    """Read `split=`: counts of blocks per stage, or the block that each stage but the first begins with."""
    calls, words = len(names), split.split(",")
    if re.fullmatch(r"[0-9,]+", split):
        counts = [int(word) for word in words]
        even = ",".join(str(calls // stages + (number < calls % stages)) for number in range(stages))
        if sum(counts) != calls or 0 in counts or len(counts) != stages:
            wrong = f"split={split} gives {sum(counts)} blocks to {len(counts)} stages"
            raise PlanError(f"{wrong}, but there are {calls} blocks and {stages} stages: split={even} works")
        return list(accumulate(counts))
    if len(words) != stages - 1:
        raise PlanError(f"split={split} names {len(words)} cuts, but {stages} stages have {stages - 1}")
    unknown = next((word for word in words if word not in names[1:]), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, names[1:], n=1, cutoff=0.0)[0]
        raise PlanError(
            f"split={split}: no stage can begin with {unknown!r}, which is no block after the first: the nearest is {near!r}"
        )
    starts = [names.index(word, 1) for word in words]
    if any(first >= second for first, second in pairwise(starts)):
        ordered = ",".join(names[at] for at in sorted(set(starts)))
        raise PlanError(f"split={split} is not in the order in which the blocks run: {ordered} is")
    return [*starts, calls]


def _where(plan: Plan) -> str:
    return f"pp={plan.pp}" + (f" virtual={plan.virtual}" if plan.virtual > 1 else "")


def _fewer(plan: Plan, calls: int) -> str:
    """The nearest that works: the most stages, by fewer of them on each rank if the schedule takes that, or by fewer ranks."""
    ranks, virtual = calls // plan.virtual, calls // plan.pp
    if virtual and plan.virtual > 1 and (ranks < 2 or plan.pp * virtual >= ranks * plan.virtual):
        with contextlib.suppress(PlanError):
            check_counts(plan.schedule, plan.pp, virtual, plan.microbatches)
            return f"the nearest that works is pp={plan.pp} virtual={virtual}"
    if ranks > 1:
        return f"the nearest that works is pp={ranks}" + (f" virtual={plan.virtual}" if plan.virtual > 1 else "")
    return f"the nearest that works is pp={calls} with one stage on each rank" if calls > 1 else "it has no place to be cut"


def _least_memory(cells: Sequence[_Cell], stages: int, memory: Memory, limit: float) -> str:
    """Say how much the best cut for memory needs: the least possible largest stage, by the same dynamic programming."""
    least: list[list[float]] = [[math.inf] * (len(cells) + 1) for _ in range(stages + 1)]
    least[0][0] = 0
    for stage in range(stages):
        for last in range(stage + 1, len(cells) + 1):
            least[stage + 1][last] = min(max(least[stage][first], memory(stage, first, last)) for first in range(stage, last))
    needed = least[stages][len(cells)]
    return (
        f"no cut into {stages} stages fits {limit:.4g} bytes a stage: the nearest that works is {needed:.4g} bytes, or more stages"
    )
