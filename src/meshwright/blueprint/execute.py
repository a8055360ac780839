"""Running a model's Python without its numbers: float tensors are fake, small integer tensors are real.

Parameters, activations and float factories carry shape, dtype, strides and device but no memory. Integers and booleans
(token ids, masks, positions, routing choices) are what a model's Python branches on, so they are computed:
`mask.all()`, `nonzero()` and `for expert in hit` take the path that a real run takes, and a library that asks whether
its mask is a fake tensor is told no. Choices made from fake numbers (`topk`, `argmax`) become real and balanced: every
expert gets the same share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from meshwright._torch import DispatchMode, FakeMode, FakeTensor, is_functional_view, is_in_place, prim_device, tree_map_tensors
from meshwright.errors import ModelError, first_line

aten = torch.ops.aten

LARGEST_REAL = 1 << 22  # elements: 32 MiB of int64, above which values are not worth their memory
"""Integer tensors up to this many elements are computed for real."""


def operands(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among an ATen op's arguments, which are tensors or flat lists of them at most; in order, with
    repetitions.
    """
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def results(result: Any) -> list[torch.Tensor]:
    """The tensors that an ATen op has returned, in order."""
    return operands(result if isinstance(result, tuple | list) else (result,), {})


class Execution(DispatchMode):
    """A dispatch mode that runs every ATen op on fake tensors, except those whose operands are all real and small.

    While it is active, `torch.autograd` works as usual above it. Not thread safe; enter it around one capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeMode(allow_non_fake_inputs=True)
        self._stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def stand_in(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A fake CPU tensor with the sizes and strides of `tensor`; floats take `dtype` if it is given."""
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        with self.fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device="cpu")
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            made.requires_grad_()
        return made

    def imitation(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A stand-in; for a small integer tensor that has values a copy, since a model's Python may look at them."""
        has_values = not (tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.is_floating_point() or tensor.is_complex())
        if has_values and tensor.numel() <= LARGEST_REAL:
            return tensor.detach().cpu().clone()
        return self.stand_in(tensor, dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op; subclasses record it."""
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an ATen op: fake if any operand is, or if it would be a large or a float tensor."""
        if func is prim_device and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        tensors = operands(args, kwargs)
        fakes = sum(isinstance(tensor, FakeTensor) for tensor in tensors)
        if fakes < len(tensors) and any(t.is_meta and not isinstance(t, FakeTensor) for t in tensors):
            args, kwargs = tree_map_tensors(self._from_meta, (args, kwargs))
            tensors = operands(args, kwargs)
            fakes = len(tensors)
        if fakes:
            if func is aten._grouped_mm.default:
                return self._grouped_product(*args, **kwargs)
            if func in _INDEXED:
                args = (args[0], _without_masks(args[1]), *args[2:])
            with self.fake:
                result = func(*args, **kwargs)
            if func in _CHOOSERS:
                return _choices(func, args, kwargs, result)
            return _constant(func, args, kwargs, result) if func in _CONSTANTS else result
        free = is_in_place(func) or is_functional_view(func)  # a fake view would not share its base's storage
        if tensors and (free or math.prod(tensor.numel() for tensor in tensors) <= LARGEST_REAL):
            return func(*args, **kwargs)
        with self.fake:
            result = func(*args, **kwargs)
        made = results(result)
        # A float scalar may steer Python (a layer is dropped if `torch.rand([])` is small); larger floats are
        # activations.
        small = all(tensor.numel() <= LARGEST_REAL for tensor in made)
        if small and (tensors or all(not t.is_floating_point() or t.dim() == 0 for t in made)):
            return func(*args, **kwargs)
        return result

    def _grouped_product(self, a: torch.Tensor, b: torch.Tensor, offs: Any = None, *_: Any, **__: Any) -> torch.Tensor:
        """`aten._grouped_mm` in any dtype: torch's own shape rule admits bfloat16 only, its CPU kernel every float."""
        if a.dim() == 2 and b.dim() == 2:  # the groups divide what is summed over
            shape: tuple[int, ...] = (int(offs.shape[0]), a.shape[0], b.shape[1])
        elif a.dim() == 3 and b.dim() == 3:
            shape = (a.shape[0], a.shape[1], b.shape[2])
        else:
            shape = (a.shape[-2], b.shape[-1])
        aligned = 16 // a.element_size()  # the kernel pads rows to 16 bytes
        row = -(-shape[-1] // aligned) * aligned
        strides = (shape[1] * row, row, 1) if len(shape) == 3 else (row, 1)
        with self.fake:
            return torch.empty_strided(shape, strides, dtype=a.dtype, device="cpu")

    def _from_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        """A meta tensor that is no parameter or buffer (a plain attribute) gets one stand-in for the whole capture."""
        if not tensor.is_meta or isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._stand_ins:
            self._stand_ins[id(tensor)] = (tensor, self.stand_in(tensor))
        return self._stand_ins[id(tensor)][1]


class Blank(DispatchMode):
    """While a model is built on meta: initialisers do nothing, since there are no values (and torch's take a second to
    load).
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skip an in-place random fill of a meta tensor; run everything else."""
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The module that `build` makes, its parameters on meta, built in milliseconds. Raises `ModelError` if it makes none."""
    if not callable(build):
        raise ModelError(f"a model is a module or a callable that builds one, not {build!r}")
    try:
        with torch.device("meta"), Blank():
            module = build()
    except Exception as error:  # whatever a user's code raises
        raise ModelError(f"the model can't be built on the meta device: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"the callable that builds the model returned a {type(module).__name__}, not a torch.nn.Module")
    return module


_FILLS = {aten.normal_.default, aten.uniform_.default, aten.random_.default, aten.bernoulli_.float, aten.random_.to}
_FILLS |= {aten.exponential_.default, aten.log_normal_.default, aten.zero_.default, aten.fill_.Scalar}

_CHOOSERS: dict[Any, int] = {
    aten.topk.default: 2,  # the argument that is the dim chosen along
    aten.argmax.default: 1,
    aten.argmin.default: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.sort.default: 1,
    aten.sort.stable: -1,
    aten.argsort.default: 1,
}


_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Boolean indices whose values are known, as the positions that they select: their number is a size of the result."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        known = isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor)
        if known and index is not None and index.dtype in (torch.bool, torch.uint8):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


_CONSTANTS = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default} | {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}


def _constant(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: torch.Tensor) -> torch.Tensor:
    """A mask or an index made in the shape of a fake tensor holds known values: it becomes real."""
    if result.is_floating_point() or result.is_complex() or result.numel() > LARGEST_REAL:
        return result
    like = torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu")
    made: torch.Tensor = func(like, *args[1:], **kwargs)
    return made


def _choices(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
    """Replace the indices that an op chose among fake numbers by real ones that choose every candidate equally often."""
    place = _CHOOSERS[func]
    source = args[0]
    dim = kwargs.get("dim", args[place] if 0 <= place < len(args) else None)
    if func is aten.topk.default and dim is None:
        dim = -1
    candidates = source.numel() if dim is None or source.dim() == 0 else source.shape[dim]

    def decide(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int64 or tensor.numel() > LARGEST_REAL:
            return tensor
        # Consecutive slots of one token differ, and over all tokens each candidate comes up equally often.
        return (torch.arange(tensor.numel(), device="cpu") % max(candidates, 1)).reshape(tensor.shape)

    if isinstance(result, torch.Tensor):
        return decide(result)
    return type(result)(*map(decide, result)) if hasattr(result, "_fields") else tuple(map(decide, result))
