"""From two walks of a model, at two micro-batch sizes, to the records of a Blueprint.

Ops, values and saved storages of the two runs are matched by their order, and every amount becomes the line through
both. A model whose ops differ between the two sizes (an expert that gets no token in the smaller one) keeps the amounts
of the second run, taken as proportional to the micro-batch, and the Blueprint says so in its notes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from meshwright.blueprint import costs
from meshwright.blueprint.record import Count, Op, ParameterRecord, Peak, Saved, TensorRecord, Unit
from meshwright.blueprint.regions import Findings, find
from meshwright.blueprint.tape import CostedOp, Value
from meshwright.blueprint.walk import Walk


class Pair:
    """Two tapes of the same stretch at two micro-batch sizes, and how to read an amount off both.

    Where their ops don't agree those of the second stand for both.
    """

    def __init__(self, walks: tuple[Walk, Walk], kind: int | None = None) -> None:
        """Of a block kind, or of what lies outside the blocks."""
        self.sizes = (walks[0].items, walks[1].items)
        first, second = (walk.outside if kind is None else walk.kinds[kind].tape for walk in walks)
        self.agree = [op.func for op in first.ops] == [op.func for op in second.ops] and len(first.values) == len(second.values)
        self.inputs, self.outputs = (
            tuple(self._record(first.values[a], second.values[b]) for a, b in zip(*numbers, strict=False))
            for numbers in ((first.inputs, second.inputs), (first.outputs, second.outputs))
        )
        self.walk = walks[0] if self.agree else walks[1]
        self.first, self.second = first if self.agree else second, second

    def count(self, first: int, second: int) -> Count:
        """The line through a size read off both tapes."""
        if first == second:
            return Count(first)
        return Count.through((self.sizes[0], first), (self.sizes[1], second))

    def amount(self, first: int, second: int) -> Count:
        """The line through FLOPs or bytes read off both tapes."""
        return self.count(first, second) if self.agree else Count(0, second // self.sizes[1])

    def peak(self, ops: slice) -> Peak:
        """The most bytes alive over some of the ops."""
        return Peak.over(map(self.amount, self.first.levels[ops], self.second.levels[ops]))

    def ops(self) -> Iterable[tuple[CostedOp, CostedOp]]:
        """The ops of both tapes side by side."""
        return zip(self.first.ops, self.second.ops, strict=True)

    def shape(self, number: int) -> tuple[Count, ...]:
        """The shape of a value."""
        one, two = self.first.values[number].shape, self.second.values[number].shape
        return tuple(self.count(a, b) for a, b in zip(one, two, strict=True))

    def bytes(self, numbers: Iterable[int]) -> Count:
        """What some values hold together."""
        sizes = (tuple(_dense_bytes(tape.values[number]) for tape in (self.first, self.second)) for number in numbers)
        return Count.total(self.amount(one, two) for one, two in sizes)

    def tensor(self, number: int, recomputable: bool = False) -> TensorRecord:
        """The record of a value as something that crosses a boundary."""
        record = self._record(self.first.values[number], self.second.values[number], recomputable)
        return replace(record, bytes=self.bytes([number]))

    def _record(self, one: Value, two: Value, recomputable: bool = False) -> TensorRecord:
        shape = tuple(self.count(a, b) for a, b in zip(one.shape, two.shape, strict=True))
        size = self.count(_dense_bytes(one), _dense_bytes(two))
        return TensorRecord("", shape, dtype_name(one.dtype), size, one.needs_gradient, recomputable)


def _dense_bytes(value: Value) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


def parameter_records(
    model: nn.Module, prefix: str, skip: tuple[str, ...], dtype: torch.dtype | None
) -> tuple[ParameterRecord, ...]:
    """Parameters and buffers under `prefix`, less those under `skip`; floats as captured (in `dtype`, if there is one)."""
    first: dict[int, str] = {}
    records = []
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        owner = first.setdefault(id(tensor), name)
        if not name.startswith(prefix) or name.startswith(skip):
            continue
        held = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        trains, is_buffer = tensor.requires_grad, not isinstance(tensor, nn.Parameter)
        tied = owner if owner != name else ""
        size, kind = tensor.numel() * held.itemsize, dtype_name(held)
        own = name.removeprefix(prefix)
        records.append(ParameterRecord(own, tuple(tensor.shape), kind, size, trains and not is_buffer, is_buffer, tied))
    return tuple(records)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def unit_of_kind(
    walks: tuple[Walk, Walk], kind: int, model: nn.Module, parameters: tuple[ParameterRecord, ...], sequence: int
) -> tuple[Unit, bool]:
    """The record of block kind number `kind`, and whether its ops are the same at both micro-batch sizes."""
    pair, name = Pair(walks, kind), walks[0].kinds[kind].name
    n_forward = pair.first.forward_ops
    unit = replace(
        _unit(pair, model.get_submodule(name), parameters, sequence, set(pair.first.outputs)),
        instances=tuple(dict.fromkeys(call.name for call in walks[0].calls if call.kind == kind)),
        forward_peak=pair.peak(slice(0, n_forward)),
        backward_peak=pair.peak(slice(n_forward, None)),
    )
    return unit, pair.agree


def unit_of_rest(
    walks: tuple[Walk, Walk], model: nn.Module, parameters: tuple[ParameterRecord, ...], sequence: int
) -> tuple[Unit, bool]:
    """The record of what lies outside the blocks, and whether its ops are the same at both micro-batch sizes."""
    pair = Pair(walks)
    entering = {number for call in pair.walk.calls for number in call.inputs}
    return _unit(pair, model, parameters, sequence, entering, open_ended=True), pair.agree


def _unit(
    pair: Pair,
    module: nn.Module,
    parameters: tuple[ParameterRecord, ...],
    sequence: int,
    leaving: set[int],
    open_ended: bool = False,
) -> Unit:
    """The record of a stretch; `leaving` are the values that it hands to other units."""
    tape = pair.first
    findings = find(tape.forward, tape.values, tape.outputs, sequence, open_ended, pair.bytes)
    forward, backward = op_records(pair, findings)
    return Unit(
        class_name=type(module).__name__,
        instances=(),
        parameters=parameters,
        inputs=pair.inputs,
        outputs=pair.outputs,
        forward=forward,
        backward=backward,
        saved=saved_records(pair, leaving, findings),
        regions=tuple(findings.regions),
        experts=findings.experts,
        whole=tuple(findings.refusals.items()),
    )


def op_records(pair: Pair, findings: Findings) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Records of the forward's and the backward's ops; a backward op is matched to its forward op by its autograd node."""
    makers: dict[int, int] = {}
    records: list[Op] = []
    n_forward = pair.first.forward_ops
    for place, (one, two) in enumerate(pair.ops()):
        is_forward = place < n_forward
        if is_forward:
            makers.setdefault(one.node, place)
        of = -1 if is_forward else makers.get(one.node, -1)
        matmul = None
        if one.matmul is not None and two.matmul is not None:
            sizes = [pair.count(a, b) for a, b in zip(one.matmul, two.matmul, strict=True)]
            matmul = (sizes[0], sizes[1], sizes[2], sizes[3])
        region = findings.region_of_op.get(place if is_forward else of, -1)
        records.append(
            Op(
                name=str(one.func),
                kind=costs.kind_of(one.func),
                module=one.module,
                flops=pair.amount(one.flops, two.flops),
                read_bytes=pair.amount(one.read_bytes, two.read_bytes),
                written_bytes=pair.amount(one.written_bytes, two.written_bytes),
                matmul=matmul,
                causal=one.causal,
                inputs=one.inputs,
                outputs=one.outputs,
                forward_op=of,
                position=pair.first.ops[of].position if of >= 0 else one.position,
                region=region,
                mixes_sequence=(place if is_forward else of) in findings.mixing_ops,
            )
        )
    return tuple(records[:n_forward]), tuple(records[n_forward:])


def saved_records(pair: Pair, leaving: set[int], findings: Findings) -> tuple[Saved, ...]:
    """Records of the storages that autograd keeps; `leaving` are the values that the unit hands to others."""
    makers = {}
    for place, op in reversed(list(enumerate(pair.first.forward))):
        makers[op.node] = place
    given_out = {pair.first.values[number].storage for number in leaving}
    producers: dict[int, int] = {}
    for place, op in enumerate(pair.first.forward):
        for number in op.outputs:
            producers.setdefault(pair.first.values[number].storage, place)
    records = []
    for one, two in zip(pair.first.saved.values(), pair.second.saved.values(), strict=True):
        value = pair.first.values[one.value]
        role = {"made": "activation", "constant": "activation"}.get(value.role, value.role)
        if value.producer < -1:
            role = "input"
        records.append(
            Saved(
                bytes=(pair.count if role in ("parameter", "buffer") else pair.amount)(one.bytes, two.bytes),
                role=role,
                shape=pair.shape(one.value),
                dtype=dtype_name(value.dtype),
                name=value.name,
                producer=producers.get(value.storage, -1),
                savers=tuple(dict.fromkeys(makers[node] for node in one.nodes if node in makers)),
                output=value.storage in given_out and role == "activation",
                region=findings.region_of_value.get(one.value, -1),
                position=value.position,
            )
        )
    return tuple(records)


def whole_saved(walks: tuple[Walk, Walk]) -> Count:
    """Bytes that autograd keeps over the whole model, each storage once; parameters, buffers and the batch aside."""
    first, second = map(_saved_in, walks)
    return Count(first) if first == second else Count.through((walks[0].items, first), (walks[1].items, second))


def _saved_in(walk: Walk) -> int:
    total, outside = 0, walk.outside
    given = {v.storage for v in outside.values if v.role in ("parameter", "buffer", "input")}
    crossing: dict[int, int] = {}  # storages that pass between blocks, by their whole size: a block may save a view of one
    for call in walk.calls:
        unit = walk.kinds[call.kind]
        places = [*zip(unit.tape.inputs, call.inputs, strict=False), *zip(unit.tape.outputs, call.outputs, strict=False)]
        outer = {unit.tape.values[inner].storage: outside.values[number] for inner, number in places}
        for key, saved in unit.tape.saved.items():
            if unit.tape.values[saved.value].role in ("parameter", "buffer"):
                continue
            if key in outer:
                crossing[outer[key].storage] = outer[key].storage_bytes
            else:
                total += saved.bytes
    for key, saved in outside.saved.items():
        if key not in given:
            crossing[key] = saved.bytes
    return total + sum(size for key, size in crossing.items() if key not in given)
