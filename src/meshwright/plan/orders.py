"""In which order each rank of a pipeline computes: one rule per schedule, as lists of (stage, kind, micro-batch).

Kinds are those of `torch.distributed.pipelining`: F forward, B whole backward, I input gradient, W weight gradient. Where torch
has the schedule and takes the counts, the lists equal torch's (tests/plan/test_orders.py); where the mathematics allows more
(any number of micro-batches under 1f1b, uneven rounds under interleaved and zero_bubble) so do these. What is sent when is
`lowering.py`'s business, what it costs `simulate.py`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from meshwright.errors import PlanError

SCHEDULES = ("1f1b", "gpipe", "interleaved", "looped_bfs", "zero_bubble", "zbv", "dualpipev", "layerwise")
"""The names that `schedule=` takes."""

SPLIT_BACKWARD = ("zero_bubble", "zbv", "dualpipev")
"""Schedules that compute input gradients and weight gradients apart."""

_V_SHAPED = ("zbv", "dualpipev")
_ONE_STAGE = ("1f1b", "gpipe", "layerwise")


class Compute(NamedTuple):
    """One computation: `kind` is F, B, I or W; `stage` counts over the whole pipeline."""

    stage: int
    kind: str
    microbatch: int


def check_counts(name: str, ranks: int, virtual: int, microbatches: int) -> None:
    """Raise `PlanError`, naming the nearest legal value, if the schedule can't run `virtual` stages on each of `ranks` ranks."""
    if name in _V_SHAPED and virtual != 2:
        raise PlanError(
            f"virtual={virtual}: schedule={name} folds two stages onto each rank, so the nearest that works is virtual=2"
        )
    if name in _ONE_STAGE and virtual != 1:
        other = "" if name == "layerwise" else f" (or schedule={'looped_bfs' if name == 'gpipe' else 'interleaved'})"
        raise PlanError(
            f"virtual={virtual}: schedule={name} has one stage on each rank, so the nearest that works is virtual=1{other}"
        )
    if name == "layerwise" and microbatches != 1:
        raise PlanError(
            f"microbatches={microbatches}: schedule=layerwise sends the whole batch through the stages, so the nearest that works "
            "is microbatches=1 (or schedule=gpipe)"
        )
    if name == "dualpipev" and microbatches < 2 * ranks:
        raise PlanError(
            f"microbatches={microbatches}: schedule=dualpipev fills {2 * ranks} stages from both ends, so the nearest that works "
            f"is microbatches={2 * ranks} (or schedule=zbv)"
        )


def stage_ranks(name: str, ranks: int, virtual: int) -> tuple[int, ...]:
    """Return the rank of every stage: in loops (stage s on rank s mod P), or there and back for the V-shaped schedules."""
    if name in _V_SHAPED:
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(range(ranks)) * virtual


def compute_orders(name: str, ranks: int, virtual: int, microbatches: int) -> tuple[list[Compute], ...]:
    """Return what each rank computes, in order. Raises `PlanError` for counts that `check_counts` refuses."""
    check_counts(name, ranks, virtual, microbatches)
    if name in _V_SHAPED:
        program = _zbv if name == "zbv" else _dualpipev
        return tuple(_folded(program, rank, ranks, microbatches) for rank in range(ranks))
    return tuple(_looped(name, rank, ranks, virtual, microbatches) for rank in range(ranks))


def _rounds(name: str, ranks: int, microbatches: int) -> list[range]:
    """Micro-batches that pass a rank's stages together: at least `ranks` of them where there are as many, the longer rounds first.

    A rank returns to its first stage after one round; a round shorter than the pipeline would find its input not there yet.
    """
    count = max(1, microbatches // ranks) if name in ("interleaved", "zero_bubble") else 1
    size, longer = divmod(microbatches, count)
    starts = [number * size + min(number, longer) for number in range(count + 1)]
    return [range(first, last) for first, last in pairwise(starts)]


def _looped(name: str, rank: int, ranks: int, virtual: int, microbatches: int) -> list[Compute]:
    """Schedules whose stages go round the ranks: `warmup` forwards, then one forward and one backward in turn, then backwards.

    Sources: GPipe arXiv:1811.06965, 1F1B arXiv:1806.03377, interleaved arXiv:2104.04473, looped BFS arXiv:2211.05953,
    zero bubble (ZB-H1) arXiv:2401.10241. Zero bubble's weight gradients follow their input gradients `rank` steps later.
    """
    rounds = _rounds(name, ranks, microbatches)
    stages = [rank + loop * ranks for loop in range(virtual)]
    forwards = [(stage, m) for each in rounds for stage in stages for m in each]
    turn = -1 if name == "looped_bfs" else 1
    backwards = [(stage, m) for each in rounds for stage in reversed(stages) for m in each[::turn]]
    behind = ranks - 1 - rank
    ahead = (virtual - 1) * len(rounds[0])
    warmup = {"1f1b": behind, "interleaved": ahead + 2 * behind, "zero_bubble": ahead + behind}.get(name, len(forwards))
    warmup = min(warmup, len(forwards))
    kind, lag = ("I", rank) if name == "zero_bubble" else ("B", len(backwards))
    order = [Compute(stage, "F", m) for stage, m in forwards[:warmup]]
    for number, (stage, m) in enumerate(backwards):
        if warmup + number < len(forwards):
            ahead_stage, ahead_m = forwards[warmup + number]
            order.append(Compute(ahead_stage, "F", ahead_m))
        order.append(Compute(stage, kind, m))
        if kind == "I" and number >= lag:
            order.append(Compute(backwards[number - lag][0], "W", backwards[number - lag][1]))
    if kind == "I":
        order += [Compute(stage, "W", m) for stage, m in backwards[max(0, len(backwards) - lag) :]]
    return order


_Program = Sequence[tuple[int, str]]
"""(times, what to do that often): `Fa` forward of the rank's first stage, `Fb` of its second, `W` the oldest one due."""


def _zbv(rank: int, ranks: int, microbatches: int) -> _Program:
    """ZB-V of arXiv:2401.10241, section 6, for at least 2P - 1 micro-batches: no bubble where F, I and W take equally long."""
    after = ranks - 1 - rank
    return (
        (2 * after + 1, "Fa"),
        (rank, "Fb Fa"),
        (after + 1, "Fb Ib Wb"),
        (microbatches - 2 * ranks + 1 + rank, "Fa Ia Wa Fb Ib Wb"),
        (after, "Ia Wa Fb Ib Wb"),
        (rank, "Ia Ib"),
        (after + 1, "Ia Wa"),
        (rank, "Wb"),
        (rank, "Wa"),
    )


def _dualpipev(rank: int, ranks: int, microbatches: int) -> _Program:
    """DualPipeV of DeepSeek (arXiv:2412.19437, folded to a V), for at least 2P micro-batches.

    Near the end whole backwards give way to input gradients: of the 2 (rank + 1) that remain on both stages, the later half.
    """
    after = ranks - 1 - rank
    whole, odd = divmod(rank + 1, 2)
    return (
        (2 * after, "Fa"),
        (rank + 1, "Fa Fb"),
        (after, "Ib W Fb"),
        (microbatches - 2 * ranks + rank + 1, "Fa Bb Fb Ba"),
        (after, "Bb Fb Ba"),
        (whole, "Bb Ba"),
        (odd, "Bb Ia"),
        (whole, "Ib Ia"),
        (after, "W Ia"),
        (rank + 1, "W"),
    )


def _folded(program: Callable[[int, int, int], _Program], rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """Run a program with counters. Micro-batches that it counts beyond those there are left out: order is all that remains."""
    steps: _Program = program(rank, ranks, max(microbatches, 2 * ranks - 1))
    stage_of = {"a": rank, "b": 2 * ranks - 1 - rank}
    counters: defaultdict[tuple[str, int], int] = defaultdict(int)
    due: list[tuple[int, int]] = []
    order: list[Compute] = []
    for token in (token for times, tokens in steps for _ in range(times) for token in tokens.split()):
        kind, stage = token[0], stage_of.get(token[1:], -1)
        if kind == "W":
            entry = next(entry for entry in due if stage in (-1, entry[0]))
            due.remove(entry)
            stage, microbatch = entry
        else:
            side = (kind if kind == "F" else "B", stage)
            microbatch = counters[side]
            counters[side] += 1
            if kind == "I":
                due.append((stage, microbatch))
        if microbatch < microbatches:
            order.append(Compute(stage, kind, microbatch))
    return order
