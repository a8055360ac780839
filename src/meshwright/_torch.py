"""The only file that touches private or version-dependent torch names; each says why it is needed and which versions
were tried.
"""

from __future__ import annotations

# --- capture (blueprint/) ------------------------------------------------------------------------------------------
from typing import Any

import torch

# The one way to see each ATen op below autograd. Private path since 1.13, used by torch's own FlopCounterMode.
# 2.11-2.13.
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException

# A host read or an output whose size depends on values: raised by fake tensors, turned into a sentence. 2.11-2.13.
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException

# Tensors with a device and strides but no memory; torch.compile and torch.export stand on them. 2.11-2.13.
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode

# Flattening the arguments of one ATen op (lists of tensors included). 2.11-2.13.
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_unflatten as tree_unflatten


class DispatchMode(_TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its constructor without types
    """A mode that sees every ATen op while it is entered: override `__torch_dispatch__(func, types, args, kwargs)`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True (the default) wraps each dispatch in torch._dynamo.disable, whose import alone takes more than a second.
        return False


class FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]  # as above
    """`FakeTensorMode` without the wrapper that imports `torch._dynamo` at the first op. Tried on 2.11 to 2.13."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op on fake tensors."""
        return self.dispatch(func, types, args, kwargs)


def storage_key(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage object: equal for views of one storage, also where no memory is behind it.

    `data_ptr()` is 0 for every fake tensor, so the private `_cdata` is the only identity. Tried on 2.11 to 2.13.
    """
    return int(tensor.untyped_storage()._cdata)


def next_node_number() -> int:
    """The number that the next autograd node will get; the op being dispatched made the one before. 2.11 to 2.13."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def running_node_number() -> int:
    """The number of the autograd node whose backward is running, or -1 outside a backward. Tried on 2.11 to 2.13."""
    node: Any = torch._C._current_autograd_node()
    if node is None:
        return -1
    number = int(node._sequence_nr())
    return number if number < 1 << 62 else -1  # accumulating into a leaf has the largest number


def is_functional_view(op: Any) -> bool:
    """Whether an ATen op only returns an alias of its input, by its schema. Tried on 2.11 to 2.13."""
    arguments = op._schema.arguments
    aliases = [a.alias_info for a in arguments if a.alias_info is not None]
    returned = [r.alias_info for r in op._schema.returns if r.alias_info is not None]
    return bool(aliases) and bool(returned) and not any(alias.is_write for alias in aliases)


def is_in_place(op: Any) -> bool:
    """Whether an ATen op writes into one of its arguments, by its schema. Tried on 2.11 to 2.13."""
    return any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
