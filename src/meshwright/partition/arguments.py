"""Arguments of ATen ops: the sizes that a rank's part changes, in-place ops without their side effect, device-free kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright._torch import is_in_place
from meshwright.blueprint import costs
from meshwright.blueprint.tape import RawOp, Ref, Value
from meshwright.partition.state import Axis, State

aten = torch.ops.aten

Op = TypeVar("Op", bound=RawOp)


def writes(func: Any) -> bool:
    """Whether an op writes into its first argument."""
    return isinstance(func, torch._ops.OpOverload) and is_in_place(func)


def kind_of(func: Any) -> str:
    """The kind of an ATen op (`costs.kind_of`), empty for an op of this package."""
    return costs.kind_of(func) if isinstance(func, torch._ops.OpOverload) else ""


def functional(func: Any) -> Any:
    """The op that returns what an in-place op would write, or None if there is none."""
    if func in _FUNCTIONAL:
        return _FUNCTIONAL[func]
    packet = getattr(aten, costs.base_name(func), None)
    overload = getattr(packet, func._overloadname, None) if packet is not None else None
    return overload if overload is not None and not is_in_place(overload) else None


def left_out(op: RawOp) -> tuple[Any, ...]:
    """Arguments of an op that were not given, as its schema has them: the op in its place may have no default."""
    rest = op.func._schema.arguments[len(op.args) :]
    given = [a for a in rest if not a.kwarg_only and a.name not in op.kwargs]
    return tuple(a.default_value for a in given if a.has_default_value())


_FUNCTIONAL = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.zero_.default: aten.zeros_like.default,
    aten.normal_.default: aten.normal_functional.default,
}


def is_random(op: RawOp) -> bool:
    """Whether an op draws random numbers. torch tags those that may; an attention kernel does so only with dropout."""
    found = attention(op)
    tags = op.func.tags if found is None else found[0].tags
    return torch.Tag.nondeterministic_seeded in tags


class Attention:
    """Scaled dot-product attention by whatever kernel fits the operands: query [B, H, S, D], key and value [B, G, T, D]."""

    def __init__(self, dropout: float, causal: bool, scale: float | None) -> None:
        self.dropout, self.causal, self.scale = dropout, causal, scale
        self.tags = (torch.Tag.nondeterministic_seeded,) if dropout > 0.0 else ()
        self.__name__ = "attention"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [B, H, S, D of value]."""
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, mask, self.dropout, self.causal, scale=self.scale, enable_gqa=grouped
        )


def attention(op: RawOp) -> tuple[Attention, list[Any]] | None:
    """The attention that a kernel op computes and its operands (query, key, value, mask or None); None for another op."""
    name = costs.base_name(op.func)
    if name not in costs.ATTENTION:
        return None
    arguments = {a.name: value for a, value in zip(op.func._schema.arguments, op.args, strict=False)} | op.kwargs
    made = Attention(arguments.get("dropout_p", 0.0), bool(arguments.get("is_causal", False)), arguments.get("scale"))
    mask = arguments.get("attn_mask", arguments.get("attn_bias"))
    return made, [arguments["query"], arguments["key"], arguments["value"], mask]


def runnable(func: Any) -> Any:
    """The function to call for an op on whole operands: `view` may meet other strides than those it was traced with."""
    if isinstance(func, torch._ops.OpOverload) and func in (aten.view.default, aten._unsafe_view.default):
        return aten.reshape.default
    return func


def whole(op: Op) -> Op:
    """An op as a rank runs it on whole operands: a trace has the CPU's kernels, whatever device the program is for."""
    found = attention(op)
    if found is None:
        return replace(op, func=runnable(op.func))
    made, operands = found
    inputs = tuple(operand.number for operand in operands if isinstance(operand, Ref))
    return replace(op, func=made, args=tuple(operands), kwargs={}, inputs=inputs, outputs=op.outputs[:1])


def localize(
    op: RawOp, args: tuple[Any, ...], shapes: list[tuple[int, ...]], source: State, axis: Axis, values: list[Value]
) -> tuple[Any, tuple[Any, ...]]:
    """The function and arguments for this rank's part of an op: `shapes` are its results', `source` its first operand's state."""
    name = costs.base_name(op.func)
    if name in costs.RESHAPES and op.func is not aten.view.dtype:
        return aten.reshape.default, (args[0], list(shapes[0]))
    if name == "expand":
        return op.func, (args[0], list(shapes[0]), *args[2:])
    if name in ("split", "split_with_sizes") and source.is_cut:
        dim = _dim(op, 2, values)
        if dim == source.dim:
            return aten.split_with_sizes.default, (args[0], [shape[dim] for shape in shapes], dim)
    if name == "slice" and source.is_cut and _dim(op, 1, values) == source.dim:
        return _slice(op, args, shapes[0], source, axis)
    if name == "convolution" and source.is_cut and source.dim == 1 and int(args[8]) > 1:
        return op.func, (*args[:8], axis.length(source.label))  # type: ignore[arg-type]  # depthwise: a group per channel
    return op.func, args


def _dim(op: RawOp, place: int, values: list[Value]) -> int:
    given = op.args[place] if len(op.args) > place else op.kwargs.get("dim", 0)
    return int(given) % max(len(values[op.inputs[0]].shape), 1)


def _slice(op: RawOp, args: tuple[Any, ...], shape: tuple[int, ...], source: State, axis: Axis) -> tuple[Any, tuple[Any, ...]]:
    assert source.label is not None
    start = int(args[2] or 0) if len(args) > 2 else 0
    step = int(args[4]) if len(args) > 4 else 1
    size = source.label.size
    if start < 0:
        start += size
    if step > 1:
        return op.func, (args[0], source.dim, start, 2**63 - 1, step)
    # Whole segments are taken: what a rank holds of the segments before is where its part begins.
    before, at = 0, 0
    for segment in list(source.label.segments) * source.label.repeat:
        if at >= start:
            break
        before += sum(length for _, length in axis.chunks(segment)[axis.rank])
        at += segment
    return op.func, (args[0], source.dim, before, before + shape[source.dim], 1)
