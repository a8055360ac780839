"""Bytes on a rank at the worst moment of a step: states, activations in flight, what is gathered and made for a moment.

Everything is a sum over a profile's records, so a CNN is counted like a decoder. Model states follow the table in `memory.py`.
The heaviest rank counts, not the mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwright.plan.constants import constants
from meshwright.plan.graph import Size
from meshwright.plan.live import Moment
from meshwright.plan.memory import buffer_bytes, updating_bytes, widths
from meshwright.plan.plan import Plan, moved, offloads
from meshwright.plan.profile import UnitProfile, degree
from meshwright.plan.time import Split, exchanges_heads


@dataclass(frozen=True)
class UnitBytes:
    """One call of a unit on one rank: bytes that backward keeps per micro-batch, and alive for a moment in each pass."""

    kept: float
    forward: float
    backward: float
    ends: float = 0.0
    """Of what is kept, that which is gone before the backward of the blocks begins."""

    @property
    def working(self) -> float:
        """Alive for a moment in the worse pass."""
        return self.forward if self.forward > self.backward else self.backward


def unit_bytes(unit: UnitProfile, split: Split, element: float) -> UnitBytes:
    """Bytes of one micro-batch under `split`; `element` converts captured bytes to those of the dtype that runs."""
    every = _kept(unit, split, "none") * element
    kept = _kept(unit, split, split.recompute) * element
    forward = max((_moment(moment, split) for moment in unit.forward_moments), default=0.0) * element
    backward = max((_moment(moment, split) for moment in unit.backward_moments), default=0.0) * element
    if split.recompute == "full" or split.recompute == "selective":
        backward += every - kept
    return UnitBytes(kept, forward, backward, _kept(unit, split, "none", ends=True) * element)


def chunk_bytes(unit: UnitProfile, split: Split, element: float) -> UnitBytes:
    """Bytes of the head and the loss: one part's logits, and what is made of them, are alive at a time."""
    whole = unit_bytes(unit, split, element)
    if split.chunks == 1:
        return whole
    outside = replace(unit, kept=tuple(each for each in unit.kept if not each.units))
    kept, ends = (_kept(outside, split, "none", ends) * element for ends in (False, True))
    return UnitBytes(kept, whole.forward / split.chunks, (whole.backward + whole.kept - kept) / split.chunks, ends)


def _kept(unit: UnitProfile, split: Split, recompute: str, ends: bool = False) -> float:
    sequence = split.tp if split.sp else 1
    if recompute == "full" and unit.entry[1]:
        return _at(unit.entry, split) / sequence
    if recompute == "selective" and unit.spared is not None:
        return _kept(unit, split, "none") * unit.spared
    total = 0.0
    for kept in unit.kept:
        if (kept.core and recompute == "selective") or (ends and not kept.ends):
            continue
        share = degree(split.tp, kept.units) if kept.units else 1 if kept.enters else sequence
        if kept.experts and kept.units:
            share = max(share, sequence)
        total += _at(kept.size, split) / share
    if split.cp > 1 and unit.query[1] and not ends and (recompute == "none"):  # beside this rank's positions, what attention read
        read = _at(unit.kv, split) * (split.cp - 1)
        total += (_at(unit.query, split) + _at(unit.kv, split) if exchanges_heads(unit, split.cp) else read) / split.tp
    return total


def _moment(working: Moment, split: Split) -> float:
    sequence = split.tp if split.sp else 1
    return sum(_at(size, split) / (degree(split.tp, units) if units else sequence) for size, units in working)


def _at(size: Size, split: Split) -> float:
    return size[0] + size[1] * split.items / split.cp


@dataclass(frozen=True)
class Elements:
    """Parameters on one rank before the data axes divide them: of all kinds, of its experts, and of one block."""

    dense: float
    experts: float
    largest_block: float
    outside: float
    trained: float = 1.0
    """Part of them that is trained: the rest has neither gradient nor optimizer state."""
    before: float = 0.0
    """Of those outside the blocks, what only runs before them: its gradients come last."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.experts


@dataclass(frozen=True)
class States:
    """Bytes of model states on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    """Parameters gathered, and gradients whole, while the backward of the blocks runs (zero=2 and zero=3)."""
    host: float = 0.0
    """What `offload=` puts in the host's memory."""
    disk: float = 0.0
    """What it puts on a disk."""
    awake: float = 0.0
    """Parameters gathered when the loss is computed: what is outside the blocks, and the block that has just run (zero=3)."""
    opened: float = 0.0
    """Gradients that are there when the first block's backward runs: those so far, or the bucket that they are put into."""
    last: tuple[float, float] = (0.0, 0.0)
    """When the last block's backward runs: gradients that are there, all but its own and those of what runs before the blocks; and
    what of `gathered` is, without the block that would be next.
    """
    second: float = 0.0
    """Gradients that are there when the last but one's runs."""
    buffers: float = 0.0
    """What passes to and from a disk, and stays."""
    updating: float = 0.0
    """In full precision while a slice is updated, where less is stored."""


def states(plan: Plan, elements: Elements, width: int, on_host: bool = False) -> States:
    """Model states of `elements` parameters of `width` bytes in the model as given (`memory.py` has the table).

    `on_host`: the device is a CPU, so that what goes to `cpu` stays.
    """
    shard = plan.shards
    experts_shard = max(1, shard * plan.dp_replicate * plan.tp // plan.ep) if shard > 1 and plan.ep > 1 else shard
    zero = plan.zero if shard > 1 else 0
    units = plan.zero == 3 and (shard > 1 or moved(plan.offload, "params", on_host) > 0)
    live, gradient, master, state = widths(plan, width, units)
    whole, part = elements.total, elements.dense / shard + elements.experts / experts_shard
    trained = elements.trained
    compute = 2 if plan.precision != "fp32" else width
    gathered, awake = _gathered(plan, elements, zero, units, compute, gradient)
    opened = gradient * elements.outside
    if shard * plan.dp_replicate * plan.cp > 1 and zero < 2:
        opened = max(opened, min(gradient * whole, BUCKET_BYTES))
    gradients = trained * gradient * (part if zero >= 2 else whole)
    if plan.update == "backward" and plan.microbatches == 1:  # two units' at a time
        gradients = min(gradients, trained * gradient * 2 * max(elements.largest_block, elements.outside))
    kept = {
        "params": live * (part if zero == 3 else whole),
        "optimizer": trained * (master + 2 * state) * (part if zero else whole),
    }
    host = disk = 0.0
    for item in offloads(plan.offload):
        if item.what in kept and (item.directory is not None or not on_host) and (item.what == "optimizer" or units):
            host += 0.0 if item.directory else item.fraction * kept[item.what]
            disk += item.fraction * kept[item.what] if item.directory else 0.0
    here = {what: nbytes * (1.0 - moved(plan.offload, what, on_host)) for what, nbytes in kept.items()}
    opened = min(opened / (shard if zero >= 2 else 1), gradients)
    block = elements.largest_block
    nearly, second = (max(opened, gradients * (1 - min(1.0, (n * block + elements.before) / max(1.0, whole)))) for n in (1, 2))
    ahead = compute * block if units and plan.pp == 1 else 0.0
    if zero == 2:  # what is in the buckets on their way is not with the others yet
        nearly = max(opened, nearly - gathered / shard)
    mine = trained * (part if zero else whole)
    unit = live * max(elements.largest_block, elements.outside) / (shard if zero == 3 else 1)
    stored = plan, mine, unit if units and moved(plan.offload, "params", on_host) else 0.0, width, units
    return States(
        parameters=here["params"] if units else kept["params"],
        gradients=gradients,
        optimizer=here["optimizer"],
        gathered=gathered,
        host=host,
        disk=disk,
        awake=awake,
        opened=opened,
        last=(nearly, gathered - ahead),
        second=second,
        buffers=buffer_bytes(*stored),
        updating=updating_bytes(*stored),
    )


def _gathered(plan: Plan, elements: Elements, zero: int, units: bool, compute: float, gradient: float) -> tuple[float, float]:
    """`States.gathered` and `States.awake`; `compute` and `gradient` are bytes of an element."""
    around, largest = elements.outside + elements.largest_block, max(elements.outside, elements.largest_block)
    if zero == 3 and plan.pp > 1:  # gathered once a step and kept through it
        return (compute + gradient / 8) * elements.total, compute * elements.total
    if units:  # block by block, from the others or from the host; the next one comes ahead
        return compute * (around + elements.largest_block) + gradient * largest, compute * around
    if zero == 2:
        return 2 * gradient * max(elements.total / 16, elements.outside / 2), 0.0
    return 0.0, 0.0


BUCKET_BYTES = 25 * 2**20
"""Of the flat buckets that gradients are reduced in (`parallel/buckets.py`)."""


def communicators(plan: Plan) -> int:
    """Process groups with their own buffers on a rank."""
    data = (plan.dp_replicate > 1) + (plan.dp_shard > 1)
    return data + (plan.tp > 1) + (plan.cp > 1) + (plan.pp > 1) + (plan.ep > 1)


def outside_allocator(plan: Plan, kernels: str) -> float:
    """Bytes on the device that no tensor owns: the driver's context, workspaces, communicators."""
    if kernels == "cpu":
        return 0.0
    table = constants()["memory"]
    return float(table["context_gb"] + table["communicator_gb"] * communicators(plan)) * 1e9
