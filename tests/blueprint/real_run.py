"""What a real run on CPU does, seen with torch's own instruments only: the ops dispatched, FLOPs, and storages that
autograd saves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
SILENT = ("prim.", "aten.detach", "aten.lift_fresh", "aten.is_same_size", "aten._local_scalar_dense", "aten.alias.")


class OpNames(TorchDispatchMode):
    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.names: list[str] = []
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(SILENT):
            self.names.append(str(func))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.follow(tensor.untyped_storage())
        return result

    def follow(self, storage: Any) -> None:
        """Count the bytes of a storage made here until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def released(_: Any) -> None:
            self.live -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, released)
        self.live += size
        self.peak = max(self.peak, self.live)


def repeated(q: Any, k: Any) -> Any:
    """A shape of keys or values with a head for each of the queries': torch's formulas know no groups before 2.13."""
    return (*q[:-2], *k[-2:])


def attention_forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, repeated(q, k), repeated(q, v))


def attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, repeated(q, k), repeated(q, v))


def grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[-1]  # each row meets one group's matrix


# FlopCounterMode counts CPU attention and grouped products as zero: torch's own attention formula, 2 m n k for the
# other.
UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten._grouped_mm: grouped,
}


@dataclass
class Run:
    forward_ops: list[str]
    backward_ops: list[str]
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    saved_without_state: int
    forward_peak: int
    backward_peak: int


def measure(call: Callable[[], Any], ends: list[Tensor], state: list[Tensor], inputs: list[Tensor]) -> Run:
    """Run forward and backward for real; `state` are the tensors that are not counted in `saved_without_state`."""
    saved: dict[int, int] = {}
    held: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata

        def released(_: Any) -> None:
            # What a part of the graph that led nowhere had saved is freed during the forward: it is not kept for
            # backward.
            saved.pop(key, None)

        if key not in saved:
            saved[key], held[key] = storage.nbytes(), weakref.ref(storage, released)
        return tensor

    names, flops = OpNames([*state, *inputs]), FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with flops, names, saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    forward_ops, forward_flops = names.names, flops.get_total_flops()
    known = {tensor.untyped_storage()._cdata for tensor in state}
    total = sum(saved.values())
    without = sum(size for key, size in saved.items() if key not in known)
    roots = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    flops, forward_peak = FlopCounterMode(display=False, custom_mapping=UNCOUNTED), names.peak
    names.names, names.peak = [], names.live
    gradients = [torch.ones_like(root) for root in roots]
    names.seen |= {gradient.untyped_storage()._cdata: None for gradient in gradients}
    with flops, names:
        torch.autograd.grad(roots, ends, gradients, allow_unused=True)
    peaks = forward_peak, names.peak
    return Run(forward_ops, names.names, forward_flops, flops.get_total_flops(), total, without, *peaks)


def whole_model(model: nn.Module, batch: Any) -> Run:
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = [*model.parameters(), *model.buffers(), *(x for x in tree_leaves(batch) if isinstance(x, Tensor))]
    call = (lambda: model(**batch)) if isinstance(batch, dict) else lambda: model(batch)
    return measure(call, parameters, state, [])


def one_block(model: nn.Module, name: str, batch: Any) -> Run:
    """Run the model until `name` is called, then that block alone on what it was given."""
    block, given = model.get_submodule(name), []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((args, kwargs))

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    leaves: list[Tensor] = []
    copies: dict[int, Tensor] = {}

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        if id(value) not in copies:
            leaves.append(value.detach().requires_grad_())
            copies[id(value)] = leaves[-1].clone()
        return copies[id(value)]

    args, kwargs = tree_map(fresh, given[0])
    ends = leaves + [p for p in block.parameters() if p.requires_grad]
    given_tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    state = [*block.parameters(), *block.buffers()]
    return measure(lambda: block(*args, **kwargs), ends, state, given_tensors)
