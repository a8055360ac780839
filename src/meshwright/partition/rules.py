"""Ops that a rank can't run on its part alone, or that must be taken apart first. A rule writes the op and returns True, or
returns False to leave it to the general way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from meshwright.blueprint import costs
from meshwright.blueprint.moves import whole_dim
from meshwright.blueprint.tape import Ref
from meshwright.partition import arguments
from meshwright.partition.collectives import Collective
from meshwright.partition.context import context_attention
from meshwright.partition.local import ClassLoss, EmbeddingRows, KeepSlice, LogSoftmax, Randomly, RowLoss
from meshwright.partition.partition import Pass
from meshwright.partition.state import COPIED, PARTIAL, WHOLE, State, cut
from meshwright.partition.trace import TracedOp

aten = torch.ops.aten
Rule = Callable[[Pass, TracedOp], bool]


def _state(run: Pass, value: Any) -> State:
    return run.states[value.number] if isinstance(value, Ref) else WHOLE


def _step(run: Pass, op: TracedOp, func: Any, args: tuple[Any, ...], outputs: tuple[int, ...]) -> TracedOp:
    """A part of an op, as an op of its own."""
    made = copy.copy(op)
    made.func, made.args, made.kwargs, made.outputs = func, args, {}, outputs
    made.inputs = tuple(a.number for a in args if isinstance(a, Ref))
    return made


def _biased_product(run: Pass, op: TracedOp) -> bool:
    """addmm and baddbmm whose sum is cut: the bias is added once, after the parts have been summed."""
    bias, left, right = op.args[:3]
    a, b = _state(run, left), _state(run, right)
    rank = len(run.values[left.number].shape)
    if not ((a.is_cut and a.dim == rank - 1) or (b.is_cut and b.dim == rank - 2)):
        return False
    product = Ref(run.fresh(op.outputs[0]))
    run.process(_step(run, op, aten.mm.default if rank == 2 else aten.bmm.default, (left, right), (product.number,)))
    terms = [_times(run, op, product, op.kwargs.get("alpha", 1)), _times(run, op, bias, op.kwargs.get("beta", 1))]
    run.process(_step(run, op, aten.add.Tensor, tuple(terms), op.outputs))
    return True


def _times(run: Pass, op: TracedOp, value: Ref, factor: float) -> Ref:
    if factor == 1:
        return value
    scaled = Ref(run.fresh(value.number))
    run.process(_step(run, op, aten.mul.Tensor, (value, factor), (scaled.number,)))
    return scaled


def _convolution(run: Pass, op: TracedOp) -> bool:
    """A convolution that sums over cut channels: the bias is added after the parts have been summed."""
    source, weight, bias = op.args[:3]
    groups, transposed = int(op.args[8]), bool(op.args[6])
    here, given = _state(run, weight), _state(run, source)
    sums = (here.is_cut and here.dim == (0 if transposed else 1)) or (given.is_cut and given.dim == 1)
    if bias is None or groups != 1 or not sums:
        return False
    product, shaped = run.fresh(op.outputs[0]), run.fresh(bias.number)
    bare = _step(run, op, op.func, (source, weight, None, *op.args[3:]), (product,))
    run.process(bare)
    shape = [1, -1] + [1] * (len(run.values[source.number].shape) - 2)
    full = [1, run.values[bias.number].shape[0], *shape[2:]]
    run.values[shaped] = replace(run.values[bias.number], shape=tuple(full))
    run.process(_step(run, op, aten.view.default, (bias, full), (shaped,)))
    run.process(_step(run, op, aten.add.Tensor, (Ref(product), Ref(shaped)), op.outputs))
    return True


def _embedding(run: Pass, op: TracedOp) -> bool:
    """A table whose rows are cut: each rank looks up the rows that it holds."""
    table, index = op.args[:2]
    state = _state(run, table)
    dense = _step(run, op, op.func, (*op.args[:4], False)[:5], op.outputs) if len(op.args) > 4 else op
    if len(op.args) > 3 and bool(op.args[3]):  # gradients divided by how often a row is named, which only all rows tell
        run.plain(dense)
        run.divide(op.outputs[0])
        return True
    if not state.is_cut or state.dim != 0:
        return False
    assert state.label is not None
    if state.label.repeat > 1 or len(state.label.segments) > 1:
        run.plain(dense)
        return True
    padding = int(op.args[2]) if len(op.args) > 2 else -1
    lookup = EmbeddingRows(run.axis, state.label, padding)
    run.did_cut = True
    run.emit(lookup, (Ref(run.get(table.number, state)), Ref(run.get(index.number, COPIED))), {}, [(op.outputs[0], PARTIAL)])
    return True


def _reduction(run: Pass, op: TracedOp) -> bool:
    """sum and mean over a cut dim: each rank sums its elements."""
    source = op.args[0]
    if not isinstance(source, Ref):
        return False
    state = _state(run, source)
    shape = run.values[source.number].shape
    given = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
    dims = [given] if isinstance(given, int) else list(given) if given else list(range(len(shape)))
    dims = [dim % max(len(shape), 1) for dim in dims]
    if not state.is_cut or state.dim not in dims:
        return False
    keep = bool(op.args[2]) if len(op.args) > 2 else bool(op.kwargs.get("keepdim", False))
    kwargs = {"dtype": op.kwargs["dtype"]} if op.kwargs.get("dtype") is not None else {}
    local = Ref(run.get(source.number, state))
    output = op.outputs[0]
    if costs.base_name(op.func) == "sum":
        run.emit(aten.sum.dim_IntList, (local, dims, keep), kwargs, [(output, PARTIAL)])
        return True
    total = run.fresh(output)
    run.emit(aten.sum.dim_IntList, (local, dims, keep), kwargs, [(total, PARTIAL)])
    share = 1.0 / math.prod(shape[dim] for dim in dims)
    run.emit(aten.mul.Tensor, (Ref(run.own[total]), share), {}, [(output, PARTIAL)])
    return True


def _log_softmax(run: Pass, op: TracedOp) -> bool:
    """log_softmax over a cut dim (logits over the vocabulary)."""
    source = op.args[0]
    run.resolve(source.number)
    state = _state(run, source)
    dim = int(op.args[1]) % max(len(run.values[source.number].shape), 1)
    if not state.is_cut or state.dim != dim:
        return False
    local = Ref(run.get(source.number, state))
    assert state.label is not None
    run.emit(LogSoftmax(run.axis, dim, state.label), (local,), {}, [(op.outputs[0], state)])
    return True


def _class_loss(run: Pass, op: TracedOp) -> bool:
    """nll_loss with classes cut (vocabulary) or rows cut (the sequence)."""
    scores, target, weight, reduction, ignore = op.args[:5]
    run.resolve(scores.number)
    state, output = _state(run, scores), op.outputs[0]
    if not state.is_cut or weight is not None:
        return False
    assert state.label is not None
    classes = state.dim == len(run.values[scores.number].shape) - 1
    if classes and (state.label.repeat > 1 or len(state.label.segments) > 1):
        return False  # a rank's classes do not follow each other
    local = Ref(run.get(scores.number, state))
    result = PARTIAL
    if classes:
        here = Ref(run.get(target.number, COPIED))
        if reduction == 0 and len(run.values[scores.number].shape) == 1:
            return False
        run.emit(ClassLoss(run.axis, state.label, reduction, ignore), (local, here), {}, [(output, result)])
        return True
    rows = Ref(run.get(target.number, cut(0, state.label)))
    if reduction == 0:
        run.emit(op.func, (local, rows, None, 0, ignore), {}, [(output, state), (op.outputs[1], WHOLE)])
        return True
    total = run.fresh(output) if reduction == 1 else output
    run.emit(op.func, (local, rows, None, 2, ignore), {}, [(total, result), (op.outputs[1], PARTIAL)])
    if reduction == 1:
        run.resolve(total)
        whole = Ref(run.get(target.number, COPIED))
        run.emit(RowLoss(run.axis, ignore), (Ref(run.own[total]), whole), {}, [(output, WHOLE)])
    return True


def _attention(run: Pass, op: TracedOp) -> bool:
    """Attention kernels, written as the public function so that any device and any number of heads can run them."""
    found = arguments.attention(op)
    if found is None:
        return False
    attention, operands = found
    for operand in operands:
        if isinstance(operand, Ref):
            run.resolve(operand.number)
    state = _state(run, operands[0])
    if state.is_cut and state.dim == 2 and run.policy.sequence:
        return context_attention(run, op, attention, operands)
    if state.is_cut and state.dim == 1 and _by_heads(run, op, attention, operands, state):
        return True
    run.plain(_step(run, op, attention, tuple(operands), op.outputs[:1]))
    return True


def _earlier_attention(run: Pass, op: TracedOp) -> bool:
    """Attention as an earlier pass has written it: its heads are as independent as they were."""
    if isinstance(op.func, torch._ops.OpOverload):
        return False
    operands = [*op.args, None][:4]
    for number in op.inputs:
        run.resolve(number)
    state = _state(run, operands[0])
    if state.is_cut and state.dim == 1 and _by_heads(run, op, op.func, operands, state):
        return True
    run.plain(op)
    return True


def _by_heads(run: Pass, op: TracedOp, attention: Any, operands: list[Any], state: State) -> bool:
    """Attention of this rank's heads. Keys with fewer heads than ranks are whole: each rank takes the ones it needs."""
    query, key, value, mask = operands
    assert state.label is not None
    heads, size = state.label.size, run.axis.size
    refs = [Ref(run.own[query.number])]
    for other in (key, value):
        groups = run.values[other.number].shape[1]
        fitted = state.label if groups == heads else whole_dim(groups)
        if groups == 1:
            refs.append(Ref(run.get(other.number, COPIED)))
        elif run.axis.divides(fitted):
            refs.append(Ref(run.get(other.number, cut(1, fitted))))
        elif size % groups == 0 and state.label == whole_dim(heads):
            picked, one = run.fresh(other.number), run.axis.rank * groups // size
            run.values[picked] = replace(run.values[picked], shape=(run.values[picked].shape[0], 1, *run.values[picked].shape[2:]))
            run.emit(aten.slice.Tensor, (Ref(run.get(other.number, COPIED)), 1, one, one + 1), {}, [(picked, COPIED)])
            refs.append(Ref(run.own[picked]))
        else:
            return False
    if mask is not None:
        shape = run.values[mask.number].shape
        with_heads = len(shape) >= 3 and shape[-3] == heads > 1
        refs.append(Ref(run.get(mask.number, cut(len(shape) - 3, state.label) if with_heads else COPIED)))
    func: Any = Randomly(run.axis, attention) if getattr(attention, "dropout", 0.0) > 0.0 else attention
    run.did_cut = True
    run.emit(func, refs, {}, [(op.outputs[0], state)])
    return True


def _batch_norm(run: Pass, op: TracedOp) -> bool:
    """Batch norm whose channels are cut: this rank's part of the running statistics is updated, and gathered again."""
    source = op.args[0]
    state = _state(run, source)
    if not state.is_cut or state.dim != 1:
        return False
    assert state.label is not None
    part = cut(0, state.label)
    updates = bool(op.args[5])
    kept = {}
    for buffer in op.args[3:5]:
        if isinstance(buffer, Ref) and updates:  # the backward needs what the op has seen: a copy is updated
            run.converted.pop((buffer.number, part), None)
            kept[buffer.number] = run.fresh(buffer.number)
            run.emit(aten.clone.default, (Ref(run.get(buffer.number, part)),), {}, [(kept[buffer.number], part)])
    numbers = [kept.get(a.number, a.number) if isinstance(a, Ref) else -1 for a in op.args]
    args = [
        Ref(run.get(number, state if a is source else part)) if isinstance(a, Ref) else a
        for a, number in zip(op.args, numbers, strict=True)
    ]
    results = [(n, state if len(run.values[n].shape) > 1 else part) for n in op.outputs if run.values[n].shape != (0,)]
    empty = [(n, WHOLE) for n in op.outputs if run.values[n].shape == (0,)]
    order = dict(results + empty)
    run.emit(op.func, args, {}, [(n, order[n]) for n in op.outputs])
    for number, copied in kept.items():
        if number in run.source.buffers:
            keep = KeepSlice(run.axis, 0, state.label)
            run.emit(keep, (Ref(run.own[number]), Ref(run.own[copied])), {}, [])
    return True


def _earlier_collective(run: Pass, op: TracedOp) -> bool:
    """A collective of an earlier pass: every dim but its own runs through it."""
    func = op.func
    if not isinstance(func, Collective) or len(op.inputs) != 1 or len(op.outputs) != 1:
        return False
    number = op.inputs[0]
    run.resolve(number)
    state = _state(run, Ref(number))
    if state.is_full:
        run.emit(func, (Ref(run.own[number]),), {}, [(op.outputs[0], state)])
        return True
    busy = {func.dim} | ({func.target[0]} if hasattr(func, "target") else set())
    if state.dim in busy:
        state = COPIED
    run.emit(func, (Ref(run.get(number, state)),), {}, [(op.outputs[0], state)])
    return True


RULES: dict[str, Rule] = {
    **dict.fromkeys(("addmm", "baddbmm"), _biased_product),
    **dict.fromkeys(("sum", "mean"), _reduction),
    **dict.fromkeys(costs.ATTENTION, _attention),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), _batch_norm),
    **dict.fromkeys(("copy", "share", "reduce", "reducescatter", "gather", "take", "exchange"), _earlier_collective),
    **dict.fromkeys(("attention", "causal", "ring"), _earlier_attention),
    "convolution": _convolution,
    "embedding": _embedding,
    "_log_softmax": _log_softmax,
    "nll_loss_forward": _class_loss,
}
