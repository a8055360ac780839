"""What a plan will do to a model along `tp`, `sp`, `cp` and `pp`, without ranks: the cuts, the stages, every message's bytes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from meshwright.parallel.parameters import Parameter, collect
from meshwright.parallel.partitioned import Partition
from meshwright.parallel.pipelined import stage_ends
from meshwright.partition.program import Program
from meshwright.partition.stages import cut as cut_stages
from meshwright.partition.traffic import Transfer, transfers
from meshwright.plan import Plan
from meshwright.plan.orders import stage_ranks
from meshwright.plan.stages import GPU


@dataclass(frozen=True)
class StageView:
    """A pipeline stage on pipeline rank `rank`: its first and last block, its parameters' bytes (each tensor once), and what one
    micro-batch sends forward: (to stage, tensors, bytes).
    """

    stage: int
    rank: int
    first: str
    last: str
    parameter_bytes: int
    sends: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        """Return one line."""
        sends = ", ".join(f"{tensors} tensor{'s' * (tensors > 1)} ({size:,} bytes) to {to}" for to, tensors, size in self.sends)
        held = f"stage {self.stage} on rank {self.rank}: {self.first} to {self.last}, parameters of {self.parameter_bytes:,} bytes"
        return held + (f", sends {sends}" if sends else "")


@dataclass(frozen=True)
class Preview:
    """`cuts` is name -> (dim, elements on rank 0, elements in all), `transfers` one micro-batch's collectives of rank 0, `stages`
    those of the pipeline, if there is one.
    """

    plan: str
    cuts: dict[str, tuple[int, int, int]]
    whole: tuple[str, ...]
    notes: tuple[str, ...]
    transfers: tuple[Transfer, ...]
    stages: tuple[StageView, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return cuts and collectives as text, alike modules together."""
        lines = [f"plan {self.plan}"]
        patterns: Counter[tuple[str, int, int, int]] = Counter()
        for name, cut in self.cuts.items():
            patterns[_pattern(name), *cut] += 1
        lines += [f"  {times:>4} x {name}: dim {d}, {part} of {size}" for (name, d, part, size), times in patterns.items()]
        lines += [f"  whole: {', '.join(dict.fromkeys(map(_pattern, self.whole)))}"] if self.whole else []
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  {stage}" for stage in self.stages]
        lines += ["", f"{'axis':5}{'phase':10}{'collective':16}{'times':>6}{'bytes each':>14}  where"]
        groups = Counter((t.axis, t.phase, t.collective, t.bytes, _pattern(t.module)) for t in self.transfers)
        for (axis, phase, collective, size, where), times in groups.items():
            lines.append(f"{axis:5}{phase:10}{collective:16}{times:>6}{size:>14,}  {where or '(root)'}")
        total = sum(t.bytes for t in self.transfers)
        lines.append(f"{len(self.transfers)} collectives, {total:,} bytes for one micro-batch on each rank")
        return "\n".join(lines)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def preview(module: nn.Module, plan: Plan, function: Callable[[Any], Any], batch: Any) -> Preview:
    """Read `function(batch)` (the loss over the module, which may be on meta) as rank 0 of `plan` would run it.

    Raises `PlanError` where the plan can't be, in one sentence with the nearest degree that works.
    """
    table = collect(module)
    partition = Partition(module, table, plan, None)
    partition.choose(function, batch)
    cuts = {}
    for entry in table:
        found = next((partition.cuts.parameters[n] for n in entry.names if n in partition.cuts.parameters), None)
        if found is not None:
            cuts[entry.name] = (found[0], partition.axes["tp"].length(found[1]), entry.whole[found[0]])
    local = partition.local(function, batch, "loss")
    program = Program(local, module, frozenset(), torch.device("cpu"))
    whole = tuple(entry.name for entry in table if entry.name not in cuts)
    notes = list(partition.cuts.notes)
    stages = _stages(partition, plan, function, batch) if plan.pp > 1 else ()
    if stages and plan.dp_shard > 1 and plan.zero == 3:
        held = [sum(stage.parameter_bytes for stage in stages if stage.rank == rank) for rank in range(plan.pp)]
        notes.append(
            f"zero=3: a rank gathers its stages' parameters once a step, for its {plan.microbatches} micro-batches, and holds up "
            f"to {max(held):,} bytes of them until the update (without pp: one block's at a time)"
        )
    return Preview(str(plan), cuts, whole, tuple(notes), tuple(transfers(program)), stages)


def _stages(partition: Partition, plan: Plan, function: Callable[[Any], Any], batch: Any) -> tuple[StageView, ...]:
    traced = partition.traced(function, batch)
    ends = stage_ends(plan, traced, GPU)
    names = [call.name for call in traced.calls]
    entries = {name: entry for entry in partition.table for name in entry.names}
    found = []
    for piece, (first, last) in zip(cut_stages(partition.passed(traced, "loss"), ends), pairwise([0, *ends]), strict=True):
        held = {id(entries[name]): entries[name] for name in piece.parameters()}
        size = sum(_part_bytes(entry, partition) for entry in held.values())
        values = piece.trace.values
        sends = tuple(
            (to, len(sent), sum(math.prod(values[n].shape) * values[n].dtype.itemsize for n in sent))
            for to, sent in sorted(piece.targets.items())
        )
        rank = stage_ranks(plan.schedule, plan.pp, plan.virtual)[piece.stage]
        found.append(StageView(piece.stage, rank, names[first], names[last - 1], size, sends))
    return tuple(found)


def _part_bytes(entry: Parameter, partition: Partition) -> int:
    """Bytes of a parameter, or of rank 0's part of it."""
    size = entry.whole.numel() * entry.dtype.itemsize
    known = next((partition.cuts.parameters[n] for n in entry.names if n in partition.cuts.parameters), None)
    return size if known is None else size // entry.whole[known[0]] * partition.axes["tp"].length(known[1])
