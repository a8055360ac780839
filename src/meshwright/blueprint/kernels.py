"""Kernels of the device that is planned for, where CUDA runs one kernel and CPU another or several.

A capture runs on fake CPU tensors, so that it works without a GPU; ATen then chooses CPU kernels. With this mode
entered, attention becomes the kernel that CUDA would choose (flash for 16-bit without a mask, else memory-efficient),
RMSNorm the fused one, which saves its input and one number per row, and dropout the one that saves a byte per element.
Nothing runs: the calls are written to the tape with results of the right shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from meshwright.blueprint.tape import Recorder

aten = torch.ops.aten

HALF = (torch.float16, torch.bfloat16)


class CudaKernels(TorchFunctionMode):
    """Enter it around a capture; every other function passes through."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace attention, RMSNorm and dropout."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.rms_norm or func is torch.rms_norm:  # the first hands on to the second
            return _rms_norm(self.recorder, *args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`[B, heads, S, D]` attention as CUDA runs it; the order of preference is that of `torch.nn.attention.SDPBackend`."""
    same_width = query.shape[-1] == value.shape[-1] <= 256
    out: torch.Tensor
    if attn_mask is None and query.dtype in HALF and same_width and query.dim() == 4:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    wants_gradient = any(tensor.requires_grad for tensor in (query, key, value))
    attend = aten._scaled_dot_product_efficient_attention
    out = attend(query, key, value, bias, wants_gradient, dropout_p, is_causal, scale=scale)[0]
    return out


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    out: torch.Tensor = aten.native_dropout(input, p, True)[0] if training and p > 0 else input
    return out


def _rms_norm(
    recorder: Recorder,
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    out: torch.Tensor = _FusedRmsNorm.apply(recorder, input, list(normalized_shape), weight, eps)  # type: ignore[no-untyped-call]
    return out


class _FusedRmsNorm(torch.autograd.Function):
    """Saves the input, the weight and one reciprocal root per row, as `aten._fused_rms_norm` does on CUDA."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, x: Any, shape: list[int], weight: Any, eps: float | None) -> torch.Tensor:
        """Write the kernel to the tape; `shape` are the normalised sizes."""
        rows = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
        accumulated = torch.float32 if x.dtype in HALF else x.dtype
        with recorder.onto(None):
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            root = torch.empty(rows, dtype=accumulated, device=x.device)
        recorder.write(aten._fused_rms_norm.default, (x, shape, weight, eps), {}, (out, root))
        ctx.recorder, ctx.shape = recorder, shape
        ctx.save_for_backward(x, weight, root)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Write the backward kernel to the tape."""
        x, weight, root = ctx.saved_tensors
        with ctx.recorder.onto(None):
            by_x = torch.empty_like(x)
            by_weight = torch.empty_like(weight) if weight is not None else None
        made = (by_x,) if by_weight is None else (by_x, by_weight)
        wanted = [ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
        operands = (gradients[0], x, ctx.shape, root, weight, wanted)
        ctx.recorder.write(aten._fused_rms_norm_backward.default, operands, {}, made)
        return None, by_x, None, by_weight, None
