"""One run of a whole model on fake tensors, in which each distinct block runs in full only once.

Every block's `forward` is replaced for the duration of the run (on the instance, put back afterwards) by a stand-in
that looks at its arguments: a new combination of structure, settings and argument shapes is captured in full, forward
and backward, with its inputs as if they came from other blocks; a block equal to one that has been captured returns
tensors of the recorded shapes. The ops outside the blocks are recorded on a tape of their own, cut at the blocks, with
their backward.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from meshwright._torch import FakeTensor
from meshwright.blueprint.blocks import structures
from meshwright.blueprint.execute import LARGEST_REAL
from meshwright.blueprint.indices import IndexUsed, Place, hidden, index_attributes
from meshwright.blueprint.sample import ForwardFn, LossFn, call_arguments, resized
from meshwright.blueprint.tape import Digest, Recorder, Tape
from meshwright.blueprint.trees import map_tensors, signature, tensors_in


@dataclass
class UnitTape:
    """Forward and backward of one block kind: `forward_ops` of the tape's ops are the forward's."""

    name: str
    tape: Tape
    forward_ops: int
    inputs: list[int]
    outputs: list[int]
    output: Any
    digest: str


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
    outside_forward_ops: int = 0
    output_numbers: list[int] = field(default_factory=list)
    module_calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is captured: the model with stand-in tensors for its state, and how to call it."""

    model: nn.Module
    state: dict[str, torch.Tensor]
    batch: Any
    dtype: torch.dtype | None
    forward_fn: ForwardFn | None
    loss_fn: LossFn | None


def stand_in_state(model: nn.Module, recorder: Recorder, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Fake parameters and buffers by name; tied ones share a stand-in; small integer buffers that have values keep
    them.
    """
    made: dict[int, torch.Tensor] = {}
    named: dict[str, torch.Tensor] = {}
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in state:
        if id(tensor) not in made:
            keeps = not tensor.is_meta and not tensor.is_floating_point() and tensor.numel() <= LARGEST_REAL
            with_values = keeps and not isinstance(tensor, FakeTensor)
            made[id(tensor)] = tensor.detach().cpu().clone() if with_values else recorder.stand_in(tensor, dtype)
        named[name] = made[id(tensor)]
    return named


class Walker:
    """Runs a `Subject` once; `known` is an earlier walk, whose kinds are then captured again at their first call only."""

    def __init__(self, subject: Subject, recorder: Recorder, blocks: list[str], items: int, known: Walk | None) -> None:
        self.subject, self.recorder, self.known = subject, recorder, known
        self.names = {id(subject.model.get_submodule(name)): name for name in blocks}
        self.paths = {id(module): name for name, module in subject.model.named_modules()}
        self.shapes = structures(subject.model)
        self.parameters = {name for name, _ in subject.model.named_parameters(remove_duplicate=False)}
        self.walk = Walk(items, None)
        self._leaves: list[torch.Tensor] = []
        self._entered: list[torch.Tensor] = []
        self._by_settings: dict[Any, int] = {}
        self._by_digest: dict[Any, int] = {}
        self._structures: set[Any] = set()
        self._indices = index_attributes(subject.model, blocks, self.shapes)
        self._uses_index: set[Any] = set()

    def run(self) -> Walk:
        """Run forward, then the backward of what lies outside the blocks."""
        subject, recorder, walk = self.subject, self.recorder, self.walk
        walk.batch = resized(subject.batch, walk.items, recorder, subject.dtype)
        for name, tensor in subject.state.items():
            role = "parameter" if name in self.parameters else "buffer"
            walk.outside.declare(tensor, role, name)
        for tensor in tensors_in(walk.batch):
            walk.outside.declare(tensor, "input", "")
        with self._stand_ins(), recorder.onto(walk.outside), recorder.watching_saved(), recorder, self._paths():
            output = torch.func.functional_call(_Called(subject), self._prefixed(), (walk.batch,))
            walk.output_numbers = [walk.outside.number(tensor) for tensor in tensors_in(output)]
            walk.outside_forward_ops = len(walk.outside.ops)
            walk.outside.seal()
            self._outside_backward(output)
        return walk

    def _prefixed(self) -> dict[str, torch.Tensor]:
        return {f"model.{name}": tensor for name, tensor in self.subject.state.items()}

    def _outside_backward(self, output: Any) -> None:
        # A block's input that is another block's result as it is has nothing outside to differentiate.
        leaves = [t for t in self.subject.state.values() if t.requires_grad] + self._leaves
        ends = {id(t): t for t in [*tensors_in(output), *self._entered] if t.requires_grad and t.grad_fn is not None}
        if ends and leaves:
            roots = list(ends.values())
            with self.recorder.onto(None):
                gradients = [torch.empty_like(root) for root in roots]
            for gradient in gradients:
                self.walk.outside.declare(gradient, "gradient", "")
            torch.autograd.grad(roots, leaves, gradients, allow_unused=True)

    @contextlib.contextmanager
    def _paths(self) -> Iterator[None]:
        """Keep the path of the module that is running on `recorder.modules`."""
        modules, paths, counts = self.recorder.modules, self.paths, self.walk.module_calls

        def enter(module: nn.Module, _: Any) -> None:
            path = paths.get(id(module), modules[-1] if modules else "")
            counts[path] = counts.get(path, 0) + 1
            modules.append(path)

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            modules.pop()

        modules.clear()
        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=False)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """Put a stand-in in place of each block's forward, and take it away again whatever happens."""
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for module in self.subject.model.modules():
                name = self.names.get(id(module))
                if name is None:
                    continue
                replaced.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = _StandIn(self, module, name, module.forward)
            yield
        finally:
            for module, own in replaced:
                if own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own

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
        if self.known is not None:
            number = self.known.calls[place].kind
            if number == len(self.walk.kinds):
                self.walk.kinds.append(self._capture(module, name, forward, args, kwargs))
            return number
        shapes = signature((args, kwargs))
        indices = self._indices.get(name, frozenset())
        structure = (self.shapes[id(module)], shapes, tuple(p.requires_grad for p in module.parameters()))
        with_index = (structure, module_settings(module, frozenset()))
        without = (structure, module_settings(module, indices)) if indices else with_index
        for settings in (without, with_index):
            if settings in self._by_settings:
                return self._by_settings[settings]
        if indices and without not in self._uses_index:
            try:
                with hidden(module, indices):
                    self._by_settings[without] = self._new_kind(module, name, forward, args, kwargs, structure)
                return self._by_settings[without]
            except IndexUsed:
                self._uses_index.add(without)
        self._by_settings[with_index] = self._new_kind(module, name, forward, args, kwargs, structure)
        return self._by_settings[with_index]

    def _new_kind(self, module: nn.Module, name: str, forward: Any, args: Any, kwargs: Any, structure: Any) -> int:
        if structure in self._structures:
            # Only a setting differs: the forward alone tells whether it computes the same.
            digest = self._glance(module, forward, args, kwargs)
            if (structure, digest) in self._by_digest:
                return self._by_digest[structure, digest]
        tape = self._capture(module, name, forward, args, kwargs)
        self._structures.add(structure)
        self.walk.kinds.append(tape)
        self._by_digest[structure, tape.digest] = len(self.walk.kinds) - 1
        return len(self.walk.kinds) - 1

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

    def _glance(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> str:
        digest = Digest()
        with self.recorder.onto(digest):
            forward(*args, **kwargs)
        return digest.value()

    def _capture(self, module: nn.Module, name: str, forward: Any, args: Any, kwargs: Any) -> UnitTape:
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
        numbers = [tape.declare(tensor, "input", "") for tensor in inputs]
        with recorder.onto(tape):
            output = forward(*args, **kwargs)
            forward_ops = len(tape.ops)
            outputs = [tape.number(tensor) for tensor in tensors_in(output)]
            tape.seal()
            self._unit_backward(module, output, leaves, tape)
        marked = _mark_inputs(output, inputs)
        digest = Digest.of(tape, forward_ops)
        return UnitTape(name, tape, forward_ops, numbers, outputs, marked, digest)

    def _unit_backward(self, module: nn.Module, output: Any, leaves: list[torch.Tensor], tape: Tape) -> None:
        roots = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        ends = leaves + [parameter for parameter in module.parameters() if parameter.requires_grad]
        if roots and ends:
            with self.recorder.onto(None):
                gradients = [torch.empty_like(root) for root in roots]
            for gradient in gradients:
                tape.declare(gradient, "gradient", "")
            torch.autograd.grad(roots, ends, gradients, allow_unused=True)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever the model's forward stores on its modules (a cached mask, a counter) is taken back: it would be a fake
    tensor.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    held = [(value, value.copy()) for _, attributes in before for value in attributes.values() if type(value) in _CONTAINERS]
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for name in [name for name in now if name not in attributes]:
                del now[name]
            for name, value in attributes.items():
                if now.get(name) is not value:
                    now[name] = value
        for container, content in held:  # also what torch keeps buffers in
            if isinstance(container, list):
                container[:] = content
            elif len(container) != len(content) or any(container.get(key) is not value for key, value in content.items()):
                container.clear()
                container.update(content)


_CONTAINERS = (dict, OrderedDict, list)


class _StandIn:
    """A block's forward during a walk; while the block is being captured, its own."""

    def __init__(self, walker: Walker, module: nn.Module, name: str, forward: Any) -> None:
        self.walker, self.module, self.name, self.forward = walker, module, name, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.walker.call(self.module, self.name, self.forward, args, kwargs)


class _Called(nn.Module):
    """The model behind one call that takes a batch, so that `functional_call` can swap its state and the loss joins in."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model = subject.model
        self._subject = (subject.forward_fn, subject.loss_fn)

    def forward(self, batch: Any) -> Any:
        """The model's output, or the loss if there is a loss function."""
        forward_fn, loss_fn = self._subject
        if forward_fn is not None:
            output = forward_fn(self.model, batch)
        else:
            args, kwargs = call_arguments(self.model, batch)
            output = self.model(*args, **kwargs)
        return output if loss_fn is None else loss_fn(output, batch)


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
        rows.append((type(inner), tuple((key, _setting(value)) for key, value in own.items())))
    return tuple(rows)


_MACHINERY = (frozenset(vars(nn.Module())) | {"forward"}) - {"training"}
