"""One run of a whole model on fake tensors, in which each distinct block runs in full only once.

Every block's `forward` is replaced for the duration of the run (on the instance, put back afterwards) by a stand-in
that looks at its arguments: a new combination of structure, settings and argument shapes is captured in full, forward
and backward, with its inputs as if they came from other blocks; a block equal to one that has been captured returns
tensors of the recorded shapes. The ops outside the blocks are recorded on a tape of their own, cut at the blocks, with
their backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from meshwright._torch import FakeTensor
from meshwright.blueprint.blocks import structures
from meshwright.blueprint.indices import IndexUsed, Place, hidden, index_attributes
from meshwright.blueprint.running import Function, run_with, untouched, watching
from meshwright.blueprint.sample import resized
from meshwright.blueprint.tape import Recorder, Tape, fingerprint
from meshwright.blueprint.trees import map_tensors, signature, tensors_in


@dataclass
class UnitTape:
    """Forward and backward of one block kind, and what it returned."""

    name: str
    tape: Tape
    output: Any


@dataclass
class Call:
    """One call of a block: which kind, and the numbers of its argument and result tensors on the outside tape."""

    name: str
    kind: int
    inputs: list[int]
    outputs: list[int]


@dataclass
class Walk:
    """What one run of the model at one micro-batch size yields."""

    items: int
    batch: Any
    kinds: list[UnitTape] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outside: Tape = field(default_factory=Tape)
    module_calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is captured: the model with stand-in tensors for its state, and the function of a batch that calls it."""

    model: nn.Module
    state: dict[str, torch.Tensor]
    batch: Any
    dtype: torch.dtype | None
    function: Function


def stand_in_state(model: nn.Module, recorder: Recorder, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Fake parameters and buffers by name; tied ones share a stand-in; small integer buffers that have values keep
    them.
    """
    made: dict[int, torch.Tensor] = {}
    named: dict[str, torch.Tensor] = {}
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in state:
        if id(tensor) not in made:
            made[id(tensor)] = recorder.imitation(tensor, dtype)
        named[name] = made[id(tensor)]
    return named


class Walker:
    """Runs a `Subject` once; `known` is an earlier walk, whose kinds are then captured again at their first call only."""

    def __init__(self, subject: Subject, recorder: Recorder, blocks: list[str], items: int, known: Walk | None) -> None:
        self.subject, self.recorder, self.known = subject, recorder, known
        self.blocks = blocks
        self.shapes = structures(subject.model)
        self.parameters = {name for name, _ in subject.model.named_parameters(remove_duplicate=False)}
        self.walk = Walk(items, None)
        self._leaves: list[torch.Tensor] = []
        self._entered: list[torch.Tensor] = []
        self._by_settings: dict[Any, int | None] = {}  # None: it computes with what was hidden
        self._indices = index_attributes(subject.model, blocks, self.shapes)
        self._by_ops: dict[Any, int] = {}

    def run(self) -> Walk:
        """Run forward, then the backward of what lies outside the blocks."""
        subject, recorder, walk = self.subject, self.recorder, self.walk
        walk.batch = resized(subject.batch, walk.items, recorder, subject.dtype)
        for name, tensor in subject.state.items():
            role = "parameter" if name in self.parameters else "buffer"
            walk.outside.declare(tensor, role, name)
        for tensor in tensors_in(walk.batch):
            walk.outside.declare(tensor, "input", "")
        counted = watching(subject.model, recorder.modules, self._count)
        with untouched(subject.model), recorder.onto(walk.outside), recorder.watching_saved(), recorder, counted:
            for module, name in {subject.model.get_submodule(name): name for name in self.blocks}.items():
                module.__dict__["forward"] = self._stand_in(module, name)
            output, _ = run_with(subject.model, subject.state, subject.function, walk.batch)
            walk.outside.seal(tensors_in(output))
            self._outside_backward(output)
        return walk

    def _count(self, path: str) -> None:
        self.walk.module_calls[path] = self.walk.module_calls.get(path, 0) + 1

    def _outside_backward(self, output: Any) -> None:
        # A block's input that is another block's result as it is has nothing outside to differentiate.
        leaves = [t for t in self.subject.state.values() if t.requires_grad] + self._leaves
        ends = {id(t): t for t in [*tensors_in(output), *self._entered] if t.requires_grad and t.grad_fn is not None}
        self._differentiate(list(ends.values()), leaves, self.walk.outside)

    def _stand_in(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """A block's forward during a walk; while the block is being captured, its own."""
        forward = module.forward
        return lambda *args, **kwargs: self.call(module, name, forward, args, kwargs)

    def call(self, module: nn.Module, name: str, forward: Any, args: Any, kwargs: Any) -> Any:
        """What a block's stand-in does: capture or recognise, then return tensors cut off from the block's own graph."""
        walk, outside = self.walk, self.walk.outside
        place = len(walk.calls)
        with self.recorder.onto(None):
            kind = self._kind(module, name, forward, args, kwargs, place)
        incoming = tensors_in(args, kwargs)
        walk.calls.append(Call(name, kind, [outside.number(tensor) for tensor in incoming], []))
        self._entered += [tensor for tensor in incoming if tensor.requires_grad]
        with self.recorder.onto(None):
            output = self._results(walk.kinds[kind].output, incoming)
        outside.position = place + 1
        walk.calls[place].outputs = [outside.number(tensor) for tensor in tensors_in(output)]
        for number in walk.calls[place].outputs:
            outside.values[number].producer = -2 - place  # made by call `place`
        return output

    def _kind(self, module: nn.Module, name: str, forward: Any, args: Any, kwargs: Any, place: int) -> int:
        """The number of a call's kind, which is captured at its first call."""
        if self.known is not None:
            number = self.known.calls[place].kind
            return number if number < len(self.walk.kinds) else self._captured(module, name, forward, args, kwargs)
        structure = (self.shapes[id(module)], signature((args, kwargs)), tuple(p.requires_grad for p in module.parameters()))
        for hiding in dict.fromkeys((self._indices.get(name, frozenset()), frozenset())):
            settings = (structure, module_settings(module, hiding))
            if settings not in self._by_settings:
                try:
                    with hidden(module, hiding):
                        self._by_settings[settings] = self._captured(module, name, forward, args, kwargs, structure)
                except IndexUsed:
                    self._by_settings[settings] = None
            found = self._by_settings[settings]
            if found is not None:
                return found
        raise AssertionError("nothing was hidden, and its use was seen")

    def _captured(self, module: nn.Module, name: str, forward: Any, args: Any, kwargs: Any, structure: Any = None) -> int:
        """Capture a call; return the number of its kind: a new one, unless a block of this structure does the same."""
        kinds = self.walk.kinds
        unit, backward = self._capture(name, forward, args, kwargs)
        number = len(kinds) if structure is None else self._by_ops.setdefault((structure, fingerprint(unit.tape)), len(kinds))
        if number == len(kinds):
            backward(module)
            kinds.append(unit)
        return number

    def _results(self, template: Any, incoming: list[torch.Tensor]) -> Any:
        def make(tensor: Any) -> Any:
            """A new tensor like the recorded one."""
            if isinstance(tensor, _SameAsInput):
                return incoming[tensor.index]
            if not isinstance(tensor, FakeTensor):
                return tensor
            with torch.no_grad():
                leaf = torch.empty_like(tensor).requires_grad_(tensor.requires_grad)
            if not leaf.requires_grad:
                return leaf
            self._leaves.append(leaf)
            # Not a leaf, so that the caller may add to it in place; a clone saves nothing and its backward runs
            # nothing.
            return leaf.clone()

        return map_tensors(template, make, (torch.Tensor, _SameAsInput))

    def _capture(self, name: str, forward: Any, args: Any, kwargs: Any) -> tuple[UnitTape, Callable[[nn.Module], None]]:
        """The forward of a block on a tape of its own, and what adds the backward to it."""
        tape, recorder = Tape(), self.recorder
        leaves: list[torch.Tensor] = []

        def fresh(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            with torch.no_grad():
                leaf = torch.empty_like(tensor)
            leaves.append(leaf.requires_grad_())
            return leaf.clone()

        replaced = {id(tensor): fresh(tensor) for tensor in tensors_in(args, kwargs)}
        args, kwargs = map_tensors((args, kwargs), lambda tensor: replaced[id(tensor)])
        prefix = f"{name}."
        for full, tensor in self.subject.state.items():
            if full.startswith(prefix):
                role = "parameter" if full in self.parameters else "buffer"
                tape.declare(tensor, role, full.removeprefix(prefix))
        inputs = tensors_in(args, kwargs)
        for tensor in inputs:
            tape.declare(tensor, "input", "")
        with recorder.onto(tape):
            output = forward(*args, **kwargs)
        tape.seal(tensors_in(output))

        def backward(module: nn.Module) -> None:
            ends = leaves + [parameter for parameter in module.parameters() if parameter.requires_grad]
            self._differentiate([tensor for tensor in tensors_in(output) if tensor.requires_grad], ends, tape)

        return UnitTape(name, tape, _mark_inputs(output, inputs)), backward

    def _differentiate(self, roots: list[torch.Tensor], ends: list[torch.Tensor], tape: Tape) -> None:
        """Write the backward from `roots` to `ends` to the tape."""
        if roots and ends:
            with self.recorder.onto(None):
                gradients = [torch.empty_like(root) for root in roots]
            for gradient in gradients:
                tape.declare(gradient, "gradient", "")
            with self.recorder.onto(tape):
                torch.autograd.grad(roots, ends, gradients, allow_unused=True)


@dataclass(frozen=True)
class _SameAsInput:
    """Stands in a block's recorded output for an argument that is returned as it came: number `index` of the arguments."""

    index: int


def _mark_inputs(output: Any, inputs: list[torch.Tensor]) -> Any:
    places = {id(tensor): place for place, tensor in enumerate(inputs)}
    return map_tensors(output, lambda t: _SameAsInput(places[id(t)]) if id(t) in places else t)


def _setting(value: Any) -> Any:
    """A module attribute as something to compare: plain values by value, everything else by identity."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_setting, value))
    return id(value)


def module_settings(module: nn.Module, without: frozenset[Place]) -> Any:
    """What tells two modules of equal structure apart: the plain attributes of all modules inside, less those
    `without`.
    """
    rows = []
    for path, inner in module.named_modules():
        own = {k: v for k, v in vars(inner).items() if k not in _MACHINERY and (path, k) not in without}
        rows.append((type_before_parametrizations(inner), tuple((key, _setting(value)) for key, value in own.items())))
    return tuple(rows)


_MACHINERY = (frozenset(vars(nn.Module())) | {"forward"}) - {"training"}
