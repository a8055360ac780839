"""`loss_chunks`: the head and the loss in parts of the tokens, so that logits of one part live at a time, forward and backward.

Found from the ops. From the last matrix product backwards, one is looked for whose result [tokens, classes] is "wide": everything
that reads it, or what is made of it, is
- a move of whole rows (view, slice, transpose, ...): followed by moving the rows' numbers, so shifts and masks cost nothing,
- work within each row (casts, scales, biases, log-softmax, ...), with whatever else it takes: a number, a vector of the classes,
  or something that has the same rows, or
- an end: a reduction over the classes to one number per row, or to one number (cross-entropy, sums, label smoothing).
These ops become one, which runs them part by part under `torch.utils.checkpoint`: its backward makes a part's logits again. Bytes
alive: 1/N of the logits and of what the loss makes of them, instead of all; the head's product runs once more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshwright import _torch
from meshwright.blueprint import costs
from meshwright.blueprint.tape import Ref
from meshwright.errors import PlanError
from meshwright.partition.arguments import is_random
from meshwright.partition.local import ClassLoss, LogSoftmax
from meshwright.partition.trace import Trace, TracedOp, is_opaque

aten = torch.ops.aten

_MOVES = {
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "slice",
    "select",
    "transpose",
    "permute",
    "t",
    "unsqueeze",
    "squeeze",
}
_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_SAME = {"clone", "contiguous", "_to_copy", "alias", "detach"}
_REDUCED = {"sum", "mean", "amax", "amin", "logsumexp", "argmax", "max", "min"}
_MEAN, _SUM = 1, 2  # torch's numbers for the reductions of a loss


class _Unfit(Exception):
    """Why a product is not a head whose loss can be computed in parts."""


@dataclass(frozen=True)
class _Layout:
    """Where the rows of a wide value are: `rows` holds their numbers in the product's result, 1 in place of the classes' `dim`."""

    rows: Tensor
    dim: int

    def same(self, other: _Layout) -> bool:
        return self.dim == other.dim and torch.equal(self.rows, other.rows)


@dataclass
class _Step:
    """An op on one part: `args` has `Ref`s to wide values, and `_Side`s for whatever else the op takes."""

    func: Any
    args: Any
    kwargs: Any
    outputs: tuple[int, ...]
    grad: bool


@dataclass(frozen=True)
class _Side:
    """Another operand: the place among the op's operands, and how its rows are found (None: it has none and is taken whole)."""

    place: int
    layout: _Layout | None
    flat: bool = False
    """One number per row, as a loss's targets are, without the classes' dim."""


@dataclass
class _End:
    """A result: made of a part's rows, joined in the order of `layout`, then finished (`None`: as it is)."""

    number: int
    shape: tuple[int, ...]
    layout: _Layout
    finish: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, ...]] | None = None
    outputs: tuple[int, ...] = ()


def chunk_loss(trace: Trace, chunks: int) -> Trace:
    """Return the trace with its head and loss as one op that runs in `chunks` parts.

    Raises `PlanError` in a sentence that names the op that stands in the way.
    """
    graded = trace.graded()
    recorded = bool(set(trace.output_numbers()) & graded)  # not in an evaluation: there the last product counts
    reason = "no matrix product leads to the loss"
    seen = False
    for place in range(len(trace.ops) - 1, -1, -1):
        op = trace.ops[place]
        if costs.base_name(op.func) not in ("mm", "addmm") or (recorded and not set(op.outputs) & graded) or is_opaque(op):
            continue
        try:
            return _replaced(trace, _Region(trace, place), chunks)
        except _Unfit as unfit:
            reason = reason if seen else str(unfit)
            seen = True
    raise PlanError(f"loss_chunks={chunks}: the loss can't be computed in parts of the tokens, for {reason}: leave loss_chunks out")


class _Region:
    """The ops between a product and the ends that it leads to."""

    def __init__(self, trace: Trace, place: int) -> None:
        head = trace.ops[place]
        self.trace, self.head = trace, head
        (made,) = head.outputs
        self.tokens, self.classes = trace.values[made].shape
        if min(self.tokens, self.classes) < 2:
            raise _Unfit("its last product has a single row or column")
        self.wide = {made: _Layout(torch.arange(self.tokens).unsqueeze(1), 1)}
        self.operands: list[int] = []
        hidden = head.args[1 if costs.base_name(head.func) == "addmm" else 0]
        if costs.base_name(head.func) == "addmm" and len(trace.values[head.args[0].number].shape) > 1:
            raise _Unfit("what is added to its last product has rows")
        self.hidden = hidden.number
        self.steps = [_Step(head.func, self._sides(head.args), self._sides(head.kwargs), head.outputs, head.grad)]
        self.ends: list[_End] = []
        self.ops = {place}
        returned = set(trace.output_numbers())
        for at in range(place + 1, len(trace.ops)):
            op = trace.ops[at]
            if any(number in self.wide for number in op.inputs):
                self.ops.add(at)
                self._follow(op)
        if returned & set(self.wide):
            raise _Unfit("the logits themselves are returned")
        if not self.ends:
            raise _Unfit("nothing is made of the logits")
        self.rows = self.ends[0].layout.rows.flatten().sort().values
        for end in self.ends:
            if not torch.equal(end.layout.rows.flatten().sort().values, self.rows):
                raise _Unfit("parts of the loss are made of different tokens")

    def _place(self, number: int) -> int:
        if number not in self.operands:
            self.operands.append(number)
        return self.operands.index(number)

    def _sides(self, value: Any) -> Any:
        """The product's own operands: its rows are given part by part, the others whole."""
        if isinstance(value, Ref):
            return value if value.number == self.hidden else _Side(self._place(value.number), None)
        if isinstance(value, dict):
            return {key: self._sides(item) for key, item in value.items()}
        return type(value)(map(self._sides, value)) if isinstance(value, list | tuple) else value

    def _follow(self, op: TracedOp) -> None:
        name = costs.base_name(op.func)
        layout = next(self.wide[number] for number in op.inputs if number in self.wide)
        first = op.args[0] if op.args else None
        leads = isinstance(first, Ref) and first.number in self.wide
        if isinstance(op.func, torch._ops.OpOverload) and (is_random(op) or name == "empty_like"):
            raise _Unfit(f"{name} (in {op.module or 'the loss'}) draws random numbers for the logits")
        if name in _MOVES and leads:
            self._move(op, layout)
        elif name in ("_log_softmax", "_softmax") and leads and op.args[1] % layout.rows.dim() == layout.dim:
            self._step(op, layout, op.func, (first, -1, *op.args[2:]))
        elif isinstance(op.func, LogSoftmax) and op.func.dim is not None and op.func.dim % layout.rows.dim() == layout.dim:
            func = copy.copy(op.func)
            func.dim = -1
            self._step(op, layout, func, (first,))
        elif (name.startswith("nll_loss") and name.endswith("forward")) or isinstance(op.func, ClassLoss):
            self._class_loss(op, layout)
        elif name in _REDUCED and leads:
            self._reduce(op, layout)
        elif name == "gather" and leads:
            self._gather(op, layout)
        elif name in _SAME or (isinstance(op.func, torch._ops.OpOverload) and torch.Tag.pointwise in op.func.tags):
            self._elementwise(op, layout)
        else:
            raise _Unfit(f"{name} (in {op.module or 'the loss'}) does not work on one token at a time")

    def _move(self, op: TracedOp, layout: _Layout) -> None:
        """Whole rows go to other places: the same op on their numbers."""
        (made,) = op.outputs
        shape = self.trace.values[made].shape
        name = costs.base_name(op.func)
        if name in _RESHAPES:
            ahead = math.prod(layout.rows.shape[: layout.dim])
            fitting = [d for d, size in enumerate(shape) if size == self.classes and math.prod(shape[:d]) == ahead]
            if not fitting:
                raise _Unfit(f"{name} (in {op.module or 'the loss'}) mixes tokens and classes")
            rows = layout.rows.reshape(*shape[: fitting[0]], 1, *shape[fitting[0] + 1 :])
        else:
            rows = op.func(layout.rows, *op.args[1:], **op.kwargs)
        dims = [d for d, size in enumerate(shape) if size == self.classes and d < rows.dim() and rows.shape[d] == 1]
        if (
            rows.dim() != len(shape)
            or len(dims) != 1
            or any(r != s for d, (r, s) in enumerate(zip(rows.shape, shape, strict=False)) if d != dims[0])
        ):
            raise _Unfit(f"{name} (in {op.module or 'the loss'}) takes the classes apart")
        self.wide[made] = _Layout(rows, dims[0])
        self.steps.append(_Step(None, (op.args[0],), {}, op.outputs, True))

    def _step(self, op: TracedOp, layout: _Layout, func: Any, args: Any, kwargs: Any = None) -> None:
        self.wide.update(dict.fromkeys(op.outputs, layout))
        self.steps.append(_Step(func, args, kwargs or {}, op.outputs, op.grad))

    def _elementwise(self, op: TracedOp, layout: _Layout) -> None:
        """Work within rows; other operands are numbers, vectors of the classes, or have the rows of the wide ones."""
        (made,) = op.outputs
        shape = self.trace.values[made].shape

        def operand(value: Any) -> Any:
            if not isinstance(value, Ref):
                return type(value)(map(operand, value)) if isinstance(value, list | tuple) else value
            if value.number in self.wide:
                if not self.wide[value.number].same(layout):
                    raise _Unfit(f"{costs.base_name(op.func)} brings different tokens together")
                return value
            return self._aligned(value.number, layout)

        if len(shape) != layout.rows.dim() or shape[layout.dim] != self.classes:
            raise _Unfit(f"{costs.base_name(op.func)} (in {op.module or 'the loss'}) changes the shape of the logits")
        kwargs = {key: operand(value) for key, value in op.kwargs.items() if key not in ("memory_format", "device")}
        self._step(op, layout, op.func, tuple(operand(value) for value in op.args), kwargs)

    def _aligned(self, number: int, layout: _Layout) -> _Side:
        shape = self.trace.values[number].shape
        full = (1,) * (layout.rows.dim() - len(shape)) + tuple(shape)
        if len(full) > layout.rows.dim():
            raise _Unfit("something with more dims is added to the logits")
        has_rows = any(size > 1 for dim, size in enumerate(full) if dim != layout.dim)
        return _Side(self._place(number), layout if has_rows else _Layout(torch.empty(0), layout.dim))

    def _class_loss(self, op: TracedOp, layout: _Layout) -> None:
        """Cross-entropy by targets: one loss per row, then the reduction that it has."""
        scores, target, *rest = op.args
        is_cut = isinstance(op.func, ClassLoss)
        weight, reduction, ignore = (None, op.func.reduction, op.func.ignore) if is_cut else rest
        if scores.number not in self.wide or layout.dim != (1 if layout.rows.dim() > 1 else 0) or isinstance(target, Ref) is False:
            raise _Unfit(f"{costs.base_name(op.func)} has the classes elsewhere than it should")
        places = _Side(self._place(target.number), layout, flat=True)
        side = None if weight is None else _Side(self._place(weight.number), None)
        inner = -1 - len(self.ends)
        func: Any = aten.nll_loss_forward.default
        args: tuple[Any, ...] = (scores, places, side, 0, ignore)
        if is_cut:
            func, args = copy.copy(op.func), (scores, places)
            func.reduction = 0
        self.steps.append(_Step(func, args, {}, (inner,), op.grad))
        at, by = self._place(target.number), None if weight is None else self._place(weight.number)

        def finish(losses: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
            counted = operands[at] != ignore
            total = counted.sum().to(losses.dtype)
            if by is not None:
                total = operands[by][operands[at].masked_fill(~counted, 0)].masked_fill(~counted, 0.0).sum()
            result = losses if reduction == 0 else losses.sum()
            return (result / total if reduction == _MEAN else result, total)

        shape = tuple(size for dim, size in enumerate(layout.rows.shape) if dim != layout.dim)
        self.ends.append(_End(inner, shape, layout, finish, op.outputs))

    def _reduce(self, op: TracedOp, layout: _Layout) -> None:
        name, (made, *others) = costs.base_name(op.func), op.outputs
        dims = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
        given = [dims] if isinstance(dims, int) else list(dims or [])
        over = {dim % layout.rows.dim() for dim in given} or set(range(layout.rows.dim()))
        inner, shape = -1 - len(self.ends), tuple(self.trace.values[made].shape)
        if over == {layout.dim} and not others:
            single = isinstance(dims, int)
            rest = {key: value for key, value in op.kwargs.items() if key not in ("dim", "keepdim")}
            self.steps.append(_Step(op.func, (op.args[0], -1 if single else [-1], False), rest, (inner,), op.grad))
            self.ends.append(_End(inner, shape, layout, None, op.outputs))
        elif over == set(range(layout.rows.dim())) and name in ("sum", "mean") and not others and not shape:
            count = math.prod(self.trace.values[op.args[0].number].shape) if name == "mean" else 1
            self.steps.append(_Step(aten.sum.dim_IntList, (op.args[0], [-1]), dict(op.kwargs), (inner,), op.grad))
            rows = tuple(layout.rows.flatten().shape)
            self.ends.append(_End(inner, rows, layout, lambda found, _: (found.sum() / count,), op.outputs))
        else:
            raise _Unfit(f"{name} (in {op.module or 'the loss'}) reduces the logits over tokens")

    def _gather(self, op: TracedOp, layout: _Layout) -> None:
        """Picked classes of every row: one number per row if one is picked."""
        (made,), index = op.outputs, op.args[2]
        shape = tuple(self.trace.values[made].shape)
        if op.args[1] % layout.rows.dim() != layout.dim or shape != tuple(layout.rows.shape):
            raise _Unfit("gather picks more than one class of a token")
        inner = -1 - len(self.ends)
        self.steps.append(_Step(op.func, (op.args[0], -1, _Side(self._place(index.number), layout)), {}, (inner,), op.grad))
        self.ends.append(_End(inner, shape, layout, None, op.outputs))


@dataclass(eq=False)
class ChunkedLoss:
    """The head and the loss, as one op on the hidden states, the head's weights and whatever the loss takes."""

    region: _Region
    chunks: int
    tags: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Take the names that a program prints."""
        self.__name__ = "chunked_loss"
        self.__module__ = "meshwright"
        region = self.region
        rows = region.rows
        self.outputs = tuple(number for end in region.ends for number in end.outputs)
        self.parts = [part for part in rows.tensor_split(min(self.chunks, len(rows))) if len(part)]
        self.orders = [_places(rows, end.layout.rows.flatten(), region.tokens) for end in region.ends]

    def __call__(self, hidden: Tensor, *operands: Tensor) -> Any:
        """Return the ends, a part of the tokens after another."""
        found: list[list[Tensor]] = [[] for _ in self.region.ends]
        for part in self.parts:
            rows = _picked(hidden, part)
            sides = self._sides(part, operands)
            if torch.is_grad_enabled():
                made = checkpoint(self._part, rows, sides, use_reentrant=False, preserve_rng_state=False)
            else:
                made = self._part(rows, sides)
            for results, result in zip(found, made, strict=True):
                results.append(result)
        outputs: list[Tensor] = []
        for end, results, order in zip(self.region.ends, found, self.orders, strict=True):
            joined = torch.cat([result.reshape(-1) for result in results])
            joined = joined if order is None else joined.index_select(0, order.to(joined.device))
            joined = joined.reshape(end.shape)
            outputs += (joined,) if end.finish is None else end.finish(joined, operands)[: len(end.outputs)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _part(self, rows: Tensor, sides: dict[_SideKey, Tensor]) -> tuple[Tensor, ...]:
        """Run the ops on some rows."""
        values: dict[int, Tensor] = {self.region.hidden: rows}
        for step in self.region.steps:
            args = _filled(step.args, values, sides)
            if step.func is None:
                values[step.outputs[0]] = args[0]
                continue
            with torch.set_grad_enabled(step.grad and torch.is_grad_enabled()):
                result = step.func(*args, **_filled(step.kwargs, values, sides))
            made = result if isinstance(result, tuple | list) else (result,)
            values.update(zip(step.outputs, made, strict=False))
        return tuple(values[end.number] for end in self.region.ends)

    def _sides(self, part: Tensor, operands: Sequence[Tensor]) -> dict[_SideKey, Tensor]:
        """The other operands as the rows `part` need them."""
        found: dict[_SideKey, Tensor] = {}
        for step in self.region.steps:
            for side in _torch.leaves_of((step.args, step.kwargs)):
                if isinstance(side, _Side) and _key(side) not in found:
                    found[_key(side)] = _taken(operands[side.place], side, part, self.region.tokens)
        return found


_SideKey = tuple[int, int]


def _key(side: _Side) -> _SideKey:
    return side.place, id(side.layout)


def _filled(of: Any, values: dict[int, Tensor], sides: dict[_SideKey, Tensor]) -> Any:
    """An op's arguments with the tensors in their places. (A closure that calls itself would keep them all until a collection.)"""
    if isinstance(of, Ref):
        return values[of.number]
    if isinstance(of, _Side):
        return sides[_key(of)]
    if isinstance(of, dict):
        return {key: _filled(item, values, sides) for key, item in of.items()}
    return type(of)(_filled(item, values, sides) for item in of) if isinstance(of, list | tuple) else of


def _taken(operand: Tensor, side: _Side, part: Tensor, tokens: int) -> Tensor:
    """An operand for some rows: [rows, classes or 1], [1, classes or 1], or [rows]."""
    layout = side.layout
    if layout is None:
        return operand
    if not layout.rows.numel():  # no rows: broadcast over them
        return operand.reshape(-1) if operand.dim() else operand
    order = _places(layout.rows.flatten(), part, tokens)
    if side.flat:
        return _picked(operand.reshape(-1), order)
    full = operand.reshape((1,) * (layout.rows.dim() - operand.dim()) + tuple(operand.shape)).movedim(layout.dim, -1)
    shape = [size for dim, size in enumerate(layout.rows.shape) if dim != layout.dim]
    return _picked(full.expand(*shape, full.shape[-1]).reshape(-1, full.shape[-1]), order)


def _picked(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """These rows of a tensor (None: all): a view where they follow each other, for their numbers have a way to the device."""
    if rows is None:
        return tensor
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count)):
        return tensor[first : first + count]
    return tensor.index_select(0, rows.to(tensor.device))


def _places(rows: Tensor, wanted: Tensor, tokens: int) -> Tensor | None:
    """Where each of the `wanted` rows stands among `rows`; None if they are the same in the same order."""
    if torch.equal(rows, wanted):
        return None
    inverse = torch.full((tokens,), -1, dtype=torch.long)
    inverse[rows] = torch.arange(len(rows))
    return inverse[wanted]


def _replaced(trace: Trace, region: _Region, chunks: int) -> Trace:
    """The trace with the region's ops as one, after everything that it takes and before whatever reads its results."""
    func = ChunkedLoss(region, chunks)
    inputs = (region.hidden, *region.operands)
    late = set(func.outputs)
    before, after = [], []
    for place, op in enumerate(trace.ops):
        if place in region.ops:
            continue
        if late & set(op.inputs):
            late.update(op.outputs)
            after.append(op)
        else:
            before.append(op)
    if late & set(inputs):
        raise _Unfit("parts of the loss depend on each other")
    head = replace(region.head, func=func, args=tuple(map(Ref, inputs)), kwargs={}, inputs=inputs, outputs=func.outputs)
    return replace(trace, ops=[*before, head, *after])
