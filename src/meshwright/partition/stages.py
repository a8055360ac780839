"""A trace cut into pipeline stages: what each stage runs, what it gets from earlier stages and gives to later ones.

An op in a block's call runs on the call's stage; those between the calls on either side of a cut are divided where the fewest
bytes are alive (a residual is added before it is sent). Whatever follows from the batch, buffers and constants alone is not
sent: every stage that reads it computes it. What else is read on a later stage goes there directly, also over stages in between
(skip connections, an encoder's output).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from meshwright._torch import is_in_place
from meshwright.blueprint.tape import Ref
from meshwright.partition.arguments import is_random, writes
from meshwright.partition.local import KeepSlice
from meshwright.partition.trace import Guard, Trace, TracedOp, is_opaque

Edge: TypeAlias = tuple[int, int]


@dataclass
class Piece:
    """One stage of a trace. `trace` runs on the batch's tensors followed by `taken`; it returns `given`, then what the whole
    function returned if this is the last stage.

    `taken` and `given` are numbers of values; `sources[s]` are those taken from stage s, `targets[t]` those given to stage t,
    `graded` those through which gradients go back.
    """

    stage: int
    trace: Trace
    taken: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    sources: dict[int, list[int]] = field(default_factory=dict)
    targets: dict[int, list[int]] = field(default_factory=dict)
    graded: frozenset[int] = frozenset()

    def parameters(self) -> set[str]:
        """Names of the parameters that this stage reads."""
        return set(self.trace.parameters.values())


def edges(pieces: Sequence[Piece]) -> tuple[tuple[Edge, ...], tuple[Edge, ...]]:
    """Return the (earlier, later) stages between which values go, and those between which gradients come back."""
    forward = [(piece.stage, target) for piece in pieces for target in sorted(piece.targets)]
    back = [edge for edge in forward if set(pieces[edge[0]].targets[edge[1]]) & pieces[edge[0]].graded]
    return tuple(sorted(forward)), tuple(sorted(back))


def cut(trace: Trace, ends: Sequence[int]) -> list[Piece]:
    """Cut a trace after calls `ends[0]`, `ends[1]`, ... (the last is the number of calls), into as many pieces.

    Ops that nothing needs are left out.
    """
    free = _derived_from_inputs(trace)
    place = _places(trace, ends, free)
    graded = trace.graded()
    home: dict[int, int] = {}
    for op, stage in zip(trace.ops, place, strict=True):
        home.update(dict.fromkeys((n for n in op.outputs if n not in free), stage))
    pieces = [Piece(stage, Trace(calls=trace.calls, sequence=trace.sequence)) for stage in range(len(ends))]
    wanted: list[set[int]] = [set() for _ in ends]
    wanted[-1].update(n for n in trace.output_numbers())
    for stage in range(len(ends) - 1, -1, -1):
        for number in _collect(trace, pieces[stage], wanted[stage], place, free, home):
            wanted[home[number]].add(number)
            pieces[home[number]].targets.setdefault(stage, []).append(number)
            pieces[stage].sources.setdefault(home[number], []).append(number)
    for piece in pieces:
        _complete(trace, piece, graded)
    pieces[-1].trace.outputs = ([Ref(number) for number in pieces[-1].given], trace.outputs)
    return pieces


def _places(trace: Trace, ends: Sequence[int], free: set[int]) -> list[int]:
    """Return the stage of every op: each cut falls between the calls on its sides, where the fewest bytes are alive."""
    made = {n: at for at, op in enumerate(trace.ops) for n in op.outputs if n not in free}
    read: dict[int, int] = dict.fromkeys(trace.output_numbers(), len(trace.ops))
    needed = set(read)
    for at in range(len(trace.ops) - 1, -1, -1):
        op = trace.ops[at]
        if needed & set(op.outputs) or _changes(op):
            needed.update(op.inputs)
            for number in op.inputs:
                read.setdefault(number, at)
    cuts = []
    for end in ends[:-1]:
        first = max((at for at, op in enumerate(trace.ops) if 0 <= op.call < end), default=-1) + 1
        last = next((at for at in range(first, len(trace.ops)) if trace.ops[at].call >= end), len(trace.ops))
        alive = {
            at: sum(_bytes(trace, n) for n, when in made.items() if when < at <= read.get(n, -1)) for at in range(first, last + 1)
        }
        cuts.append(min(alive, key=lambda at: (alive[at], at)))
    return [sum(at >= cut for cut in cuts) for at in range(len(trace.ops))]


def _bytes(trace: Trace, number: int) -> int:
    value = trace.values[number]
    return math.prod(value.shape) * value.dtype.itemsize


def _derived_from_inputs(trace: Trace) -> set[int]:
    """Values that any stage can compute for itself: from the batch, constants and unwritten buffers, without random numbers."""
    written = {n for op in trace.ops if _changes(op) for n in op.inputs}
    free = {*trace.inputs, *trace.constants, *trace.buffers} - written
    for op in trace.ops:
        if _changes(op) or is_random(op.func) or is_opaque(op) or not set(op.inputs) <= free or set(op.outputs) & written:
            continue
        free.update(op.outputs)
    return free


def _changes(op: TracedOp) -> bool:
    return isinstance(op.func, KeepSlice) or writes(op.func) or (hasattr(op.func, "_schema") and is_in_place(op.func))


def _collect(trace: Trace, piece: Piece, wanted: set[int], place: list[int], free: set[int], home: dict[int, int]) -> list[int]:
    """Give the piece the ops that it has to run for what is wanted of it; return the values that it needs from earlier stages."""
    state = {*trace.parameters, *trace.buffers, *trace.inputs, *trace.constants}
    needed, kept = set(wanted), []
    for op, stage in zip(reversed(trace.ops), reversed(place), strict=True):
        everywhere = bool(op.outputs) and set(op.outputs) <= free
        guards = isinstance(op.func, Guard) and (stage == piece.stage or set(op.inputs) <= free)
        acts = stage == piece.stage and _changes(op)
        mine = everywhere or stage == piece.stage
        if guards or acts or (mine and needed & set(op.outputs)):
            kept.append(op)
            needed.update(op.inputs)
    piece.trace.ops = kept[::-1]
    made = {n for op in kept for n in op.outputs}
    return sorted(n for n in needed - made - state if home[n] != piece.stage)


def _complete(trace: Trace, piece: Piece, graded: set[int]) -> None:
    """Fill in the piece's values: what it reads of the model, and received values as inputs after the batch's own."""
    piece.taken = sorted({n for numbers in piece.sources.values() for n in numbers})
    piece.given = sorted({n for numbers in piece.targets.values() for n in numbers})
    piece.graded = frozenset(graded & {*piece.taken, *piece.given})
    read = {n for op in piece.trace.ops for n in op.inputs} | {*piece.given, *trace.output_numbers()}
    local = piece.trace
    local.parameters = {n: name for n, name in trace.parameters.items() if n in read}
    local.buffers = {n: name for n, name in trace.buffers.items() if n in read}
    local.constants = {n: tensor for n, tensor in trace.constants.items() if n in read}
    local.inputs = dict(trace.inputs) | {number: len(trace.inputs) + at for at, number in enumerate(piece.taken)}
    local.values = list(trace.values)
    for number in piece.taken:
        local.values[number] = replace(trace.values[number], needs_gradient=number in graded)
    local.outputs = ([Ref(number) for number in piece.given], None)
