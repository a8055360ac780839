"""Which parameters tensor parallelism cuts, and along what: the regions of a traced model at a given degree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from meshwright.blueprint import costs
from meshwright.blueprint.moves import Label
from meshwright.blueprint.record import Region, Split
from meshwright.blueprint.regions import find
from meshwright.errors import PlanError
from meshwright.partition.arguments import writes
from meshwright.partition.state import Axis
from meshwright.partition.trace import Guard, Trace, TracedOp, is_opaque


@dataclass
class Cuts:
    """`parameters` that are cut, by name: (dim, label); `regions` used; `notes` on what stays whole or is cut unevenly."""

    parameters: dict[str, tuple[int, Label]] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(trace: Trace, axis: Axis, held: frozenset[str] = frozenset()) -> Cuts:
    """Return the cuts for an axis; parameters `held` stay whole.

    Raises `PlanError` with the nearest degree that works if nothing, or attention, can't be cut.
    """
    whole = written_parameters(trace) | held
    regions = [region for region in find_regions(trace) if not (whole & _names(region) or _is_positions(trace, region))]
    if not regions:
        raise PlanError(f"{axis.name}={axis.size}: no weight of this model can be split over ranks: leave {axis.name} out")
    found = Cuts()
    refused: list[str] = []
    for region in regions:
        usable = region if _fits(region, axis) else _with_whole_keys(trace, region, axis)
        if usable is None:
            first = (*region.columns, *region.rows)[0].tensor
            near = nearest(region.units, axis.size)
            what = f"{axis.name}={axis.size} does not divide the {region.units} {_units(region)} of {first}"
            if region.attention:
                raise PlanError(f"{what}: the nearest that works is {axis.name}={near}")
            refused.append(f"{what}: it stays whole ({axis.name}={near} would split it)")
            continue
        found.regions.append(usable)
        for split in (*usable.columns, *usable.rows, *usable.vectors):
            found.parameters[split.tensor] = (split.dim, Label(split.repeat, split.segments))
            if not axis.divides(Label(split.repeat, split.segments)):
                size, part = split.segments[0], -(-split.segments[0] // axis.size)
                last = size - part * (axis.size - 1)
                found.notes.append(f"{split.tensor}: {size} rows are cut unevenly, {part} on each rank and {last} on the last")
    if not found.parameters:
        raise PlanError(refused[0].replace(": it stays whole", ": no weight can be split"))
    found.notes += refused
    return found


def _is_positions(trace: Trace, region: Region) -> bool:
    """A table looked up by something else than the batch (positions): small, and the same rows on every rank at once."""
    if region.kind != "embedding" or len(region.columns) + len(region.rows) > 1:
        return False
    given = set(trace.inputs)
    for op in trace.ops:
        if any(n in given for n in op.inputs):
            given.update(op.outputs)
    op = _ops(trace)[region.ops[0]]
    return op.inputs[1] not in given


def _ops(trace: Trace) -> list[TracedOp]:
    """The ops that regions are found among, and count."""
    return [op for op in trace.ops if not is_opaque(op) and not isinstance(op.func, Guard)]


def find_regions(trace: Trace) -> list[Region]:
    """The regions of a whole trace."""
    values = list(trace.values)
    for op in filter(is_opaque, trace.ops):
        for number in op.outputs:  # as something that another block made
            values[number] = replace(values[number], producer=-2)
    return find(_ops(trace), values, trace.output_numbers(), open_ended=True).regions


def written_parameters(trace: Trace) -> set[str]:
    """Names of parameters that the model writes to as it runs (a table whose rows are kept short): these stay whole."""
    written = {trace.values[op.inputs[0]].storage for op in trace.ops if op.inputs and writes(op.func)}
    return {name for number, name in trace.parameters.items() if trace.values[number].storage in written}


def _names(region: Region) -> set[str]:
    return {split.tensor for split in (*region.columns, *region.rows, *region.vectors)}


def _fits(region: Region, axis: Axis) -> bool:
    if region.units % axis.size == 0:
        return True
    splits = (*region.columns, *region.rows, *region.vectors)
    plain = region.kind in ("embedding", "head") and not region.attention
    return plain and all(axis.can_cut(Label(split.repeat, split.segments)) for split in splits)


def _with_whole_keys(trace: Trace, region: Region, axis: Axis) -> Region | None:
    """Grouped-query attention with fewer key heads than ranks: keys and values stay whole, queries and results are cut."""
    if not region.attention or axis.size % region.units or len(region.columns) < 2:
        return None
    sizes = {split.tensor: sum(split.segments) * split.repeat for split in region.columns}
    largest = max(sizes.values())
    if len(set(sizes.values())) < 2 or any(len(split.segments) > 1 for split in region.columns):
        return None
    heads = _query_heads(trace, region)
    if not heads or heads % axis.size:
        return None

    def stays(split: Split) -> bool:
        return sum(split.segments) * split.repeat == largest

    columns, vectors = tuple(filter(stays, region.columns)), tuple(filter(stays, region.vectors))
    return replace(region, units=heads, columns=columns, vectors=vectors)


def _query_heads(trace: Trace, region: Region) -> int:
    """Heads of the queries: the size of the head dim of the region's attention, or of its scores; 0 if they have none."""
    ops = _ops(trace)
    for place in region.ops:
        op = ops[place]
        shape = trace.values[op.inputs[0]].shape if op.inputs else ()
        if costs.kind_of(op.func) == "attention" or costs.base_name(op.func) in ("_softmax", "_safe_softmax"):
            return shape[1] if len(shape) == 4 else 0
    return 0


def _units(region: Region) -> str:
    return "heads" if region.attention else "units"


def nearest(units: int, wanted: int) -> int:
    """The divisor of `units` that is nearest to `wanted` (the larger one of two)."""
    divisors = [d for d in range(1, units + 1) if units % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), -d))
