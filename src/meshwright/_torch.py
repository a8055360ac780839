"""The only file that touches private or version-dependent names of torch (tried on 2.11 to 2.13).

Each borrowed name has a line saying why it is needed; everything else in the package uses torch's public, stable API.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree  # nested containers of tensors; torch has no public name for them
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # to see every operation, and not to

__all__ = ["TorchDispatchMode"]

# torch 2.13 renamed these two and warns at every call of the old name; 2.11 knows only the old one.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def reduce_scatter(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start summing `source` [N * n] over the group; rank r's `output` [n] gets its r-th part (may alias that part)."""
    return cast(dist.Work, _reduce_scatter(output, source, group=group, async_op=True))


def all_gather(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start gathering every rank's `source` [n] into `output` [N * n] (source may alias this rank's part)."""
    return cast(dist.Work, _all_gather(output, source, group=group, async_op=True))


def default_store() -> dist.Store:
    """Return the key-value store of the default process group; torch gives no public access to it."""
    return dist.distributed_c10d._get_default_store()


def storage_identity(tensor: Tensor) -> int:
    """Return a number that two tensors share exactly when they share storage; meta tensors have no address to compare."""
    return int(tensor.untyped_storage()._cdata)


def fsdp_unsharded_parameters(root: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield (sharded, unsharded) for every FSDP2 parameter below `root`; gathers each unit once, so all ranks must call it.

    Autograd accumulates into the unsharded parameter, which FSDP2 does not expose: a hook on it is the only way to learn
    whether this rank's backward used the parameter.
    """
    for module in root.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.unshard()
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # 2.12 and later: several groups a module
        if groups is None:
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for group in groups:
            for parameter in group.fsdp_params:
                yield parameter.sharded_param, parameter.unsharded_param
        module.reshard()


def local_of(tensor: Tensor) -> Tensor:
    """Return a DTensor's local tensor; `to_local()` is differentiable, and costs ten times as much where nobody differentiates."""
    return cast(Tensor, tensor._local_tensor)  # type: ignore[attr-defined]


def fsdp_reduce_unused(root: FSDPModule) -> None:
    """Let FSDP2 reduce zeros for parameters that a rank's backward did not use, so that ranks may differ (2.13 and later)."""
    setter = getattr(root, "set_reduce_scatter_unused_params", None)
    if setter is not None:
        setter(True)


def fsdp_reset(root: FSDPModule) -> None:
    """Bring FSDP2 back to a clean state after an exception in mid-step, where the version can."""
    reset = getattr(root, "reset_iter_state", None)
    if reset is not None and root._get_fsdp_state()._is_root:  # None before the first forward: nothing to reset
        reset()


def seeded_default_generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators that dropout draws from on this rank: the CPU's, and the CUDA device's if there is one."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def tree_map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return `tree` (nested tuples, lists, dicts, dataclasses that torch knows) with `function` applied to each tensor."""
    return pytree.tree_map_only(Tensor, function, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a nested container, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def outside_modes() -> Iterator[None]:
    """Run plain torch inside a dispatch or function mode, without the mode seeing it."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def no_torch_function() -> Any:
    """Return a context in which no torch-function mode sees what is done; a dispatch handler needs it to look at tensors."""
    return torch._C.DisableTorchFunction()
