"""What a plan will do to a model along `tp`, `sp` and `cp`, without ranks: the cuts, and every collective with its bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from meshwright.parallel.parameters import collect
from meshwright.parallel.partitioned import Partition
from meshwright.partition.program import Program
from meshwright.partition.traffic import Transfer, transfers
from meshwright.plan import Plan


@dataclass(frozen=True)
class Preview:
    """`cuts` is name -> (dim, elements on rank 0, elements in all), `transfers` one micro-batch's collectives of rank 0."""

    plan: str
    cuts: dict[str, tuple[int, int, int]]
    whole: tuple[str, ...]
    notes: tuple[str, ...]
    transfers: tuple[Transfer, ...]

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
    return Preview(str(plan), cuts, whole, tuple(partition.cuts.notes), tuple(transfers(program)))
