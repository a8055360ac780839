"""The trace: everything that a model and its loss do for one batch, as ATen ops in order, fit to be run again.

The model's own Python runs once on fake tensors (`blueprint/execute.py`: floats without numbers, small integers for real), so
any control flow is allowed that a run takes. What Python decided by looking at a batch's values (is the mask all ones?) is kept
as a guard: the program looks again, and the model is traced anew if the answer differs. A module whose ops depend on computed
values (experts that loop over the tokens they got) becomes one opaque op, which calls the module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meshwright import _torch
from meshwright._torch import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from meshwright.blueprint import costs
from meshwright.blueprint.execute import Execution, operands, results
from meshwright.blueprint.failures import OwnBackward, ReadsComputed, capture_error
from meshwright.blueprint.moves import Label
from meshwright.blueprint.running import run_with, untouched, watching
from meshwright.blueprint.tape import RawOp, Ref, Tape, Value, referred
from meshwright.blueprint.trees import map_tensors, tensors_in
from meshwright.errors import MeshwrightError, ModelError

BATCH, RANDOM, CHOSEN = 1, 2, 4
"""Where a value comes from: the batch's integers, a random number, or a choice among computed numbers."""

_UNWRITTEN = ("aten::lift_fresh", "aten::is_same_size")
_SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave"}


@dataclass
class TracedOp(RawOp):
    """One op: `grad` is whether autograd recorded it; `call` numbers the call of a unit it belongs to (-1: outside)."""

    grad: bool = True
    call: int = -1


@dataclass(frozen=True)
class Call:
    """One call of a unit (a block): the module's name."""

    name: str


@dataclass
class Trace:
    """Ops over numbered values. `outputs` is what the function returned, with `Ref`s for tensors.

    `parameters`, `buffers` and `inputs` map names (inputs: places in the batch's tensors) to values, `constants` values to
    tensors that the model holds in other ways. `sequence` says which dim of a value runs along the sequence, `changes` what the
    run sets on modules beside tensors (where it is kept, its name, its value).
    """

    ops: list[TracedOp] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    buffers: dict[int, str] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    outputs: Any = None
    calls: list[Call] = field(default_factory=list)
    sequence: dict[int, tuple[int, Label]] = field(default_factory=dict)
    changes: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    def output_numbers(self) -> list[int]:
        """Numbers of the tensors that the function returned."""
        return [leaf.number for leaf in tensors_in(self.outputs, leaf=Ref)]

    def graded(self) -> set[int]:
        """Values that a gradient flows through: floats that depend on a trainable parameter by recorded ops, and every name of a
        memory that such a value is written into.
        """
        found = {n for n in (*self.parameters, *self.constants, *self.inputs) if self.values[n].needs_gradient}
        written: set[int] = set()
        before = -1
        while before < len(written):
            before = len(written)
            found.update(n for n, value in enumerate(self.values) if value.storage in written and _is_float(value))
            for op in self.ops:
                if op.grad and costs.base_name(op.func) != "detach" and (is_opaque(op) or any(n in found for n in op.inputs)):
                    found.update(n for n in op.outputs if _is_float(self.values[n]))
                    if isinstance(op.func, torch._ops.OpOverload) and _torch.is_in_place(op.func) and op.inputs:
                        written.add(self.values[op.inputs[0]].storage)
        return found

    def computed(self) -> set[int]:
        """Floats that depend on a parameter, whether a gradient flows through them or not."""
        found = set(self.parameters)
        for op in self.ops:
            if is_opaque(op) or any(n in found for n in op.inputs):
                found.update(n for n in op.outputs if _is_float(self.values[n]))
        return found


def _is_float(value: Value) -> bool:
    return value.dtype.is_floating_point or value.dtype.is_complex


class Opaque:
    """The op that calls a module as it is, on whole tensors: `arguments` has a `Ref` in the place of each, by their order."""

    tags: tuple[Any, ...] = ()

    def __init__(self, path: str, module: nn.Module, arguments: Any) -> None:
        self.path, self.module, self.arguments = path, module, arguments
        self.__name__ = "opaque"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the module; `tensors` fill the places of its arguments that hold tensors."""
        args, kwargs = map_tensors(self.arguments, lambda ref: tensors[ref.number], Ref)
        try:
            # Its own hooks are in the trace, as ops around it.
            return tuple(tensors_in(self.module.forward(*args, **kwargs)))
        except RuntimeError as error:
            if "differentiated Tensors" not in str(error):
                raise
            raise ModelError(
                f"module {self.path!r} differentiates what other modules have computed, which a trace of ops can't hold: compute "
                "it inside the module, or use data parallelism and ZeRO only, which need no trace"
            ) from error


def is_opaque(op: RawOp) -> bool:
    """Whether an op calls a module as it is."""
    return isinstance(op.func, Opaque)


class Guard:
    """The op that looks again at what Python saw; raises `Stale` if it differs. `func` is an op that answered Python itself."""

    tags: tuple[Any, ...] = ()

    def __init__(self, seen: Any, func: Any = None) -> None:
        self.seen, self.func = seen, func
        self.__name__ = "guard"

    def __call__(self, *values: Any) -> None:
        """Compare the op's answer, or a tensor's values (a list or a number was seen) or its shape (a tuple)."""
        if self.func is not None:
            now = self.func(*values)
        else:
            now = tuple(values[0].shape) if isinstance(self.seen, tuple) else values[0].tolist()
        if now != self.seen:
            raise Stale


class Stale(Exception):
    """A batch's values would lead the model's Python another way than when it was traced."""


class _DependsOnComputed(Exception):
    def __init__(self, module: str, cause: BaseException) -> None:
        super().__init__(module)
        self.module, self.cause = module, cause


class _Tracer(Execution):
    """Executes on fake tensors and writes to a tape."""

    def __init__(self, units: frozenset[str]) -> None:
        super().__init__()
        self.tape = Tape()
        self.units = units
        self.calls: list[Call] = []
        self.ops: list[TracedOp] = []
        self.taint: dict[int, int] = {}
        self.modules: list[str] = []
        self.call = -1
        self.paused = False
        self.kept: list[Any] = []  # tensors whose ids and storages must not come again
        self.real: dict[int, Tensor] = {}
        self.before: dict[int, Tensor] = {}
        self.attributes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op and write it down."""
        kwargs = kwargs or {}
        if self.paused:
            return self.run(func, args, kwargs)
        numbers = [self.number(tensor) for tensor in operands(args, kwargs)]
        taint = 0
        for number in numbers:
            taint |= self.taint.get(number, 0)
        name = costs.base_name(func)
        by_values = name in _SIZED_BY_VALUES or (name == "index" and any(_is_mask(i) for i in args[1]))
        fixed = name == "bincount" and self._fixed_bins(args, kwargs)
        if taint & CHOSEN and not fixed and (by_values or name == "_local_scalar_dense"):
            raise _DependsOnComputed(self.module(), ReadsComputed())
        if _torch.is_in_place(func) and args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            self._before_write(args[0], any(isinstance(t, FakeTensor) for t in operands(args, kwargs)))
        try:
            result = self.run(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _DependsOnComputed(self.modules[-1] if self.modules else "", error) from error
        if name == "_local_scalar_dense":
            if taint & (BATCH | RANDOM):
                self._guard((numbers[0],), result)
            return result
        if isinstance(result, bool):  # `torch.equal`
            if taint & (BATCH | RANDOM):
                self._guard(tuple(numbers), result, func)
            return result
        if func is _torch.prim_device or func.name().startswith(_UNWRITTEN):
            if isinstance(result, Tensor) and numbers:
                self.tape.same(result, args[0])
            return result
        outputs = self._write(func, args, kwargs, result)
        from_fakes = name not in _FROM_SHAPES and any(isinstance(t, FakeTensor) for t in operands(args, kwargs))
        taint |= RANDOM if torch.Tag.nondeterministic_seeded in func.tags else 0
        for number, tensor in zip(outputs, results(result), strict=True):
            chosen = CHOSEN if from_fakes and not isinstance(tensor, FakeTensor) else 0
            self.taint[number] = taint | chosen
        if by_values and taint:
            self._guard((outputs[0],), tuple(results(result)[0].shape))
        return result

    def _fixed_bins(self, args: Any, kwargs: Any) -> bool:
        """Whether counts are asked for at least as many bins as choices can name: their number depends on nothing then."""
        least = int(args[2]) if len(args) > 2 else int(kwargs.get("minlength", 0))
        return not isinstance(args[0], FakeTensor) and args[0].numel() > 0 and int(args[0].max()) < least

    def _before_write(self, tensor: Tensor, computed: bool) -> None:
        """Keep the values of constants that share memory with what is about to be written to."""
        home = _torch.storage_key(tensor)
        for number, constant in self.real.items():
            if number not in self.before and _torch.storage_key(constant) == home:
                if computed:
                    raise ModelError(
                        f"module {self.module()!r} writes computed values into a tensor that is no buffer: "
                        "register it with register_buffer, or make it with the dtype and device of its input (new_zeros)"
                    )
                self.before[number] = constant.clone()

    def entered(self, path: str) -> None:
        """A module is called; a unit's call is numbered, unless it runs inside another's."""
        if path in self.units and self.call < 0:
            self.call = len(self.calls)
            self.calls.append(Call(path))

    def left(self, path: str) -> None:
        """A module's call is over."""
        if self.call >= 0 and self.calls[self.call].name == path:
            self.call = -1

    def restore(self) -> None:
        """Give constants that the trace has written to their values again."""
        for number, values in self.before.items():
            self.real[number].copy_(values)

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; one met for the first time is kept as a constant."""
        before = len(self.tape.values)
        number = self.tape.number(tensor)
        if number == before:
            self.kept.append(tensor)
            self.real[number] = tensor
            if id(tensor) in self.attributes:
                self.taint[number] = BATCH  # it may change from call to call, as a batch does
        return number

    def declare(self, tensor: Tensor, role: str, name: str) -> int:
        """Number a parameter, buffer or input."""
        self.kept.append(tensor)
        return self.tape.declare(tensor, role, name)

    def _guard(self, numbers: tuple[int, ...], seen: Any, func: Any = None) -> None:
        self.ops.append(TracedOp(Guard(seen, func), tuple(map(Ref, numbers)), {}, numbers, (), self.module(), False, self.call))

    def seen(self, tensor: Tensor) -> None:
        """Python is about to read all values of a tensor by a way that is no op (`tolist`, `numpy`)."""
        if isinstance(tensor, FakeTensor):
            return
        number = self.number(tensor)
        taint = self.taint.get(number, 0)
        if taint & CHOSEN:
            raise _DependsOnComputed(self.module(), ReadsComputed())
        if taint:
            self._guard((number,), tensor.tolist())

    def module(self) -> str:
        """The path of the module that is running."""
        return self.modules[-1] if self.modules else ""

    def _write(self, func: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, ...]:
        refs, named, inputs = referred(args, kwargs, self._operand)
        return self._append(func, refs, named, inputs, results(result), self.module())

    def _append(
        self, func: Any, args: Any, kwargs: Any, inputs: tuple[int, ...], made: list[Tensor], module: str
    ) -> tuple[int, ...]:
        outputs = tuple(self.tape.made(tensor, len(self.ops)) for tensor in made)
        self.kept += made
        self.ops.append(TracedOp(func, args, kwargs, inputs, outputs, module, torch.is_grad_enabled(), self.call))
        return outputs

    def _operand(self, tensor: Tensor) -> int:
        """The number of an op's operand. One that has a gradient though the ops that made it had none comes from an autograd
        function of the user's: only its module knows its backward.
        """
        number = self.number(tensor)
        producer = self.tape.values[number].producer
        if tensor.requires_grad and producer >= 0 and not tensor.is_leaf and not self.ops[producer].grad:
            raise _DependsOnComputed(self.ops[producer].module, OwnBackward(type(tensor.grad_fn).__name__))
        return number

    def opaque(self, path: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Write one op for a whole module; its results are those of a run that is not written down."""
        given: list[Tensor] = []

        def place(tensor: Tensor) -> Ref:
            given.append(tensor)
            return Ref(len(given) - 1)

        arguments = map_tensors((args, kwargs), place)
        inputs = tuple(map(self.number, given))
        self.paused = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self.paused = False
        call = Opaque(path, module, arguments)
        outputs = self._append(call, tuple(map(Ref, inputs)), {}, inputs, tensors_in(output), path)
        self.taint.update(dict.fromkeys(outputs, CHOSEN))
        return output


_FROM_SHAPES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty", "size"}


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class _HostReads(TorchFunctionMode):
    """Sees the ways by which Python reads a tensor's values that are no ops."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a read, then do it."""
        if func in _BACKWARDS and not self.tracer.paused:
            raise _DependsOnComputed(self.tracer.module(), OwnBackward(_BACKWARDS[func]))
        if func in _READS and args and isinstance(args[0], Tensor):
            self.tracer.seen(args[0])
        return func(*args, **(kwargs or {}))


_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_BACKWARDS = {
    Tensor.register_hook: "Tensor.register_hook",
    torch.autograd.grad: "torch.autograd.grad",
    Tensor.backward: "Tensor.backward",
}
"""Ways to have a hand in the backward that are no ops: the module that does so runs as it is."""


@dataclass(frozen=True)
class Subject:
    """What is traced: the model, its parameters' whole shapes and dtypes by name, and the names of its units (blocks)."""

    model: nn.Module
    shapes: dict[str, tuple[torch.Size, torch.dtype, bool]]
    units: tuple[str, ...] = ()


def trace(subject: Subject, function: Callable[[Any], Any], batch: Any) -> Trace:
    """Trace `function(batch)`, which calls the model; `batch` is a pytree of tensors on any device.

    Raises `ModelError` in one sentence that names the module and the line if the model can't run on fake tensors.
    """
    opaque: dict[str, BaseException] = {}
    while True:
        try:
            return _attempt(subject, function, batch, frozenset(opaque))
        except _DependsOnComputed as found:
            if not found.module or found.module in opaque:
                raise capture_error(found.cause, found.module) from found.cause
            opaque[found.module] = found.cause


def _attempt(subject: Subject, function: Callable[[Any], Any], batch: Any, opaque: frozenset[str]) -> Trace:
    tracer = _Tracer(frozenset(subject.units))
    tracer.attributes = {id(value) for module in subject.model.modules() for value in vars(module).values()}
    found = Trace()
    plain = plain_attributes(subject.model)
    state = _stand_ins(subject, tracer, found)

    def given(tensor: Tensor) -> Tensor:
        stand_in = tracer.imitation(tensor)
        number = tracer.declare(stand_in, "input", "")
        found.inputs[number] = len(found.inputs)
        tracer.taint[number] = BATCH
        return stand_in

    inputs = _torch.tree_map_tensors(given, batch)
    try:
        with (
            untouched(subject.model),
            torch.random.fork_rng(devices=[]),
            _torch.fsdp_silenced(subject.model),
            watching(subject.model, tracer.modules, tracer.entered, tracer.left),
            tracer,
            _HostReads(tracer),
        ):
            for path in opaque:
                module = subject.model.get_submodule(path)
                module.__dict__["forward"] = _stand_in(tracer, path, module)
            output, after = run_with(subject.model, state, function, inputs)
            _write_back(found, state, after)
            found.changes = _changes(subject.model, plain)
    except (_DependsOnComputed, MeshwrightError):
        raise
    except Exception as error:
        raise capture_error(error, tracer.modules[-1] if tracer.modules else "") from error
    finally:
        tracer.restore()
    return _finish(found, tracer, output)


def _write_back(found: Trace, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """What the model assigned to a buffer is written into it; one of another shape is a cache, and is made again each time."""
    with torch.no_grad():
        for name in found.buffers.values():
            old, new = before[name], after[name]
            if new is not old and isinstance(new, Tensor) and (new.shape, new.dtype) == (old.shape, old.dtype):
                old.copy_(new)


def plain_attributes(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Numbers, flags and names that modules hold, alone or in a short list or dict, on which their Python may depend: (where it is
    kept, its name, its content).
    """
    held = ((vars(module), name, content(value)) for module in model.modules() for name, value in vars(module).items())
    return [found for found in held if found[1] not in _OF_EVERY_MODULE and not isinstance(found[2], type)]


def content(value: Any) -> Any:
    """What a plain value, or a list or dict of such, is compared by; its type for anything else."""
    if is_plain(value):
        return value
    if type(value) in (list, dict) and len(value) <= _SHORT:
        items = (*value.items(),) if isinstance(value, dict) else (*value,)
        leaves = [leaf for item in items for leaf in item] if isinstance(value, dict) else items
        if all(map(is_plain, leaves)):
            return type(value), items
    return type(value)


def set_attribute(home: dict[str, Any], name: str, value: Any) -> None:
    """Give a module's attribute a content (see `content`); a list or dict stays the object that others may hold."""
    if not isinstance(value, tuple):
        home[name] = value
        return
    kind, items = value
    if type(home.get(name)) is not kind:
        home[name] = kind()
    home[name].clear()
    (home[name].extend if kind is list else home[name].update)(items)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a flag, a name or None: compared by value, and safe to keep."""
    return type(value) in (bool, int, float, str, NoneType)


def _changes(model: nn.Module, before: list[tuple[dict[str, Any], str, Any]]) -> list[tuple[dict[str, Any], str, Any]]:
    """What the run has set (a call counter, the length of a cache)."""
    known = {(id(home), name): value for home, name, value in before}
    return [(h, name, value) for h, name, value in plain_attributes(model) if known.get((id(h), name), _MISSING) != value]


_MISSING = object()
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SHORT = 64
"""Items of a list or dict that is looked at before every call."""


def _finish(found: Trace, tracer: _Tracer, output: Any) -> Trace:
    found.outputs = map_tensors(output, lambda tensor: Ref(_made_by_op(found, tracer, tensor)))
    found.ops, found.values, found.calls = tracer.ops, tracer.tape.values, tracer.calls
    for number, tensor in tracer.real.items():
        if isinstance(tensor, FakeTensor):
            raise ModelError("the model computes with a tensor that it kept from before it was traced: compute it in forward")
        if tensor.requires_grad:
            raise ModelError("the loss reaches a parameter by another way than the model it is given: use the model's own module")
        found.constants[number] = tensor
    return found


def _made_by_op(found: Trace, tracer: _Tracer, leaf: Tensor) -> int:
    """The number of a tensor that is returned; a parameter or buffer that is returned as it is goes through an op."""
    number = tracer.number(leaf)
    if tracer.tape.values[number].producer >= 0 or number in found.inputs:
        return number
    made = tracer.tape.made(leaf, len(tracer.ops))
    tracer.ops.append(TracedOp(torch.ops.aten.alias.default, (Ref(number),), {}, (number,), (made,), ""))
    return made


def _stand_ins(subject: Subject, tracer: _Tracer, found: Trace) -> dict[str, Tensor]:
    """Fake parameters of whole shape (tied ones share one) and buffers; small integer buffers keep their values."""
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    # A module under two names is swapped once: swapped twice, it would be given back what it got the first time.
    again = set(_second_names(subject.model))
    for name, parameter in subject.model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] in again:
            continue
        if id(parameter) not in made:
            shape, dtype, trainable = subject.shapes[name]
            with tracer.fake:
                stand_in = torch.empty(shape, dtype=dtype, device="cpu", requires_grad=trainable and dtype.is_floating_point)
            made[id(parameter)] = stand_in
            found.parameters[tracer.declare(stand_in, "parameter", name)] = name
        state[name] = made[id(parameter)]
    for name, buffer in subject.model.named_buffers(remove_duplicate=False):
        if name.rpartition(".")[0] in again:
            continue
        if id(buffer) not in made:
            made[id(buffer)] = tracer.imitation(buffer)
            number = tracer.declare(made[id(buffer)], "buffer", name)
            found.buffers[number] = name
            tracer.taint[number] = BATCH  # it may change from call to call, as a batch does
        state[name] = made[id(buffer)]
    return state


def _second_names(model: nn.Module) -> list[str]:
    first: dict[int, str] = {}
    return [name for name, module in model.named_modules(remove_duplicate=False) if first.setdefault(id(module), name) != name]


def _stand_in(tracer: _Tracer, path: str, module: nn.Module) -> Callable[..., Any]:
    """The forward of a module that is to be one op."""
    forward = module.forward
    return lambda *args, **kwargs: tracer.opaque(path, module, forward, args, kwargs)
