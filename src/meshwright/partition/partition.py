"""One pass per axis: from a trace to the trace of what one rank does, with collectives where values change state.

Every value has a state on the axis (`state.py`). Ops are taken in order: what an op's cut operands mean for its results is read
off the same rules that found the regions (`blueprint/moves.py`), those few that a rank can't run on its part alone have a rule in
`rules.py`, and an op that needs whole operands gets them gathered. A later pass takes the result as its own source.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from meshwright import _torch
from meshwright.blueprint import costs
from meshwright.blueprint.moves import Effect, Label, Place, spread
from meshwright.blueprint.tape import RawOp, Ref, Value
from meshwright.blueprint.trees import map_tensors
from meshwright.partition import arguments
from meshwright.partition.collectives import Collective, Copy, Gather, Reduce, ReduceScatter, Share, Take
from meshwright.partition.local import Own, Randomly
from meshwright.partition.state import COPIED, PARTIAL, WHOLE, Axis, State, cut
from meshwright.partition.trace import Guard, Trace, TracedOp, is_opaque


@dataclass
class Policy:
    """What a pass is to do on its axis.

    `cuts` are the parameters that are cut, by name; `copied` those whole ones whose gradients are left as parts, to be summed
    once a step (None: all of them). `scatter` sums partial results into parts of the sequence where it can (sequence parallel);
    `sequence` cuts the batch's sequences (context parallel), with attention by `method`.
    """

    cuts: dict[str, tuple[int, Label]] = field(default_factory=dict)
    copied: frozenset[str] | None = frozenset()
    scatter: bool = False
    sequence: bool = False
    method: str = "auto"


class Pass:
    """One run over a source trace; `result` is the local trace. `wanted` are whole parameters that were used as copied ones,
    `did_cut` says whether anything was cut.
    """

    def __init__(self, source: Trace, axis: Axis, policy: Policy) -> None:
        self.source, self.axis, self.policy = source, axis, policy
        self.values = list(source.values)
        self.graded = source.graded()
        self.computed = source.computed()
        self.sequence = dict(source.sequence)
        self.result = Trace(calls=source.calls, changes=source.changes)
        self.states: dict[int, State] = {}
        self.own: dict[int, int] = {}
        self.converted: dict[tuple[int, State], int] = {}
        self.weights: dict[int, int] = {}
        self.wanted: set[str] = set()
        self.did_cut = False
        self.readers = Counter(n for op in source.ops for n in set(op.inputs)) + Counter(source.output_numbers())
        self.pinned = _pinned(source)
        state = {source.values[n].storage for n in source.parameters}
        self.owned = {n for n in self.pinned if source.values[n].storage not in state}
        self.op: TracedOp | None = None
        self._views: dict[Any, tuple[int, ...]] = {}
        self._same: dict[int, int] = {}  # a view taken again -> the first one, whose conversions it shares

    def run(self) -> Trace:
        """Take every op in order, then bring the outputs together."""
        from meshwright.partition.rules import RULES

        self._begin()
        for op in self.source.ops:
            self.op = op
            rule = RULES.get(costs.base_name(op.func))
            if rule is None or not rule(self, op):
                self.process(op)
        self.op = None
        self.result.outputs = map_tensors(self.source.outputs, lambda ref: Ref(self.get(ref.number, WHOLE)), Ref)
        return self.result

    def _begin(self) -> None:
        result = self.result
        for number, value in enumerate(self.source.values):
            groups: list[tuple[dict[int, Any], dict[int, Any]]] = [
                (self.source.parameters, result.parameters),
                (self.source.buffers, result.buffers),
                (self.source.inputs, result.inputs),
                (self.source.constants, result.constants),
            ]
            for given, kept in groups:
                if number in given:
                    state = self._given(number)
                    self._define(number, self._value(value, state), state)
                    kept[self.own[number]] = given[number]

    def _given(self, number: int) -> State:
        """The state of a parameter, buffer, input or constant."""
        name = self.source.parameters.get(number)
        if name is None:
            return WHOLE
        self.weights[number] = number
        if name in self.policy.cuts:
            self.did_cut = True
            return cut(*self.policy.cuts[name])
        return COPIED if self.policy.copied is None or name in self.policy.copied else WHOLE

    # Values

    def _value(self, like: Value, state: State) -> int:
        shape = list(like.shape)
        if state.is_cut:
            assert state.label is not None
            shape[state.dim] = self.axis.length(state.label)
        self.result.values.append(replace(like, shape=tuple(shape)))
        return len(self.result.values) - 1

    def _define(self, number: int, local: int, state: State) -> None:
        self.own[number], self.states[number] = local, state
        self._place(number, local, state)

    def _place(self, number: int, local: int, state: State) -> None:
        if number in self.sequence:
            dim, label = self.sequence[number]
            self.result.sequence[local] = (dim, self.axis.local(label) if state.is_cut and state.dim == dim else label)

    def fresh(self, like: int) -> int:
        """A new source value like another one, for a rule that takes an op apart."""
        self.values.append(self.values[like])
        number = len(self.values) - 1
        if like in self.graded:
            self.graded.add(number)
        if like in self.sequence:
            self.sequence[number] = self.sequence[like]
        self.readers[number] = 1
        return number

    def shape(self, number: int, state: State) -> tuple[int, ...]:
        """The local shape of a source value in a state."""
        shape = list(self.values[number].shape)
        if state.is_cut:
            assert state.label is not None
            shape[state.dim] = self.axis.length(state.label)
        return tuple(shape)

    def emit(
        self, func: Any, args: Iterable[Any], kwargs: dict[str, Any], made: list[tuple[int, State]], op: TracedOp | None = None
    ) -> None:
        """Write one local op whose results are the source values `made` in their states. `args` hold local `Ref`s."""
        args = tuple(args)
        outputs = []
        for number, state in made:
            local = self._value(self.values[number], state)
            outputs.append(local)
            self._define(number, local, state)
        self._append(func, args, kwargs, tuple(outputs), op)
        for number, state in made:
            if number in self.owned and state != WHOLE:
                self._own(number)

    def _own(self, number: int) -> None:
        """Keep a value that is written into whole on every rank, in memory of its own, laid out as the model's code saw it."""
        value, whole = self.values[number], self.get(number, WHOLE)
        local = self._value(value, WHOLE)
        self._append(Own(self.axis, value.strides), (Ref(whole),), {}, (local,))
        self._define(number, local, WHOLE)

    def _append(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: tuple[int, ...],
        op: Any = None,
        recorded: bool = False,
    ) -> None:
        template = op or self.op
        inputs = tuple(leaf.number for leaf in _torch.leaves_of((args, kwargs)) if isinstance(leaf, Ref))
        grad, call, module = (template.grad, template.call, template.module) if template else (torch.is_grad_enabled(), -1, "")
        self.result.ops.append(TracedOp(func, args, kwargs, inputs, outputs, module, grad or recorded, call))

    # Conversions

    def get(self, number: int, want: State) -> int:
        """The local value that holds a source value in the state wanted; collectives are written as needed, each once."""
        have = self.states[number]
        if have == want or (have.is_full and want.is_full and number not in self.graded):
            return self.own[number]
        key = (self._same.get(number, number), want)
        known = self.converted.get(key)
        if known is not None and number not in self.pinned:  # what was converted before a write is of before the write
            return known
        local = self._convert(number, have, want)
        self.converted[key] = local
        return local

    def _convert(self, number: int, have: State, want: State) -> int:
        axis, graded = self.axis, number in self.graded
        if have.kind == "partial":
            if want.is_cut:
                assert want.label is not None
                if axis.divides(want.label):
                    return self._apply(ReduceScatter(axis, want.dim, want.label), number, self.own[number], want)
            reduced = self._apply(Reduce(axis), number, self.own[number], WHOLE)
            return reduced if want == WHOLE else self._from(number, reduced, WHOLE, want, graded)
        copied = self.converted.get((self._same.get(number, number), COPIED))
        if want == WHOLE and have.is_cut and copied is not None and number not in self.pinned:
            return self._from(number, copied, COPIED, want, graded)
        return self._from(number, self.own[number], have, want, graded)

    def _from(self, number: int, local: int, have: State, want: State, graded: bool) -> int:
        axis = self.axis
        if have.is_full and want.is_full:
            if want == COPIED and number in self.weights:
                self.wanted.add(self.source.parameters[self.weights[number]])
            return self._apply(Copy(axis) if want == COPIED else Share(axis), number, local, want) if graded else local
        if have.is_full and want.is_cut:
            assert want.label is not None
            if number in self.weights and have == WHOLE:
                self.wanted.add(self.source.parameters[self.weights[number]])
            return self._apply(Take(axis, want.dim, want.label, have == COPIED or not graded), number, local, want)
        assert have.label is not None
        if want.is_cut:
            gathered = self.get(number, COPIED)
            return self._from(number, gathered, COPIED, want, graded)
        summed = want == COPIED and graded
        return self._apply(Gather(axis, have.dim, have.label, summed), number, local, want)

    def _is_region(self, number: int) -> bool:
        """Whether a cut value lies in a region: it is cut on another dim than the sequence."""
        return self.sequence.get(number, (-1,))[0] != self.states[number].dim

    def _apply(self, collective: Collective, number: int, local: int, state: State) -> int:
        made = self._value(self.values[number], state)
        self._place(number, made, state)
        # Recorded even where no gradient is wanted: ops elsewhere, with a gradient, may use the same conversion.
        self._append(collective, (Ref(local),), {}, (made,), recorded=True)
        return made

    def resolve(self, number: int) -> None:
        """Sum a partial value: into parts of the sequence under sequence parallelism, else whole."""
        if self.states[number].kind != "partial":
            return
        state = WHOLE
        if self.policy.scatter and number in self.sequence and number in self.graded:
            dim, label = self.sequence[number]
            if self.axis.divides(label) and len(self.values[number].shape) > 1:
                state = cut(dim, label)
        self._define(number, self.get(number, state), state)

    def divide(self, number: int) -> None:
        """Cut a whole value along the sequence, where the batch's sequences are cut."""
        if self.policy.sequence and number in self.sequence:
            dim, label = self.sequence[number]
            if self.axis.divides(label):
                self.did_cut = True
                self._define(number, self.get(number, cut(dim, label)), cut(dim, label))

    # Ops

    def process(self, op: TracedOp) -> None:
        """Write what this rank does for an op without a rule of its own."""
        if isinstance(op.func, Guard) or is_opaque(op):
            self.plain(op)
            return
        if self._seen_before(op):
            return
        op = self._out_of_place(op)
        if self._in_another_dtype(op):
            return
        if self._stays_partial(op):
            args = self.local_args(op, dict.fromkeys(op.inputs, PARTIAL))
            self.emit(arguments.runnable(op.func), args, op.kwargs, [(op.outputs[0], PARTIAL)])
            return
        for number in op.inputs:
            self.resolve(number)
        labels = self._labels(op)
        if any(number in self.pinned for number in (*op.inputs, *op.outputs)) and arguments.writes(op.func):
            labels = {}
        outcome = self._settle(op, labels) if labels else None
        if outcome and PARTIAL in outcome[1].values() and not any(self.states[n].is_cut for n in op.inputs):
            outcome = None  # the batch meets the weights in a sum over the dim: not along a sequence
        if outcome is None:
            self.plain(op)
        else:
            self._divided(op, *outcome)
        self._note_weight(op)

    def _seen_before(self, op: TracedOp) -> bool:
        """Views of one value that are taken again and again (one before each linear layer) are taken once."""
        if arguments.kind_of(op.func) != "view" or any(n in self.pinned for n in (*op.inputs, *op.outputs)) or len(op.outputs) != 1:
            return False
        key = (op.func, repr(op.args), repr(op.kwargs), op.grad, op.call)
        before = self._views.setdefault(key, op.outputs)
        if before is op.outputs:
            return False
        first, again = before[0], op.outputs[0]
        self._define(again, self.own[first], self.states[first])
        if first in self.weights:
            self.weights[again] = self.weights[first]
        self._same[again] = self._same.get(first, first)
        return True

    def _out_of_place(self, op: TracedOp) -> TracedOp:
        target = op.inputs[0] if op.inputs else -1
        if not arguments.writes(op.func) or target in self.pinned:
            return op
        functional = arguments.functional(op.func)
        if functional is None:
            return op
        changed = copy.copy(op)
        changed.func, changed.args = functional, (*op.args, *arguments.left_out(op))
        return changed

    def _in_another_dtype(self, op: TracedOp) -> bool:
        """An op that was in place and keeps its target's dtype is followed by a cast: out of place it takes the wider one."""
        if costs.base_name(op.func) not in ("add", "sub", "mul", "div", "pow") or len(op.outputs) != 1 or arguments.writes(op.func):
            return False
        wanted = self.values[op.outputs[0]].dtype
        wide = wanted
        for number in op.inputs:
            if self.values[number].shape:
                wide = torch.promote_types(wide, self.values[number].dtype)
        if wide == wanted:
            return False
        made, cast_back = self.fresh(op.outputs[0]), copy.copy(op)
        self.values[made] = replace(self.values[made], dtype=wide)
        cast_back.func, cast_back.args, cast_back.kwargs = torch.ops.aten._to_copy.default, (Ref(made),), {"dtype": wanted}
        cast_back.inputs = (made,)
        op = copy.copy(op)
        op.outputs = (made,)
        self.process(op)
        self.process(cast_back)
        return True

    def _stays_partial(self, op: TracedOp) -> bool:
        partial = [n for n in op.inputs if self.states[n].kind == "partial"]
        if not partial or len(op.outputs) != 1 or any(self.readers[n] > 1 for n in partial):
            return False
        name = costs.base_name(op.func)
        if len(partial) != len(op.inputs) or any(n in self.pinned for n in (*op.inputs, *op.outputs)):
            return False
        if len(op.inputs) == 1:
            return arguments.kind_of(op.func) == "view" and name not in ("slice", "select", "detach")
        same = self.values[op.inputs[0]].shape == self.values[op.inputs[1]].shape
        return name == "add" and same and op.grad and not op.kwargs

    def _labels(self, op: TracedOp) -> dict[Place, Label]:
        labels = {}
        for number in op.inputs:
            state = self.states[number]
            if state.is_cut:
                assert state.label is not None
                labels[number, state.dim] = state.label
        if self.policy.sequence and not labels and any(n in self.computed for n in op.outputs):
            # Where the batch meets the first weights: the sequence is cut.
            activations = [n for n in op.inputs if n in self.computed and n not in self.weights]
            for number in op.inputs:
                if number in self.sequence and number not in self.computed and not activations:
                    dim, label = self.sequence[number]
                    if self.axis.divides(label):
                        labels[number, dim] = label
        return labels

    def _settle(self, op: TracedOp, labels: dict[Place, Label]) -> tuple[dict[int, State], dict[int, State]] | None:
        """Follow the labels over the op until nothing changes; operands that stand in the way are given up. Returns the states of
        operands and of results, None if nothing stays cut.
        """
        given_up: set[Place] = set()
        while labels:
            effect = spread(op, self.values, labels)
            everything = labels | {where: label for where, label in effect.labels if where not in given_up}
            loser = self._in_the_way(op, labels, everything, effect, given_up)
            if loser is not None:
                given_up |= {where for where in labels if where[0] == loser}
                labels = {where: label for where, label in labels.items() if where[0] != loser}
                continue
            added = {where: label for where, label in everything.items() if where[0] in op.inputs and where not in labels}
            if added:
                labels = labels | added
                continue
            cuts = {number: cut(dim, label) for (number, dim), label in everything.items()}
            operands = {number: cuts.get(number, COPIED) for number in op.inputs}
            results = {n: PARTIAL if effect.closes else cuts.get(n, COPIED) for n in op.outputs}
            return operands, results
        return None

    def _in_the_way(
        self, op: TracedOp, labels: dict[Place, Label], everything: dict[Place, Label], effect: Effect, given_up: set[Place]
    ) -> int | None:
        """The cut operand to be made whole so that the op can run, or None if it can."""
        cut_numbers = [n for n in dict.fromkeys(op.inputs) if any(number == n for number, _ in labels)]
        if effect.blocked:
            mixed = [number for number, _ in effect.mixed if number in cut_numbers]
            return self._least_dear(mixed or cut_numbers)
        numbers = Counter(number for number, _ in everything)
        twice = any(times > 1 for times in numbers.values())
        also = effect.closes and any((n, d) in everything for n in op.outputs for d in range(len(self.values[n].shape)))
        uneven = any(not self.axis.can_cut(label) for label in everything.values())
        lost = any(where in given_up for where, _ in effect.labels)
        parts = costs.base_name(op.func) in ("cat", "split", "split_with_sizes")  # whose sizes have nothing to do with each other
        if twice or also or uneven or lost or not (parts or self.axis.alike(everything.values())):
            return self._least_dear(cut_numbers)
        return None

    def _least_dear(self, numbers: list[int]) -> int:
        """Of several cut operands the one to gather: no weight, rather the sequence than a region, the keys not the queries."""

        def price(item: tuple[int, int]) -> tuple[bool, bool, int]:
            place, number = item
            return (number in self.weights, self._is_region(number) and not self.policy.sequence, -place)

        return min(enumerate(numbers), key=price)[1]

    def plain(self, op: TracedOp) -> None:
        """Write an op on whole operands."""
        for number in op.inputs:
            self.resolve(number)
        inputs = [n for n in op.inputs if n in self.graded]
        whole = any(self.states[n].kind != "copied" for n in inputs)
        whole = whole or any(n in self.owned for n in (*op.inputs, *op.outputs))
        state = WHOLE if whole or not inputs else COPIED
        if arguments.writes(op.func) and op.inputs[0] in self.pinned - self.owned:
            state = self.states[op.inputs[0]]  # a parameter is written to as it is
        if is_opaque(op):  # what it does with its parameters is not seen: their gradients are parts where all are
            state = COPIED if self.policy.copied is None else WHOLE
        states = dict.fromkeys(op.inputs, state)
        func = arguments.runnable(op.func)
        self.emit(func, self.local_args(op, states), self._local_kwargs(op, states), [(n, state) for n in op.outputs])

    def _divided(self, op: TracedOp, operands: dict[int, State], results: dict[int, State]) -> None:
        self.did_cut = True
        args, kwargs = self.local_args(op, operands), self._local_kwargs(op, operands)
        state = next(iter(results.values())) if results else WHOLE
        source_state = operands[op.inputs[0]] if op.inputs else WHOLE
        shapes = [self.shape(n, s) for n, s in results.items()]
        func, args = arguments.localize(op, args, shapes, source_state, self.axis, self.values)
        if arguments.is_random(op) and state.is_cut:
            func = Randomly(self.axis, func)
        self.emit(func, args, kwargs, list(results.items()))

    def local_args(self, op: TracedOp, states: dict[int, State]) -> tuple[Any, ...]:
        """The op's arguments with operands in the states given."""
        return tuple(self._local(arg, states) for arg in op.args)

    def _local_kwargs(self, op: TracedOp, states: dict[int, State]) -> dict[str, Any]:
        return {key: self._local(value, states) for key, value in op.kwargs.items()}

    def _local(self, value: Any, states: dict[int, State]) -> Any:
        if isinstance(value, Ref):
            return Ref(self.get(value.number, states[value.number]))
        return [self._local(item, states) for item in value] if isinstance(value, list | tuple) else value

    def _note_weight(self, op: RawOp) -> None:
        """A view or a cast of a weight is a weight still."""
        passes_on = arguments.kind_of(op.func) in ("view", "copy")
        if passes_on and len(op.inputs) == 1 and op.inputs[0] in self.weights:
            self.weights.update(dict.fromkeys(op.outputs, self.weights[op.inputs[0]]))


def _pinned(source: Trace) -> set[int]:
    """Values whose storage is written to while another name of it is read later: these ops must really happen in place."""
    storage = [value.storage for value in source.values]
    read: dict[int, list[tuple[int, int]]] = {}
    for place, op in enumerate(source.ops):
        for number in op.inputs:
            read.setdefault(storage[number], []).append((place, number))
    for number in source.output_numbers():
        read.setdefault(storage[number], []).append((math.inf, number))  # type: ignore[arg-type]
    given = {storage[n] for n in (*source.parameters, *source.buffers, *source.inputs, *source.constants)}
    pinned = set()
    for place, op in enumerate(source.ops):
        if not arguments.writes(op.func) or not op.inputs:
            continue
        target = op.inputs[0]
        later = [n for when, n in read.get(storage[target], ()) if when > place and n not in op.outputs]
        later = [n for n in later if source.values[n].producer < place or n == target]
        if storage[target] in given or later:
            pinned.add(storage[target])
    return {number for number, home in enumerate(storage) if home in pinned}
