"""What one ATen op costs: its kind, FLOPs, bytes read and written, and the shape of its matrix product.

FLOPs come from torch's own registry (`torch.utils.flop_counter`) so that they equal `FlopCounterMode`; the kernels that
it counts as zero (attention on CPU, oneDNN's recurrent layers) are added here by the same conventions. Bytes are those
of a kernel that reads each operand and writes each result once; a gather reads what it returns, a view nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from meshwright._torch import is_functional_view
from meshwright.blueprint import execute

aten = torch.ops.aten

_MATMULS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "addmv", "mv", "dot", "mkldnn_rnn_layer"}
_EMBEDDINGS = {"embedding", "embedding_dense_backward", "_embedding_bag", "_embedding_bag_forward_only"}
_ROUTING = {"topk", "sort", "argsort", "nonzero", "one_hot", "bincount", "histc", "index", "index_put", "index_add", "gather"}
_ROUTING |= {"scatter", "scatter_add", "index_select", "unique", "_unique2", "searchsorted", "masked_select", "index_copy"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "prod", "var", "var_mean", "std", "any", "all", "argmax", "argmin"}
_REDUCTIONS |= {
    "_safe_softmax",
    "_softmax",
    "_log_softmax",
    "_softmax_backward_data",
    "_log_softmax_backward_data",
    "logsumexp",
    "norm",
}
_REDUCTIONS |= {"cumsum", "linalg_vector_norm", "nll_loss_forward", "nll_loss_backward", "mse_loss", "cumprod"}
_GATHERS = {"embedding", "index", "gather", "index_select", "slice", "select"}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}
_FREE = {"detach", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "alias"}


def base_name(func: Any) -> str:
    """`mm` for `aten.mm.default`, `add` for `aten.add_.Tensor`: the op without overload and in-place mark."""
    name = str(func.__name__).partition(".")[0]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def kind_of(func: Any) -> str:
    """`matmul`, `attention`, `conv`, `norm`, `embedding`, `routing`, `reduction`, `elementwise`, `view` or `copy`."""
    name = base_name(func)
    plain = name.removesuffix("_backward").removesuffix("_backward_data")
    if name in _FREE or is_functional_view(func):
        return "view"
    if plain in _MATMULS:
        return "matmul"
    if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
        return "attention"
    if "convolution" in name:
        return "conv"
    if "_norm" in name and not name.startswith(("linalg", "norm")):
        return "norm"
    if name in _EMBEDDINGS or plain in _EMBEDDINGS:
        return "embedding"
    if plain in _ROUTING:
        return "routing"
    if name in _REDUCTIONS:
        return "reduction"
    return "elementwise" if torch.Tag.pointwise in func.tags else "copy"


PRODUCTS = ("matmul", "attention", "conv")
"""Kinds of ops with FLOPs to speak of: those whose results may be worth keeping from a forward to its backward."""


@functools.lru_cache(maxsize=4096)
def is_product(func: Any) -> bool:
    """Whether an op is of one of these kinds."""
    return kind_of(func) in PRODUCTS


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of one call, a multiply and an add being two; attention counts the whole square even if it is causal."""
    formula = flop_registry.get(func.overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result))
    name = base_name(func)
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        (b, h, s, d), (t, e) = args[0].shape, args[2].shape[-2:]
        return int(2 * b * h * s * t * (d + e))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        (b, h, s, d), (t, e) = args[1].shape, args[3].shape[-2:]
        # The scores again, then the gradients of values, of scores, of queries and of keys.
        return int(2 * b * h * s * t * (3 * d + 2 * e))
    if name == "_grouped_mm":
        # Every row meets one group's matrix; with two 2-D operands the groups divide the dim that is summed over.
        return 2 * int(args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1]) * _stacked(args)
    if name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"):
        steps = args[0].numel() // args[0].shape[-1]
        return int((2 if name == "mkldnn_rnn_layer" else 4) * steps * (args[1].numel() + args[2].numel()))
    return 0


def matmul_shape(func: Any, args: Any) -> tuple[int, int, int, int] | None:
    """`(batch, m, n, k)` of a matrix product, None for any other op."""
    name = base_name(func)
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        a, b = (args[0], args[1]) if name in ("mm", "bmm") else (args[1], args[2])
        batch = a.shape[0] if a.dim() == 3 else 1
        return (int(batch), int(a.shape[-2]), int(b.shape[-1]), int(a.shape[-1]))
    if name == "_grouped_mm" and len(args) > 2 and args[2] is not None:
        groups, (m, k), n = int(args[2].shape[0]), args[0].shape[-2:], int(args[1].shape[-1])
        summed = args[0].dim() == 2 and args[1].dim() == 2
        return (groups, int(m), n, int(k) // groups) if summed else (groups, int(m) // groups, n, int(k))
    return None


def _stacked(args: Any) -> int:
    return int(args[0].shape[0]) if args[0].dim() == 3 and args[1].dim() == 3 else 1


def is_causal(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a fused attention skips the upper triangle: half of its counted FLOPs on kernels that exploit it."""
    if kind_of(func) != "attention":
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "is_causal":
            return bool(kwargs.get("is_causal", args[place] if place < len(args) else False))
    return False


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes that reading or writing `tensor` once moves: an expanded tensor has no more than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def traffic(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, int]:
    """Bytes read and written by one call."""
    if kind_of(func) == "view":
        return 0, 0
    operands = {id(x): x for x in execute.operands(args, kwargs)}
    results = {id(x): x for x in execute.results(result)}
    written = sum(map(tensor_bytes, results.values()))
    name = base_name(func)
    in_place = any(key in operands for key in results)
    if name in _GATHERS:
        return written + sum(tensor_bytes(x) for x in operands.values() if not x.is_floating_point()), written
    if in_place and name in ("index_add", "index_put", "scatter", "scatter_add", "index_copy"):
        moved = sum(tensor_bytes(x) for key, x in operands.items() if key not in results)
        return 2 * moved, moved
    if in_place and name in ("zero", "fill", "copy", "normal", "uniform", "bernoulli"):
        return sum(tensor_bytes(x) for key, x in operands.items() if key not in results), written
    return sum(map(tensor_bytes, operands.values())), written
