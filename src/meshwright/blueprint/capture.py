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
from meshwright.blueprint.tape import CostedOp, Tape, Value
from meshwright.blueprint.walk import UnitTape, Walk


class Pair:
    """Two tapes of the same stretch at two micro-batch sizes, and how to read an amount off both."""

    def __init__(self, sizes: tuple[int, int], first: Tape, second: Tape) -> None:
        self.sizes, self.first, self.second = sizes, first, second
        self.agree = [op.func for op in first.ops] == [op.func for op in second.ops] and len(first.values) == len(second.values)

    def count(self, first: int, second: int) -> Count:
        """The line through an amount read off both tapes."""
        if first == second:
            return Count(first)
        return Count.through((self.sizes[0], first), (self.sizes[1], second))

    def peak(self, ops: slice) -> Peak:
        """The most bytes alive over some of the ops."""
        return Peak.over(map(self.count, self.first.levels[ops], self.second.levels[ops]))

    def ops(self) -> Iterable[tuple[CostedOp, CostedOp]]:
        """The ops of both tapes side by side."""
        return zip(self.first.ops, self.second.ops, strict=True)

    def shape(self, number: int) -> tuple[Count, ...]:
        """The shape of a value."""
        one, two = self.first.values[number].shape, self.second.values[number].shape
        return tuple(self.count(a, b) for a, b in zip(one, two, strict=True))

    def bytes(self, numbers: Iterable[int]) -> Count:
        """What some values hold together."""
        return Count.total(self.tensor(number).bytes for number in numbers)

    def tensor(self, number: int, name: str = "", recomputable: bool = False) -> TensorRecord:
        """The record of a value as something that crosses a boundary."""
        one, two = self.first.values[number], self.second.values[number]
        size = self.count(_dense_bytes(one), _dense_bytes(two))
        return TensorRecord(name, self.shape(number), dtype_name(one.dtype), size, one.needs_gradient, recomputable)


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
) -> Unit:
    """The record of block kind number `kind`."""
    first, second = walks[0].kinds[kind], walks[1].kinds[kind]
    pair = Pair((walks[0].items, walks[1].items), first.tape, second.tape)
    if not pair.agree:
        pair = Pair(pair.sizes, _scaled(second, walks[0].items, walks[1].items), second.tape)
    findings = find(first.tape.ops[: first.forward_ops], first.tape.values, first.outputs, sequence, size=pair.bytes)
    return replace(
        _unit(pair, first.forward_ops, findings, (first.inputs, first.outputs), set(first.outputs), parameters),
        class_name=type(model.get_submodule(first.name)).__name__,
        instances=tuple(dict.fromkeys(call.name for call in walks[0].calls if call.kind == kind)),
        forward_peak=pair.peak(slice(0, first.forward_ops)),
        backward_peak=pair.peak(slice(first.forward_ops, None)),
    )


def unit_of_rest(walks: tuple[Walk, Walk], model: nn.Module, parameters: tuple[ParameterRecord, ...], sequence: int) -> Unit:
    """The record of what lies outside the blocks."""
    one, two = walks
    pair, n_forward, values = Pair((one.items, two.items), one.outside, two.outside), one.outside_forward_ops, one.outside.values
    findings = find(one.outside.ops[:n_forward], values, one.output_numbers, sequence, open_ended=True, size=pair.bytes)
    inputs = [n for n, value in enumerate(values) if value.role == "input" and value.producer == -1]
    entering = {number for call in one.calls for number in call.inputs}
    return replace(
        _unit(pair, n_forward, findings, (inputs, one.output_numbers), entering, parameters), class_name=type(model).__name__
    )


def _unit(
    pair: Pair,
    n_forward: int,
    findings: Findings,
    crossing: tuple[list[int], list[int]],
    leaving: set[int],
    parameters: tuple[ParameterRecord, ...],
) -> Unit:
    """What both kinds of units have in common: `crossing` are inputs and outputs, `leaving` the values handed to other units."""
    forward, backward = op_records(pair, n_forward, findings)
    inputs, outputs = (tuple(pair.tensor(number) for number in numbers) for numbers in crossing)
    return Unit(
        class_name="",
        instances=(),
        parameters=parameters,
        inputs=inputs,
        outputs=outputs,
        forward=forward,
        backward=backward,
        saved=saved_records(pair, n_forward, leaving, findings),
        regions=tuple(findings.regions),
        experts=findings.experts,
        whole=tuple(findings.refusals.items()),
    )


def _scaled(tape: UnitTape, first: int, second: int) -> Tape:
    """A tape for `first` items made up from one for `second` by proportion, for ops that the two runs don't share."""
    made = Tape()

    def scale(amount: int) -> int:
        return amount * first // second

    made.ops = [
        replace(op, flops=scale(op.flops), read_bytes=scale(op.read_bytes), written_bytes=scale(op.written_bytes))
        for op in tape.tape.ops
    ]
    made.values, made.levels = tape.tape.values, [scale(level) for level in tape.tape.levels]
    made.saved = {key: replace(saved, bytes=scale(saved.bytes)) for key, saved in tape.tape.saved.items()}
    return made


def op_records(pair: Pair, n_forward: int, findings: Findings) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Records of the forward's and the backward's ops; a backward op is matched to its forward op by its autograd node."""
    makers: dict[int, int] = {}
    records: list[Op] = []
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
                flops=pair.count(one.flops, two.flops),
                read_bytes=pair.count(one.read_bytes, two.read_bytes),
                written_bytes=pair.count(one.written_bytes, two.written_bytes),
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


def saved_records(pair: Pair, n_forward: int, leaving: set[int], findings: Findings) -> tuple[Saved, ...]:
    """Records of the storages that autograd keeps; `leaving` are the values that the unit hands to others."""
    makers = {}
    for place, op in reversed(list(enumerate(pair.first.ops[:n_forward]))):
        makers[op.node] = place
    given_out = {pair.first.values[number].storage for number in leaving}
    producers: dict[int, int] = {}
    for place, op in enumerate(pair.first.ops[:n_forward]):
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
                bytes=pair.count(one.bytes, two.bytes),
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
        places = [*zip(unit.inputs, call.inputs, strict=False), *zip(unit.outputs, call.outputs, strict=False)]
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
