"""Seconds of a unit's passes on one rank: a roofline per kernel, the host beside it, and the tensor-parallel exchanges.

A product gets the device's peak times the efficiency of its shape, or its bytes' bandwidth; attention its own efficiency by length;
everything else is bytes. While the host issues kernels more slowly than the device runs them, the host sets the pace.
What happens between units, stages and data ranks is left to `predict.py`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

from meshwright.cluster import Cluster
from meshwright.plan.collectives import Group, all_reduce, all_to_all, gather, scatter
from meshwright.plan.constants import constants
from meshwright.plan.profile import Attend, Phase, Product, UnitProfile, degree

COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""Precision in the plan -> the dtype of activations."""


KEPT_BLOCK = 32 * 2**20
"""The largest block that glibc's malloc may keep for itself (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits)."""


@dataclass(frozen=True)
class Split:
    """What one rank has of the work: micro-batch items and the degrees that divide a unit."""

    items: float
    tp: int
    sp: bool
    cp: int
    ep: int
    precision: str
    recompute: str
    chunks: int = 1
    """Parts in which what runs after the blocks is computed (`loss_chunks`)."""


@dataclass(frozen=True)
class UnitTime:
    """Seconds of one call on one rank. Backward is apart by inputs' and weights' gradients; recompute is in `backward`."""

    forward: float
    backward: float
    weight: float
    tp_forward: float
    tp_backward: float
    cp_forward: float
    cp_backward: float
    ep_forward: float
    ep_backward: float
    hardware_flops: float

    @property
    def total_forward(self) -> float:
        """Forward with its exchanges."""
        return self.forward + self.tp_forward + self.cp_forward + self.ep_forward

    @property
    def total_backward(self) -> float:
        """Backward (inputs and weights) with its exchanges."""
        return self.backward + self.weight + self.tp_backward + self.cp_backward + self.ep_backward


@dataclass(frozen=True)
class Rates:
    """A device's constants, ready to use."""

    peak: float
    peak_low: float
    memory: float
    plain: float
    """Bytes per second of kernels that only move: on a GPU what all others get too."""
    table: dict[str, Any]
    launch: float
    collective: float
    element: float
    """Bytes of an element as it will run, over its bytes as captured."""
    width: float
    attention: float
    """Of hand-fused stacks' attention over PyTorch's own."""
    product: float
    """Part of the peak that a large product gets."""
    accumulate: float
    """Bytes moved per parameter and micro-batch to add its gradient to the full-precision one."""


def rates(cluster: Cluster, precision: str, mode: str, captured: str) -> Rates:
    """The constants for a precision and a way of running kernels; `captured` is the dtype in which bytes were counted."""
    device = cluster.device
    table = constants()[device.kernels]
    launch = constants()["launch"]
    dtype = COMPUTE[precision]
    width = {"float32": 4.0, "float64": 8.0, "bfloat16": 2.0, "float16": 2.0}
    low = device.peak_flops("float8") * float(table["float8"]) if precision == "fp8" else device.peak_flops(dtype)
    measured = dict(device.rates)
    if "kernel_s" in measured:
        table = table | measured
    tuned = mode == "eager" and not measured  # a probe measures eager kernels
    eager = float(launch["eager_stream"]) if tuned else 1.0
    memory = device.memory_bytes_per_s * float(table["stream"]) * eager
    return Rates(
        peak=device.peak_flops(dtype) * device.power,
        peak_low=low * device.power,
        memory=memory,
        plain=measured.get("plain", 0.0) * eager or memory,
        table=table,
        launch=measured.get("launch_s", launch[f"{mode}_us"] * 1e-6 if device.kernels != "cpu" else 0.0),
        collective=launch["collective_us"] * 1e-6 if device.kernels != "cpu" else 0.0,
        element=width[dtype] / width.get(captured, 4.0),
        width=width[dtype],
        attention=float(table["attention_fused"]) if mode == "fused" else 1.0,
        product=float(table["rate"]) * (1.0 if mode == "fused" or measured else float(launch["eager_product"])),
        accumulate=float(constants()["step"]["accumulate_fused_bytes" if mode == "fused" else "accumulate_bytes"]),
    )


def unit_time(unit: UnitProfile, split: Split, rate: Rates, tp: Group, cp: Group, ep: Group) -> UnitTime:
    """Seconds of one call of `unit` (see `UnitTime`)."""
    f, f_flops, f_launches = _phase(unit.forward, split, rate)
    b, b_flops, b_launches = _phase(unit.backward, split, rate)
    w, w_flops, w_launches = _phase(unit.weight, split, rate)
    weights = unit.weights.local(split.tp, split.ep)
    w += (weights[0] + weights[1]) * rate.accumulate / rate.memory
    tp_f, tp_b, calls = _exchanges(unit, split, rate, replace(tp, host_s=0.0) if tp.host_s else tp)
    each = rate.collective + tp.host_s  # the host issues these while the device works
    cp_f, cp_b = _ring(unit, split, rate, cp, f)
    ep_f, ep_b = _dispatch(unit, split, rate, ep)
    again, again_tp, again_ep, flops = 0.0, 0.0, 0.0, f_flops + b_flops + w_flops
    again_launches = 0
    if split.recompute == "full":
        again, again_tp, again_ep, flops = f, tp_f, ep_f, flops + f_flops
        again_launches = f_launches
    elif split.recompute == "selective":
        again, extra, again_launches = _phase(unit.recomputed, split, rate)
        flops += extra
    host_f = f_launches * rate.launch + calls * each
    host_b = (b_launches + w_launches + again_launches) * rate.launch + calls * each
    f += max(0.0, host_f - f - tp_f - ep_f)
    waits = max(0.0, host_b - b - w - again - tp_b - again_tp - ep_b)
    return UnitTime(f, b + again + waits, w, tp_f, tp_b + again_tp, cp_f, cp_b, ep_f, ep_b + again_ep, flops)


def in_chunks(unit: UnitProfile, split: Split, rate: Rates, tp: Group, cp: Group, ep: Group) -> UnitTime:
    """Seconds of the head and the loss: in `split.chunks` parts, each forward again in its backward (`partition/chunks.py`)."""
    if split.chunks == 1:
        return unit_time(unit, split, rate, tp, cp, ep)
    part = unit_time(unit, replace(split, items=split.items / split.chunks, recompute="full"), rate, tp, cp, ep)
    return UnitTime(*(split.chunks * value for value in astuple(part)))


def _phase(phase: Phase, split: Split, rate: Rates) -> tuple[float, float, int]:
    """Device seconds, FLOPs and launches of one pass."""
    seconds = _first_touches(phase, split, rate)
    flops = 0.0
    for product, times in phase.products:
        t, f = _product(product, split, rate)
        seconds += times * t
        flops += times * f
    for attend in phase.attentions:
        t, f = _attend(attend, split, rate)
        seconds += t
        flops += f
    kernel = float(rate.table["kernel_us"]) * 1e-6
    for (units, routed, plain), (fixed, per_item, kernels) in phase.streams.items():
        share = degree(split.tp, units) if units else split.tp if split.sp else 1
        varying = per_item * split.items / split.cp / (split.tp if routed and split.sp and not units else share)
        moved = fixed / (share if units else 1) / (split.ep if routed else 1) + varying
        seconds += kernels * kernel + moved * rate.element / (rate.plain if plain else rate.memory)
    return seconds, flops, phase.launches


def _first_touches(phase: Phase, split: Split, rate: Rates) -> float:
    """Seconds of page faults on a CPU: the C library takes large blocks from the system each time, and gives them back."""
    each = float(rate.table.get("fault_s_per_byte", 0.0))
    if not each:
        return 0.0
    sizes = (
        (times, (fixed + per_item * split.items / split.cp) * rate.element / (degree(split.tp, units) if units else 1))
        for (fixed, per_item, units), times in phase.made.items()
    )
    return each * sum(times * size for times, size in sizes if size > KEPT_BLOCK)


def _product(product: Product, split: Split, rate: Rates) -> tuple[float, float]:
    size: list[float] = [fixed + per_item * split.items for fixed, per_item in product.dims]
    if split.cp > 1:
        for place, (_, per_item) in enumerate(product.dims):
            if per_item:
                size[place] /= split.cp
                break
    if product.cut >= 0:
        size[product.cut] /= degree(split.tp, product.units)
    elif product.experts and split.sp and split.tp > 1:  # sequence-parallel ranks route their own tokens
        size[3 if product.dims[3][1] else 1] /= split.tp
    if product.experts and split.ep > 1 and size[0] > 1:  # fewer experts here, with the tokens of more ranks each
        share = min(split.ep, size[0])
        size[0] /= share
        size[3 if product.dims[3][1] else 1] *= share
    batch, m, n, k = size
    flops = 2.0 * batch * m * n * k
    low = product.weight and rate.peak_low > rate.peak
    peak = rate.peak_low if low else rate.peak
    table = rate.table
    efficiency = rate.product * (m / (m + table["m0"])) * (n / (n + table["n0"])) * (k / (k + table["k0"]))
    if product.conv:
        efficiency *= table.get("conv_back" if product.backward else "conv", 1.0)
    if flops > 1e12:
        efficiency *= table["sustained"]
    moved = batch * (m * k + k * n + m * n) * rate.width
    seconds = max(flops / (peak * efficiency), moved / rate.memory) + table["kernel_us"] * 1e-6
    if low:  # operands are cast: read in 16 bit, written in 8 bit twice (rows and columns)
        seconds += batch * (m * k + k * n) * 2.0 / rate.memory
    return seconds, flops


def _attend(attend: Attend, split: Split, rate: Rates) -> tuple[float, float]:
    share = degree(split.tp, attend.units) if attend.units else 1
    flops = (attend.flops[0] + attend.flops[1] * split.items) / share / split.cp
    table = rate.table
    keys = max(1.0, attend.keys / split.cp)  # a ring's kernels see one rank's keys at a time
    if attend.causal:  # half, but for whole blocks of keys
        flops *= min(1.0, (1 + table.get("causal_block", 0.0) / keys) / 2)
    efficiency = table["attention"] * keys / (keys + table["attention_s0"]) * (table["attention_back"] if attend.backward else 1.0)
    efficiency *= attend.head / (attend.head + table["attention_head0"]) * rate.attention
    moved = (attend.moved[0] + attend.moved[1] * split.items) / share / split.cp * rate.element
    return max(flops / (rate.peak * efficiency), moved / rate.memory) + table["kernel_us"] * 1e-6, flops


def _exchanges(unit: UnitProfile, split: Split, rate: Rates, tp: Group) -> tuple[float, float, int]:
    """Seconds of tensor-parallel collectives, forward and backward, and how many are issued per pass."""
    if split.tp == 1:
        return 0.0, 0.0, 0
    forward = backward = 0.0
    calls = 0
    for exchange in unit.exchanges:
        if degree(split.tp, exchange.units) == 1:
            continue
        calls += 2 if split.sp else 1
        sizes = [(size[0] + size[1] * split.items) * rate.element / split.cp for size in (exchange.forward, exchange.backward)]
        if split.sp:  # gather before, reduce-scatter after; in backward the input is gathered once more, beside a product
            forward += gather(tp, sizes[0]) + scatter(tp, sizes[0]) if sizes[0] else gather(tp, sizes[1])
            backward += gather(tp, sizes[1]) + scatter(tp, sizes[1])
        else:
            forward += all_reduce(tp, sizes[0])
            backward += all_reduce(tp, sizes[1])
        if exchange.loss and tp.timed:  # a matter of latency: nothing on links that are not a CPU's
            forward, backward = forward + 3 * all_reduce(tp, 1.0), backward + all_reduce(tp, 1.0)
    return forward, backward, calls


def _ring(unit: UnitProfile, split: Split, rate: Rates, cp: Group, compute: float) -> tuple[float, float]:
    """Keys and values go round the ring while attention works on what has come: what its kernels don't cover is exposed."""
    if split.cp == 1 or not unit.attention:
        return 0.0, 0.0
    size = (unit.kv[0] + unit.kv[1] * split.items) * rate.element / max(1, split.tp)
    if cp.timed and unit.query[1]:
        if not exchanges_heads(unit, cp.n):
            return 2 * gather(cp, size / 2), 2 * scatter(cp, size / 2)
        query = (unit.query[0] + unit.query[1] * split.items) * rate.element / max(1, split.tp)
        sent = 2 * gather(cp, query / cp.n) + 2 * gather(cp, size / 2 / cp.n)  # an all-to-all moves as much
        return sent, sent
    sent = gather(cp, size)
    attention = sum(_attend(a, split, rate)[0] for a in unit.forward.attentions)
    slow = constants()["collective"]["interference"]
    hidden_f, hidden_b = (
        min(sent, attention * (split.cp - 1) / split.cp),
        min(2 * sent, 2.5 * attention * (split.cp - 1) / split.cp),
    )
    return sent - (1 - slow) * hidden_f, 2 * sent - (1 - slow) * hidden_b


def exchanges_heads(unit: UnitProfile, n: int) -> bool:
    """Whether context parallelism exchanges heads (ulysses): where that moves no more than gathering keys and values."""
    return unit.kv[1] > 0 and unit.kv[1] + 2 * unit.query[1] <= n * unit.kv[1]


def _dispatch(unit: UnitProfile, split: Split, rate: Rates, ep: Group) -> tuple[float, float]:
    """Tokens go to their experts and come back, in forward and in backward."""
    if split.ep == 1 or not unit.routed[1]:
        return 0.0, 0.0
    size = unit.routed[1] * split.items * rate.element / split.cp / (split.tp if split.sp else 1)
    seconds = 2 * all_to_all(ep, size)
    if unit.weights.n_experts > split.ep:  # what comes, by rank, is put in the order of the experts here, and back
        seconds += 2 * 2 * size / rate.memory
    return seconds, seconds
