"""Initial values that are the same for every mesh.

A factory is run once with every tensor on the meta device, where nothing is allocated, while the tensor operations of its
constructors are written down. Any parameter or buffer can then be made for real, one at a time, by running again just the
operations that its value depends on. Each random operation draws from a seed of its own, made of the run's seed and the
operation's ordinal, so a value depends on the seed and the model's code, never on the mesh, and no rank need hold more than
one whole tensor. (Deferred initialisation as in torchdistX; there the operations share one generator.)

To the factory its tensors look like CPU tensors, because initialisers skip their work on tensors that say they are meta. A
constructor that reads a value (`.item()`, `.tolist()`, a rejection loop) gets the real one, made on the spot.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meshwright import _torch
from meshwright._torch import DispatchMode, storage_key, tensors_of, tree_map_tensors
from meshwright.errors import ModelError
from meshwright.parallel.parameters import Parameter, replace_live

_META = torch.device("meta")
_IS_META, _DEVICE = (getattr(Tensor, name).__get__ for name in ("is_meta", "device"))
_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_FILLS = {
    *(torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default, torch.ops.aten.zero_.default),
    *(torch.ops.aten.fill_.Scalar, torch.ops.aten.copy_.default),
}
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part and nothing else: the same on every rank and machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def build(factory: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Recording | None]:
    """Run a zero-argument factory on the meta device; return the module and the recording that can fill it.

    A factory that can't run so (it hands tensors to other libraries, say) is run on the CPU under the same seed instead, with a
    warning that every rank then holds the whole model once; the recording is None.
    """
    recording = Recording(seed)
    with _seeded(seed):
        try:
            with _LooksLikeCpu(recording), _Record(recording):
                module = factory()
        except Exception as error:
            reason = str(error).split("\n")[0]
            warnings.warn(
                f"the factory can't be run on the meta device ({reason}): every rank builds the whole model on the CPU once",
                stacklevel=2,
            )
        else:
            return _checked(module), recording
    with _seeded(seed):
        return _checked(factory()), None


def _checked(module: object) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise ModelError(f"the factory returned a {type(module).__name__}, not an nn.Module")
    return module


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators, and put them back afterwards."""
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)


@dataclass
class _Operation:
    """One dispatched operation, or (`function` None) a tensor that had its values already.

    Tensors are kept as aliases made at the time: `x.data = y` may give the caller's tensor other storage later.
    """

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: list[Tensor]
    seed: int | None = None
    constant: Tensor | None = None


class Recording:
    """The operations that built a module on the meta device, replayable tensor by tensor."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._operations: list[_Operation] = []
        self._writers: dict[int, list[int]] = {}  # storage -> the operations that made or changed it, in order
        self._random_operations = 0

    def add(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        """Write down one operation and its meta results."""
        kept_arguments, kept_keywords = tree_map_tensors(Tensor.detach, (arguments, keywords))
        operation = _Operation(function, kept_arguments, kept_keywords, [t.detach() for t in tensors_of(result)])
        if torch.Tag.nondeterministic_seeded in function.tags:
            operation.seed = derive_seed(self.seed, self._random_operations)
            self._random_operations += 1
        touched = {storage_key(tensor) for tensor in operation.outputs}
        for argument, value in zip(function._schema.arguments, arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                touched |= {storage_key(tensor) for tensor in tensors_of(value)}
        self._append(operation, touched)

    def add_constant(self, value: Tensor) -> Tensor:
        """Return a meta stand-in for a tensor that has its values already, such as `torch.tensor([1.0, 2.0])`."""
        stand_in = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=_META)
        kept = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype).copy_(value)
        self._append(_Operation(None, (), {}, [stand_in.detach()], constant=kept), {storage_key(stand_in)})
        return stand_in

    def _append(self, operation: _Operation, touched: set[int]) -> None:
        for storage in touched:
            self._writers.setdefault(storage, []).append(len(self._operations))
        self._operations.append(operation)

    def knows(self, tensor: Tensor) -> bool:
        """Return whether the tensor was made under this recording."""
        return tensor.is_meta and storage_key(tensor) in self._writers

    def value(self, tensor: Tensor) -> Tensor:
        """Return the real value, on the CPU and in full shape, of a meta tensor that was made under this recording."""
        real: dict[int, torch.UntypedStorage] = {}
        with _torch.outside_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for index in sorted(self._needed(tensor)):
                self._replay(self._operations[index], real)
            found = _real(tensor, real)
            return found if found.nbytes == found.untyped_storage().nbytes() else found.clone()

    def _needed(self, tensor: Tensor) -> set[int]:
        """Return the operations that the tensor's storage depends on, walking back through the writers of each storage.

        What was there before a storage was filled (by a layer's own initialiser, say) is not drawn. It still has to be made.
        """
        needed: set[int] = set()
        pending = [(storage_key(tensor), len(self._operations))]
        while pending:
            storage, before = pending.pop()
            writers = [index for index in self._writers.get(storage, ()) if index < before]
            filled = next((place for place in range(len(writers) - 1, 0, -1) if self._fills(writers[place], storage)), 0)
            for index in {*writers[:1], *writers[filled:]} - needed:
                needed.add(index)
                operation = self._operations[index]
                own = 1 if filled and index == writers[filled] else 0  # what it fills it does not read
                for argument in tensors_of((operation.arguments[own:], operation.keywords)):
                    pending.append((storage_key(argument), index))
        return needed

    def _fills(self, index: int, storage: int) -> bool:
        """Whether an operation gives every element of a storage a value that depends on none of them."""
        operation = self._operations[index]
        if operation.function not in _FILLS:
            return False
        target, *others = tensors_of((operation.arguments, operation.keywords))
        whole = target.is_contiguous() and target.nbytes == target.untyped_storage().nbytes()
        return whole and storage_key(target) == storage and all(storage_key(other) != storage for other in others)

    def _replay(self, operation: _Operation, real: dict[int, torch.UntypedStorage]) -> None:
        if operation.constant is not None:
            real[storage_key(operation.outputs[0])] = operation.constant.clone().untyped_storage()
            return
        arguments, keywords = tree_map_tensors(lambda t: _real(t, real), (operation.arguments, operation.keywords))
        if operation.seed is not None:
            torch.default_generator.manual_seed(operation.seed)
            if keywords.get("generator") is not None:
                keywords["generator"] = torch.Generator().manual_seed(operation.seed)
        if "device" in keywords:
            keywords["device"] = torch.device("cpu")
        values = tensors_of(operation.function(*arguments, **keywords))
        if operation.function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided):
            values[0].zero_()  # what the constructors leave unset must still be the same on every rank
        for output, value in zip(operation.outputs, values, strict=True):
            if value.stride() != output.stride():
                value = torch.empty_strided(output.size(), output.stride(), dtype=value.dtype).copy_(value)
            real.setdefault(storage_key(output), value.untyped_storage())


def _real(tensor: Tensor, real: dict[int, torch.UntypedStorage]) -> Tensor:
    """Return the real tensor that views the replayed storage as the meta tensor views its own."""
    storage = real.get(storage_key(tensor))
    if storage is None:
        raise ModelError(f"a tensor of shape {list(tensor.shape)} was changed outside torch's operations and can't be initialised")
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


class _Record(DispatchMode):
    """Sends every operation to the meta device and writes it down."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _torch.no_torch_function():
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, function: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].is_meta:
            return self.recording.value(arguments[0]).item()
        if function in _LIFTS:
            return self.recording.add_constant(arguments[0])

        def on_meta(tensor: Tensor) -> Tensor:
            return tensor if tensor.is_meta else self.recording.add_constant(tensor)

        arguments, keywords = tree_map_tensors(on_meta, (arguments, keywords))
        names = {argument.name for argument in function._schema.arguments}
        if "device" in names:
            keywords["device"] = _META
        keywords.pop("pin_memory", None)
        result = function(*arguments, **keywords)
        if "dtype" in names and keywords.get("dtype") is None and isinstance(result, Tensor) and not tensors_of(arguments):
            keywords["dtype"] = result.dtype  # the default dtype may be another one when this is replayed
        self.recording.add(function, arguments, keywords, result)
        return result


class _LooksLikeCpu(TorchFunctionMode):
    """Lets meta tensors answer as CPU tensors; reading a whole tensor gives its real values."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            with _torch.no_torch_function():
                meta = args[0].is_meta
            if meta and func in _READS:
                with _torch.outside_modes():
                    return func(self.recording.value(args[0]), *args[1:], **(kwargs or {}))
            if meta and func == _IS_META:
                return False
            if meta and func == _DEVICE:
                return torch.device("cpu")
        return func(*args, **(kwargs or {}))


def allocate(module: nn.Module, table: list[Parameter], device: torch.device) -> None:
    """Give memory to the buffers of a module on the meta device, and to those parameters that this pipeline rank holds."""
    for entry in table:
        if entry.here:
            empty = torch.empty_like(entry.live, device=device, requires_grad=False)
            replace_live(module, entry, nn.Parameter(empty, requires_grad=entry.trainable))
    made: dict[int, Tensor] = {}
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        made.setdefault(id(buffer), torch.empty_like(buffer, device=device))
        setattr(module.get_submodule(owner), attribute, made[id(buffer)])
