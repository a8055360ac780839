"""The tape: the ATen ops of a stretch of a model, the tensors between them, the storages that autograd saves.

A `Recorder` executes (see `execute.py`) and writes to the `Tape` that is current. Tensors get a number when they are
first seen; an in-place op gives its target a new number. Turning two tapes, taken at two micro-batch sizes, into
records is `capture.py`'s task.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from meshwright._torch import next_node_number, prim_device, running_node_number, storage_key
from meshwright.blueprint import costs
from meshwright.blueprint.execute import Execution, results

_SILENT = ("aten::detach", "aten::lift_fresh", "aten::is_same_size", "aten::_local_scalar_dense", "aten::alias")


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in a raw op's arguments: `tape.values[number]`."""

    number: int


@dataclass
class Value:
    """A tensor met on a tape; `role`: `parameter`, `buffer`, `input`, `gradient`, `made`, `constant` (undeclared)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    storage_bytes: int
    role: str
    name: str = ""
    producer: int = -1
    position: int = 0
    needs_gradient: bool = False
    declared: bool = False


@dataclass
class RawOp:
    """One op as dispatched: `args` and `kwargs` hold `Ref`s in place of tensors, `module` is the path of the one that runs."""

    func: Any
    args: Any
    kwargs: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str


@dataclass
class CostedOp(RawOp):
    """One op of a tape, with what it costs: `node` numbers the autograd node that it makes, or whose backward it belongs to."""

    node: int
    position: int
    flops: int
    read_bytes: int
    written_bytes: int
    matmul: tuple[int, int, int, int] | None
    causal: bool


@dataclass
class RawSaved:
    """A storage kept by autograd: the first tensor saved from it, and the numbers of all nodes that saved it."""

    value: int
    nodes: list[int] = field(default_factory=list)
    bytes: int = 0


class Tape:
    """Ops and values of one stretch, of the ops the first `forward_ops` those of its forward, from `inputs` to `outputs`.

    `live_bytes` follows the storages made here, `levels` is the most alive at each op.
    """

    def __init__(self) -> None:
        self.ops: list[CostedOp] = []
        self.values: list[Value] = []
        self.saved: dict[int, RawSaved] = {}
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.forward_ops = 0
        self.position = 0
        self.sealed = False
        self.live_bytes = 0
        self.levels: list[int] = []
        self._high = 0
        self._numbers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._storages: dict[int, _Storage] = {}
        self._serials = itertools.count()

    def declare(self, tensor: torch.Tensor, role: str, name: str) -> int:
        """Number a tensor that exists before the tape begins; its storage is not counted as made here."""
        storage = self._storage(tensor, role, name, counted=False)
        number = self._add(tensor, storage, storage.role, name, -1)
        self.values[number].declared = True
        if role == "input":
            self.inputs.append(number)
        return number

    def same(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        """`tensor` is `source` under another name (a detached alias): it takes the same number."""
        self._numbers[id(tensor)] = (weakref.ref(tensor), self.number(source))

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor; one never seen takes the role of its storage, or `constant`."""
        known = self._numbers.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        storage = self._storage(tensor, "constant", "")
        return self._add(tensor, storage, storage.role, storage.name, -1)

    def made(self, tensor: torch.Tensor, producer: int) -> int:
        """A new number for an op's result."""
        storage = self._storage(tensor, "made", "")
        return self._add(tensor, storage, storage.role, "", producer)

    def save(self, tensor: torch.Tensor, node: int) -> None:
        """Note that the autograd node `node` saves `tensor`."""
        number = self.number(tensor)
        size = int(tensor.untyped_storage().nbytes())
        entry = self.saved.setdefault(self.values[number].storage, RawSaved(number, [], size))
        entry.nodes.append(node)

    @property
    def forward(self) -> list[CostedOp]:
        """The ops of the forward."""
        return self.ops[: self.forward_ops]

    def seal(self, outputs: list[torch.Tensor]) -> None:
        """The forward is over: what is saved now stays listed, though the backward lets go of it."""
        self.outputs, self.forward_ops, self.sealed = [self.number(tensor) for tensor in outputs], len(self.ops), True
        self._high = self.live_bytes

    def level(self) -> None:
        """An op is done: note the most bytes that were alive since the one before."""
        self.levels.append(self._high)
        self._high = self.live_bytes

    def _add(self, tensor: torch.Tensor, storage: _Storage, role: str, name: str, producer: int) -> int:
        shape, strides = tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))
        number, grad = len(self.values), tensor.requires_grad
        place = (producer, self.position, grad)
        self.values.append(Value(shape, strides, tensor.dtype, storage.serial, storage.size, role, name, *place))
        self._numbers[id(tensor)] = (weakref.ref(tensor), number)
        return number

    def _storage(self, tensor: torch.Tensor, role: str, name: str, counted: bool = True) -> _Storage:
        """The entry of a tensor's storage; a new one is alive until Python and autograd have both let go of it."""
        key = storage_key(tensor)
        known = self._storages.get(key)
        if known is not None:
            return known
        untyped = tensor.untyped_storage()
        size = int(untyped.nbytes())
        serial = next(self._serials)

        def released(_: Any) -> None:
            """Its address may come again for another storage."""
            self._storages.pop(key, None)
            if counted:
                self.live_bytes -= size
            if not self.sealed:
                self.saved.pop(serial, None)  # a part of the graph that led nowhere was dropped

        entry = self._storages[key] = _Storage(serial, size, role, name, weakref.ref(untyped, released))
        if counted:
            self.live_bytes += size
            self._high = max(self._high, self.live_bytes)
        return entry


@dataclass
class _Storage:
    """A storage that is alive: a number that is never used again, and what it was declared as."""

    serial: int
    size: int
    role: str
    name: str
    alive: weakref.ref[Any]


def fingerprint(tape: Tape) -> str:
    """A digest of the ops so far, their settings, and their operands' shapes and dtypes."""
    digest = hashlib.blake2b(digest_size=16)

    def described(value: Any) -> Any:
        if isinstance(value, Ref):
            return (tape.values[value.number].shape, tape.values[value.number].dtype)
        return [described(item) for item in value] if isinstance(value, list | tuple) else value

    for op in tape.ops:
        digest.update(repr((str(op.func), [described(x) for x in (*op.args, *op.kwargs.items())])).encode())
    return digest.hexdigest()


def referred(args: Any, kwargs: Any, number: Callable[[torch.Tensor], int]) -> tuple[Any, Any, tuple[int, ...]]:
    """An op's arguments with `Ref`s in the place of tensors, in lists too, and the tensors' numbers in order."""
    numbers: list[int] = []

    def refer(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            numbers.append(number(value))
            return Ref(numbers[-1])
        return [refer(item) for item in value] if isinstance(value, list | tuple) else value

    return tuple(map(refer, args)), {key: refer(value) for key, value in kwargs.items()}, tuple(numbers)


class Recorder(Execution):
    """Executes and records. Enter it once; choose the tape with `onto(tape)`; `None` records nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: Tape | None = None
        self.modules: list[str] = []

    @contextlib.contextmanager
    def onto(self, tape: Tape | None) -> Iterator[None]:
        """Write to `tape` within the block, then to the one before."""
        before, self.tape = self.tape, tape
        try:
            yield
        finally:
            self.tape = before

    @contextlib.contextmanager
    def watching_saved(self) -> Iterator[None]:
        """Note on the current tape what autograd saves; meant to be entered once around everything."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            tape = self.tape
            if tape is not None:
                tape.save(tensor, next_node_number() - 1)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op and write it down."""
        kwargs = kwargs or {}
        result = self.run(func, args, kwargs)
        if func is not prim_device:
            self.write(func, args, kwargs, result)
        return result

    def write(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Put one op on the current tape, with its operands and results."""
        tape = self.tape
        if tape is None:
            return
        if func.name().startswith(_SILENT):
            if func.name().startswith("aten::detach"):
                tape.same(result, args[0])
            return
        ref_args, ref_kwargs, inputs = referred(args, kwargs, tape.number)
        outputs = tuple(tape.made(tensor, len(tape.ops)) for tensor in results(result))
        backward = running_node_number()
        read, written = costs.traffic(func, args, kwargs, result)
        tape.ops.append(
            CostedOp(
                func,
                ref_args,
                ref_kwargs,
                inputs,
                outputs,
                self.modules[-1] if self.modules else "",
                node=backward if backward >= 0 else next_node_number() - 1,
                position=tape.position,
                flops=costs.flops_of(func, args, kwargs, result),
                read_bytes=read,
                written_bytes=written,
                matmul=costs.matmul_shape(func, args),
                causal=costs.is_causal(func, args, kwargs),
            )
        )
        tape.level()
