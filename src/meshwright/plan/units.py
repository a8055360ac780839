"""What blocks, and the stages that are made of them, cost under one split of the work; the moments at which memory may be highest.

Here are the records that `predict.py` fills and `search.py` compares: nothing is priced in this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from meshwright.plan.footprint import Elements, UnitBytes
from meshwright.plan.recompute import Step
from meshwright.plan.time import Split, UnitTime


class Need(NamedTuple):
    """Bytes on a device besides activations at the moments that may be a step's peak: the loss, the first and the last of the
    blocks' backwards, and after them (then all bytes). And the room that is left on its host.
    """

    loss: float
    first: float
    last: float
    after: float
    room: float


class InFlight(NamedTuple):
    """Bytes kept for backward and how many of these leave; those beyond them at the loss and at the first of the blocks'
    backwards, and all there are at the last. Of those that leave, how many go to the host and to a disk.
    """

    kept: float
    movable: float
    loss: float
    first: float
    last: float
    host: float
    disk: float


class Kept(NamedTuple):
    """What a stage keeps of a micro-batch, in bytes: by blocks and what is before them; by the loss. What is alive beyond all that
    at the loss and at the first block's backward, and there anyway if what was kept is elsewhere. Two blocks' and what is before
    them; all that is alive at the last block's backward.
    """

    saved: float
    ends: float
    loss: float
    first: float
    alone: float
    two: float
    last: float


@dataclass(frozen=True)
class Stage:
    """What a rank of the pipeline holds: calls by block kind, and whether what runs before and after the blocks."""

    kinds: tuple[int, ...]
    before: bool
    after: bool
    later: tuple[tuple[int, ...], ...] = ()
    """For each kind, the calls by kind after its last one: what its backward finds freed."""


@dataclass(frozen=True)
class Base:
    """A schedule's part of a step: `span` seconds, itemised for the busiest rank in `cost`; that rank's stage, its `backward` and
    `busy` seconds per micro-batch, and the most parameters that any rank holds.
    """

    span: float
    cost: dict[str, float]
    most: Elements
    stage: Stage
    split: Split
    backward: float
    busy: float


@dataclass(frozen=True)
class Units:
    """What every unit costs under one split of the work: block kinds, then what runs before and after the blocks.

    `busy` and `saved` are filled by stage (its id: stages live as long as the pricer) as they are asked for.
    """

    times: list[UnitTime]
    sizes: list[UnitBytes]
    busy: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    """Seconds of a stage's forward, of its backward but for weights' gradients, and of these."""
    saved: dict[int, Kept] = field(default_factory=dict)
    steps: dict[int, list[Step]] = field(default_factory=dict)
    """Where these are of full recompute: what a budget takes for a stage, best first."""

    def time(self, stage: Stage) -> tuple[float, float, float]:
        """`busy` of a stage."""
        if id(stage) not in self.busy:
            f = b = w = 0.0
            counts = [*stage.kinds, int(stage.before), int(stage.after)]
            for unit, count in zip(self.times, counts, strict=True):
                if count:
                    f += count * unit.total_forward
                    b += count * (unit.total_backward - unit.weight)
                    w += count * unit.weight
            self.busy[id(stage)] = f, b, w
        return self.busy[id(stage)]

    def keep(self, stage: Stage) -> Kept:
        """`saved` of a stage."""
        found = self.saved.get(id(stage))
        if found is None:
            found = self.saved[id(stage)] = self._keep(stage)
        return found

    def _keep(self, stage: Stage) -> Kept:
        *blocks, before, after = self.sizes
        kept = alone = widest = last = 0.0
        first: float | None = None
        for size, count, later in zip(blocks, stage.kinds, stage.later, strict=True):
            if count:  # one pass: a search asks for hundreds of thousands
                working = size.working
                kept += count * size.kept
                alone, widest, last = max(alone, working), max(widest, size.kept), max(last, size.kept + working)
                for number, other in zip(later, blocks, strict=True):
                    if number:
                        working -= number * other.kept
                first = working if first is None or working > first else first
        outside = before.kept if stage.before else 0.0
        if stage.before:
            first = max(before.working - kept, before.working - kept if first is None else first)
        ends, loss, gone = (after.kept, after.working, after.ends) if stage.after else (0.0, 0.0, 0.0)
        return Kept(
            saved=kept + outside,
            ends=ends,
            loss=loss,
            first=(first or 0.0) - gone,
            alone=alone - gone,
            two=2 * widest + outside,
            last=outside + ends - gone + last,
        )
