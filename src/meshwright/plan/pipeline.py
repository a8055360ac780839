"""What a pipeline schedule costs: the time of a step from its stages' times, and how many micro-batches a rank keeps.

Closed forms, each with its source, held to the simulator of the executor's own lists (`simulate.py`); a search has no time for it.
Times are seconds of one micro-batch on one rank, all its virtual stages together.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.errors import PlanError

VIRTUAL = ("interleaved", "looped_bfs")
"""Schedules whose ranks hold several stages round-robin."""
V_SHAPED = ("zbv", "dualpipev")
"""Schedules whose ranks hold two stages, down and up again."""


def chunks(schedule: str, virtual: int) -> int:
    """Stages on each rank."""
    return 2 if schedule in V_SHAPED else virtual if schedule in VIRTUAL else 1


def owner(schedule: str, stages: int, chunk: int, rank: int) -> int:
    """The index, along the model, of a rank's `chunk`-th stage."""
    return (rank if chunk == 0 else 2 * stages - 1 - rank) if schedule in V_SHAPED else rank + chunk * stages


def check(schedule: str, stages: int, virtual: int, micro: int, layers: int) -> None:
    """Raise `PlanError` for a combination that the schedule can't run; the message names the nearest that it can."""
    if virtual > 1 and schedule not in (*VIRTUAL, *V_SHAPED):
        raise PlanError(f"virtual={virtual} needs schedule=interleaved or looped_bfs, not {schedule}")
    held = chunks(schedule, virtual)
    if stages * held > layers + 2:  # what runs before and after the blocks may be stages of its own
        raise PlanError(f"pp={stages} with {held} stages a rank needs {stages * held} blocks, but the model has {layers}")
    if schedule == "interleaved" and stages > 1 and micro % stages and micro > stages:
        near = max(stages, round(micro / stages) * stages)
        raise PlanError(f"microbatches={micro} must be a multiple of pp={stages} for interleaved: the nearest is {near}")


def step(
    schedule: str, virtual: int, micro: int, forward: Sequence[float], backward: Sequence[float], weight: Sequence[float]
) -> float:
    """Seconds from the first forward to the last backward; lists by rank, `backward` without the weights' gradients.

    1F1B and GPipe fill and drain once over all stages (arXiv:1811.06965, 2006.09503); v virtual stages divide that by v
    (2104.04473); zero-bubble schedules fill it with the weights' gradients (2401.10241, 2405.15362), as far as the lists that the
    executor runs do. For equal stages the result is the simulator's (tests/plan/test_closed_forms.py).
    """
    ranks = len(forward)
    whole = [f + b + w for f, b, w in zip(forward, backward, weight, strict=True)]
    busiest = max(whole)
    if ranks == 1:
        return micro * busiest
    if schedule == "layerwise":
        return micro * sum(whole)
    fill = sum(whole) - busiest
    heaviest = whole.index(busiest)
    f, b, w = forward[heaviest], backward[heaviest], weight[heaviest]
    if schedule in VIRTUAL:
        fill /= virtual
        if micro % ranks and micro > ranks:
            fill += (ranks - micro % ranks) / virtual * busiest * 0.5
    elif schedule == "zero_bubble":
        fill = min(fill, (ranks - 1) * max(0.0, f + b - w))
    elif schedule == "zbv":
        fill = min(fill, (ranks - 1) * max(f, b) / 2)
    elif schedule == "dualpipev":
        fill = min(fill, (ranks - 1) * max(0.0, f + b - w) / 2)
    elif schedule == "gpipe":  # the slowest stage of each pass need not be the same
        backwards = [b + w for b, w in zip(backward, weight, strict=True)]
        return sum(forward) + sum(backwards) + (micro - 1) * (max(forward) + max(backwards))
    return micro * busiest + fill


def in_flight(schedule: str, virtual: int, stages: int, micro: int, rank: int) -> float:
    """Micro-batches whose activations a rank holds at once, in units of all its stages (a chunk counts 1 / chunks)."""
    if stages == 1:
        return 1.0
    if schedule in ("gpipe", "looped_bfs"):
        return float(micro)
    if schedule == "layerwise":
        return 1.0
    if schedule == "interleaved" and virtual > 1:
        warm = (stages - rank - 1) * 2 + (virtual - 1) * stages + 1
        return min(warm, micro * virtual) / virtual
    if schedule in ("zbv", "zero_bubble"):  # what a weight's gradient needs stays until it is computed
        return float(min(micro, stages))
    if schedule == "dualpipev":
        return float(min(micro, stages + 0.5))
    return float(min(micro, stages - rank))


def all_forward(schedule: str, stages: int) -> bool:
    """Whether every micro-batch's loss is there before the first backward."""
    return stages > 1 and schedule in ("gpipe", "looped_bfs")
