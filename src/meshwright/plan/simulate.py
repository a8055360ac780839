"""What a schedule takes: seconds, bubble and bytes in flight, from the cost of each stage and the schedule's own action list.

Every rank computes one thing at a time; messages travel beside the computing, between two ranks one at a time in each direction,
and start when the tensor is made and the other end has asked for it. For equal stages and free messages the bubble equals the
closed forms, exactly if the costs are fractions, to the last bit if they are whole numbers: GPipe and 1F1B (P - 1) / (m + P - 1)
(arXiv:1811.06965, arXiv:1806.03377), interleaved (P - 1) / (V m + P - 1) (arXiv:2104.04473; tests/plan/test_simulate.py).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from meshwright.errors import PlanError
from meshwright.plan.lowering import Edge, Neighbours, direction
from meshwright.plan.schedule import Action, Schedule

_Done: TypeAlias = tuple[int, str, int, int]


@dataclass(frozen=True)
class StageCost:
    """What one micro-batch costs on one stage: seconds of forward, input gradients and weight gradients, and bytes kept.

    `saved_bytes` are kept from F until the backward; where that is split, `held_bytes` of them (default: all) stay from I to W,
    and may be more than what was saved: output gradients wait there too. `backward_s` is what both gradients take at once, where
    that differs from their sum.
    """

    forward_s: float = 1
    input_gradient_s: float = 1
    weight_gradient_s: float = 1
    saved_bytes: float = 1
    held_bytes: float | None = None
    backward_s: float | None = None

    def seconds(self, kind: str, at_once: bool = False) -> float:
        """Seconds of a computation of this kind (F, B, I or W); `at_once`: with a W that follows its I, in one backward."""
        whole = self.input_gradient_s + self.weight_gradient_s if self.backward_s is None else self.backward_s
        if kind == "B":
            return whole
        if kind == "W" and at_once:
            return whole - self.input_gradient_s
        return {"F": self.forward_s, "I": self.input_gradient_s, "W": self.weight_gradient_s}[kind]

    def bytes_after(self, kind: str) -> float:
        """Bytes in flight that a computation of this kind adds when it is done (negative: frees)."""
        held = self.saved_bytes if self.held_bytes is None else self.held_bytes
        return {"F": self.saved_bytes, "B": -self.saved_bytes, "I": held - self.saved_bytes, "W": -held}[kind]


@dataclass(frozen=True)
class Span:
    """One computation of a rank, from `start_s` to `end_s`, in seconds since the step began."""

    rank: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """A simulated step. `bubble_fraction` is the idle share of all ranks' time; `peak_bytes` is by stage, `rank_peak_bytes` the
    most that a rank's stages hold together (their peaks need not fall into one moment).
    """

    step_s: float
    bubble_fraction: float
    busy_s: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    rank_peak_bytes: tuple[float, ...]
    spans: tuple[Span, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; spans as [rank, action, start, end]."""
        spans = [[span.rank, str(span.action), float(span.start_s), float(span.end_s)] for span in self.spans]
        return asdict(self) | {"spans": spans}


def simulate(
    schedule: Schedule, costs: Sequence[StageCost] | StageCost | None = None, transfer_s: float | Mapping[Edge, float] = 0
) -> Simulation:
    """Run the schedule's lists on paper.

    `costs` is one `StageCost` per stage, or one for all (default: a second for each of F, I and W, one byte). `transfer_s` are
    the seconds of one message, or those of each (earlier stage, later stage), both ways. Raises `PlanError` for a wrong number
    of costs.
    """
    if costs is None or isinstance(costs, StageCost):
        costs = [costs or StageCost()] * schedule.stages
    if len(costs) != schedule.stages:
        raise PlanError(f"{len(costs)} stage costs for {schedule.stages} stages: give one cost, or {schedule.stages}")
    spans = _Run(schedule, costs, transfer_s).run()
    step = max(span.end_s for span in spans)
    busy = [sum(span.end_s - span.start_s for span in spans if span.rank == rank) for rank in range(schedule.ranks)]
    bubble = (schedule.ranks * step - sum(busy)) / (schedule.ranks * step) if step else 0
    stage_peaks, rank_peaks = in_flight_bytes(schedule, costs)
    return Simulation(
        step, bubble, tuple(busy), stage_peaks, rank_peaks, tuple(sorted(spans, key=lambda span: (span.rank, span.start_s)))
    )


def in_flight_bytes(schedule: Schedule, costs: Sequence[StageCost]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the peak bytes that each stage keeps for its backwards, and each rank in all; the order alone decides them."""
    peaks = [0.0] * schedule.stages
    rank_peaks = []
    for rank in range(schedule.ranks):
        now: defaultdict[int, float] = defaultdict(int)
        most: float = 0
        for action in schedule.computations(rank):
            now[action.stage] += costs[action.stage].bytes_after(action.kind)
            peaks[action.stage] = max(peaks[action.stage], now[action.stage])
            most = max(most, sum(now.values()))
        rank_peaks.append(most)
    return tuple(peaks), tuple(rank_peaks)


class _Run:
    """The ranks' places in their lists, the messages on their way, and when everything so far was done."""

    def __init__(self, schedule: Schedule, costs: Sequence[StageCost], transfer_s: float | Mapping[Edge, float]) -> None:
        self.schedule, self.costs, self.transfer_s = schedule, costs, transfer_s
        self.owners = schedule.stage_ranks
        self.at_once = [schedule.at_once(rank) for rank in range(schedule.ranks)]
        self.near = Neighbours(schedule.edges, schedule.gradients)
        self.clock: list[float] = [0] * schedule.ranks
        self.position = [0] * schedule.ranks
        self.done: dict[_Done, float] = {}  # (stage, F or B, micro-batch, -1 or receiving stage) -> when
        self.posted: dict[tuple[int, str, int, int], float] = {}  # (sending stage, F or B, micro-batch, receiving stage) -> when
        self.link_free: defaultdict[tuple[int, int], float] = defaultdict(int)
        self.spans: list[Span] = []

    def run(self) -> list[Span]:
        """Go on with any rank that can, until all are done; the lists were checked, so they all get there."""
        runnable = deque(range(self.schedule.ranks))
        while runnable:
            rank = runnable.popleft()
            row = self.schedule.actions[rank]
            while self.position[rank] < len(row) and self._step(rank, row[self.position[rank]], runnable):
                self.position[rank] += 1
        return self.spans

    def _step(self, rank: int, action: Action, runnable: deque[int]) -> bool:
        stage, kind, microbatch, peer = action
        way = kind[-1] if peer >= 0 else direction(kind)
        if peer >= 0:
            ends = (stage, peer) if kind[0] == "S" else (peer, stage)
            self._post((ends[0], way, microbatch, ends[1]), self.clock[rank], runnable)
            return True
        start = self.clock[rank]
        for source in self.near.sources[way, stage]:
            when = self.done.get((source, way, microbatch, -1 if self.owners[source] == rank else stage))
            if when is None:
                return False
            start = max(start, when)
        end = start + self.costs[stage].seconds(kind, (stage, microbatch) in self.at_once[rank])
        self.clock[rank] = end
        self.spans.append(Span(rank, action, start, end))
        if kind != "W":
            self.done[stage, way, microbatch, -1] = end
        return True

    def _post(self, message: _Done, now: float, runnable: deque[int]) -> None:
        """One end is ready at `now`; when both are, the message goes as soon as its link is free."""
        if message not in self.posted:
            self.posted[message] = now
            return
        sender, way, _, receiver = message
        link = (self.owners[sender], self.owners[receiver])
        edge = (sender, receiver) if way == "F" else (receiver, sender)
        seconds = self.transfer_s[edge] if isinstance(self.transfer_s, Mapping) else self.transfer_s
        arrives = max(self.posted.pop(message), now, self.link_free[link]) + seconds
        self.link_free[link] = self.done[message] = arrives
        if link[1] not in runnable:
            runnable.append(link[1])
