"""The only file that touches private or version-dependent names of torch (tried on 2.11 to 2.13).

Each borrowed name has a line saying why it is needed; everything else in the package uses torch's public, stable API.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A host read or an output whose size depends on values: raised by fake tensors, turned into a sentence.
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException

# Tensors with a device and strides but no memory; torch.compile and torch.export stand on them.
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException
from torch.distributed.fsdp import FSDPModule

# Nested containers of tensors; torch has no public name for them.
from torch.utils import _pytree as pytree

# The one way to see each ATen op below autograd (used by torch's own FlopCounterMode), and to step outside of it.
from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_unflatten as tree_unflatten

T = TypeVar("T")

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


def fsdp_unsharded_parameters(module: FSDPModule) -> list[tuple[nn.Parameter, Tensor]]:
    """Return (sharded, unsharded) for every parameter of an FSDP2 unit, which is gathered once: all ranks must call it.

    Autograd accumulates into the unsharded parameter, which FSDP2 does not expose: a hook on it is the only way to learn
    whether this rank's backward used the parameter.
    """
    module.unshard()
    found = [
        (parameter.sharded_param, parameter.unsharded_param) for group in _param_groups(module) for parameter in group.fsdp_params
    ]
    module.reshard()
    return found


def _param_groups(module: FSDPModule) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # 2.12 and later: several groups a module
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return list(groups)


def fsdp_groups(root: nn.Module) -> Iterator[tuple[FSDPModule, Any, list[nn.Parameter]]]:
    """Yield each FSDP2 unit below `root`, its group (what is gathered and reduced together) and the sharded parameters."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            for group in _param_groups(module):
                yield module, group, [parameter.sharded_param for parameter in group.fsdp_params]


def fsdp_around(group: Any, method: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` around an FSDP2 group's `unshard` or `post_backward`, at this one object.

    FSDP2 has no hook for when it reads a unit's shards, nor for when the unit's gradients have all been reduced. 2.11 to 2.13.
    """
    original = getattr(group, method)

    def around(*arguments: Any, **keywords: Any) -> Any:
        before()
        result = original(*arguments, **keywords)
        after()
        return result

    setattr(group, method, around)


def fsdp_around_gather(group: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` before an FSDP2 group reads its shards, and `after` once it has (a group of one rank: when it waits)."""
    alone = group._all_gather_process_group.size() == 1
    fsdp_around(group, "unshard", before, _nothing if alone else after)
    if alone:
        fsdp_around(group, "wait_for_unshard", _nothing, after)


def _nothing() -> None:
    pass


def fsdp_is_gathered(group: Any) -> bool:
    """Whether `unshard` of an FSDP2 group has nothing to do. 2.11 to 2.13."""
    return bool(group.is_unsharded) or group._all_gather_result is not None


def fsdp_wait_for_gradients(group: Any) -> None:
    """Let what is launched from now on wait for an FSDP2 group's reduced gradients. 2.11 to 2.13."""
    if group._post_reduce_event is not None:
        group.device_handle.current_stream().wait_event(group._post_reduce_event)


def fsdp_wait_for_copy_in(group: Any) -> None:
    """Let what is launched from now on wait until an FSDP2 group's shards have been read by its all-gather. 2.11 to 2.13."""
    stream = getattr(group.comm_ctx, "all_gather_copy_in_stream", None)
    if stream is not None:
        group.device_handle.current_stream().wait_stream(stream)


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return what `saved_tensors_hooks` has put up, to keep a tensor beside the graph as autograd would; 2.11 to 2.13."""
    found: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = torch._C._autograd._top_saved_tensors_default_hooks(
        True
    )
    return found


def lock_pages(memory: Tensor) -> bool:
    """Lock the pages of CPU memory for copies to and from a GPU, by CUDA itself; returns whether it could."""
    portable = 1  # `cudaHostRegisterPortable`
    return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable)) == 0


def unlock_pages(memory: Tensor) -> None:
    """Undo `lock_pages`, once no copy is under way."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def in_backward() -> bool:
    """Whether a backward is running; a forward in it is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def local_of(tensor: Tensor) -> Tensor:
    """Return a DTensor's local tensor; `to_local()` is differentiable, and costs ten times as much where nobody differentiates."""
    return cast(Tensor, tensor._local_tensor)  # type: ignore[attr-defined]


def fsdp_reduce_unused(root: FSDPModule) -> None:
    """Let FSDP2 reduce zeros for parameters that a rank's backward did not use, so that ranks may differ."""
    setter = getattr(root, "set_reduce_scatter_unused_params", None)  # 2.13 and later
    if setter is not None:
        setter(True)
        return
    for _, group, _ in fsdp_groups(cast(nn.Module, root)):
        fsdp_around(group, "post_backward", partial(_add_zeros, group), _nothing)


def _add_zeros(group: Any) -> None:
    for parameter in group.fsdp_params:
        whole = getattr(parameter, "_unsharded_param", None)
        if whole is not None and whole.requires_grad and whole.grad is None and parameter.unsharded_accumulated_grad is None:
            whole.grad = torch.zeros_like(whole)


def fsdp_reset(root: FSDPModule) -> None:
    """Bring FSDP2 back to a clean state after an exception in mid-step, where the version can."""
    reset = getattr(root, "reset_iter_state", None)
    if reset is not None and root._get_fsdp_state()._is_root:  # None before the first forward: nothing to reset
        reset()


@contextmanager
def fsdp_silenced(root: nn.Module) -> Iterator[None]:
    """Run modules below `root` without FSDP2's forward hooks, which would gather and free parameters."""
    kept = []
    for module in root.modules():
        if isinstance(module, FSDPModule):
            kept.append((module, module._forward_pre_hooks, module._forward_hooks))
            module._forward_pre_hooks = _without_fsdp(module._forward_pre_hooks)
            module._forward_hooks = _without_fsdp(module._forward_hooks)
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after


@contextmanager
def only_fsdp_hooks(module: nn.Module) -> Iterator[None]:
    """Call `module` with FSDP2's forward hooks and no others."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks, module._forward_hooks = _only_fsdp(before), _only_fsdp(after)
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = before, after


def _only_fsdp(hooks: Any) -> Any:
    return type(hooks)((key, hook) for key, hook in hooks.items() if "fsdp" in _home(hook))


def _without_fsdp(hooks: Any) -> Any:
    return type(hooks)((key, hook) for key, hook in hooks.items() if "fsdp" not in _home(hook))


def _home(hook: Any) -> str:
    wrapped = getattr(hook, "__wrapped__", hook)
    owner = getattr(wrapped, "__self__", None)
    return f"{getattr(wrapped, '__module__', '')} {type(owner).__module__}".lower()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Run without autocast: a program's casts are its own ops."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def autocast_of_traces() -> Any:
    """Return a context in which a trace gets the casts that a GPU's run has: its tensors are the CPU's, which autocast for CUDA
    leaves alone.
    """
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.get_autocast_dtype("cuda"), cache_enabled=False)


def seeded_default_generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators that dropout draws from on this rank: the CPU's, and the CUDA device's if there is one."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def tree_map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return `tree` (nested tuples, lists, dicts, dataclasses that torch knows) with `function` applied to each tensor."""
    return pytree.tree_map_only(Tensor, function, tree)


def leaves_of(tree: Any) -> list[Any]:
    """Return every leaf of a nested container, in order."""
    return list(pytree.tree_leaves(tree))


prim_device = torch.ops.prim.device.default


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


# Attention with its log-sum-exp (partition/context.py): torch's public function keeps it to itself


def has_attention_kernel(dtype: torch.dtype) -> bool:
    """Whether there is a kernel that returns the log-sum-exp, for this dtype and the device at hand."""
    return dtype in (torch.float16, torch.bfloat16) or not torch.cuda.is_available()


def logsum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the log-sum-exp for queries of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def attention_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return (attention [B, H, S, D], log-sum-exp [B, H, S]) of equal heads. Tried on CPU; the CUDA call is by its schema."""
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsum: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, from the attention and log-sum-exp over all keys, these being some of them."""
    logsum = logsum.contiguous()
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = kernel(gradient, query, key, value, out, logsum, 0.0, causal, scale=scale)
    else:
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        sizes = (None, None, query.shape[2], key.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
        found = kernel(gradient, query, key, value, out, logsum, *sizes, 0.0, causal, seed, seed, scale=scale)
    return found[0], found[1], found[2]


# Capture (blueprint/) and deferred initialisation


class DispatchMode(_TorchDispatchMode):
    """A mode that sees every ATen op while it is entered: override `__torch_dispatch__(func, types, args, kwargs)`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True (the default) wraps each dispatch in torch._dynamo.disable, whose import alone takes more than a second.
        return False


class FakeMode(FakeTensorMode):
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
    return int(torch.autograd._get_sequence_nr())


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


def written(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], kind: type[T]) -> list[T]:
    """Return the arguments of type `kind` that an ATen op writes into, by its schema; none for anything else. Tried as above."""
    if not isinstance(op, torch._ops.OpOverload):
        return []
    given = [args[at] if at < len(args) else kwargs.get(a.name) for at, a in enumerate(op._schema.arguments)]
    marked = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]
    return [value for value, is_written in zip(given, marked, strict=True) if is_written and isinstance(value, kind)]
