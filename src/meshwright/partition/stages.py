"""A trace cut into pipeline stages: what each stage runs, what it gets from earlier stages and gives to later ones.

An op in a block's call runs on the call's stage; those between the calls on either side of a cut are divided where the fewest
bytes are alive (a residual is added before it is sent). Whatever follows from the batch, buffers and constants alone is not
sent: every stage that reads it computes it. What else is read on a later stage goes there directly, also over stages in between
(skip connections, an encoder's output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn

from meshwright import _torch
from meshwright.blueprint.tape import Ref
from meshwright.errors import ModelError
from meshwright.partition.arguments import is_random, writes
from meshwright.partition.local import KeepSlice
from meshwright.partition.trace import Guard, Trace, TracedOp, is_opaque

Edge: TypeAlias = tuple[int, int]


@dataclass
class Piece:
    """One stage of a trace. `trace` runs on the batch's tensors followed by `taken`; it returns `given`, then what the whole
    function returned if this is the last stage.

    `taken` and `given` are numbers of values; `sources[s]` are those taken from stage s, `targets[t]` those given to stage t,
    `graded` those through which gradients go back. `copied` are given ones in memory that the next micro-batch writes to.
    """

    stage: int
    trace: Trace
    taken: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    sources: dict[int, list[int]] = field(default_factory=dict)
    targets: dict[int, list[int]] = field(default_factory=dict)
    graded: frozenset[int] = frozenset()
    copied: frozenset[int] = frozenset()

    def parameters(self) -> set[str]:
        """Names of the parameters that this stage reads."""
        return {*self.trace.parameters.values(), *self._inside(nn.Module.named_parameters)}

    def buffers(self) -> set[str]:
        """Names of the buffers that this stage reads."""
        return {*self.trace.buffers.values(), *self._inside(nn.Module.named_buffers)}

    def _inside(self, named: Callable[..., Iterable[tuple[str, Any]]]) -> Iterator[str]:
        """Names of what modules that run as they are hold."""
        for op in self.trace.ops:
            if is_opaque(op):
                yield from (name for name, _ in named(op.func.module, prefix=op.func.path, remove_duplicate=False))


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


def refuse_shared_memory(trace: Trace, ends: Sequence[int]) -> None:
    """Raise `ModelError` where one stage would read what another writes in place, and sending values can't make it so.

    A buffer may be written by one stage only, and be read on later ones only through what came of the write; and Python, which
    runs on every rank, must not decide by it, for only that stage's rank has its value. A tensor made on an earlier stage may be
    written under the name by which it is received, and not be read later under another, nor on another stage as it was. `trace`
    is the model's own, before any pass.
    """
    free = _derived_from_inputs(trace)
    staged = list(zip(trace.ops, _places(trace, ends, free), strict=True))
    storage = [value.storage for value in trace.values]
    kept = {storage[n]: "a tensor that the model keeps" for n in trace.constants}
    kept |= {storage[n]: f"the buffer {name}" for n, name in trace.buffers.items()}
    state = {*trace.buffers, *trace.constants}
    made = {n: stage for op, stage in staged for n in op.outputs if n not in free}
    decides = _decides(trace) & {storage[n] for n in trace.buffers}
    for at, (op, stage) in enumerate(staged):
        for target in _torch.written(op.func, op.args, op.kwargs, Ref):
            home, where = storage[target.number], op.module or "the model"
            uses = [(o, there, [n for n in o.inputs if storage[n] == home]) for o, there in staged]
            if home in kept:
                away = [there for o, there, read in uses if read and there != stage and (_changes(o) or set(read) & state)]
                if away:
                    raise ModelError(
                        f"{kept[home]} is changed in {where} on stage {stage} of {len(ends)}, and used on stage {away[0]} for "
                        "another micro-batch at that time: give all its uses to one stage with split=, or use pp=1"
                    )
                if home in decides:
                    raise ModelError(
                        f"{kept[home]} is changed in {where}, and the model's Python decides by its value, which only stage "
                        f"{stage} of {len(ends)} has: decide with torch.where, or use pp=1"
                    )
                continue
            for _, there, read in uses[at + 1 :]:
                if any(made.get(n, stage) < stage and (n != target.number or there > stage) for n in read):
                    raise ModelError(
                        f"{where} changes in place, on stage {stage} of {len(ends)}, a tensor of an earlier stage that is read "
                        "later under another name: use the op that returns a new tensor, or pp=1"
                    )


def _decides(trace: Trace) -> set[int]:
    """Storages of the values that Python looked at, and of all from which these were computed."""
    looked: set[int] = set()
    for op in reversed(trace.ops):
        if isinstance(op.func, Guard) or looked & set(op.outputs):
            looked.update(op.inputs)
    return {trace.values[n].storage for n in looked}


def _places(trace: Trace, ends: Sequence[int], free: set[int]) -> list[int]:
    """Return the stage of every op: each cut falls between the calls on its sides, where the fewest bytes are alive.

    What only writes to a buffer runs where the value that it writes is made.
    """
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
    place = [sum(at >= cut for cut in cuts) for at in range(len(trace.ops))]
    for at, op in enumerate(trace.ops):
        sources = [place[made[n]] for n in op.inputs[1:] if n in made]
        if writes(op.func) and op.inputs[0] in trace.buffers and sources and not set(op.outputs) & set(read):
            place[at] = max(sources)
    return place


def _bytes(trace: Trace, number: int) -> int:
    value = trace.values[number]
    return math.prod(value.shape) * value.dtype.itemsize


def _derived_from_inputs(trace: Trace) -> set[int]:
    """Values that any stage can compute for itself: from the batch, constants and unwritten buffers, without random numbers."""
    written = {n for op in trace.ops if _changes(op) for n in op.inputs}
    free = {*trace.inputs, *trace.constants, *trace.buffers} - written
    for op in trace.ops:
        if _changes(op) or is_random(op) or is_opaque(op) or not set(op.inputs) <= free or set(op.outputs) & written:
            continue
        free.update(op.outputs)
    return free


def _changes(op: TracedOp) -> bool:
    return isinstance(op.func, KeepSlice) or writes(op.func)


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
    kept = {trace.values[n].storage for n in (*trace.buffers, *trace.constants)}
    kept &= {trace.values[n].storage for op in piece.trace.ops if _changes(op) for n in op.inputs}
    piece.copied = frozenset(n for n in piece.given if trace.values[n].storage in kept)
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
