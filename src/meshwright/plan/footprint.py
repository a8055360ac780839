"""Bytes on a rank at the worst moment of a step: states, activations in flight, what is gathered and made for a moment.

Everything is a sum over a profile's records, so a CNN is counted like a decoder. Model states follow the table in `memory.py`.
The heaviest rank counts, not the mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwright.plan.constants import constants
from meshwright.plan.graph import Size
from meshwright.plan.memory import widths
from meshwright.plan.plan import Plan, moved, offloads
from meshwright.plan.profile import UnitProfile, degree
from meshwright.plan.time import Split


@dataclass(frozen=True)
class UnitBytes:
    """One call of a unit on one rank: bytes that backward keeps per micro-batch, and alive for a moment in each pass."""

    kept: float
    forward: float
    backward: float


def unit_bytes(unit: UnitProfile, split: Split, element: float) -> UnitBytes:
    """Bytes of one micro-batch under `split`; `element` converts captured bytes to those of the dtype that runs."""
    every = _kept(unit, split, "none") * element
    kept = _kept(unit, split, split.recompute) * element
    forward = _moment(unit.working_forward, split) * element
    backward = _moment(unit.working_backward, split) * element
    if split.recompute == "full" or split.recompute == "selective":
        backward += every - kept
    return UnitBytes(kept, forward, backward)


def chunk_bytes(unit: UnitProfile, split: Split, element: float) -> UnitBytes:
    """Bytes of the head and the loss: one part's logits, and what is made of them, are alive at a time."""
    whole = unit_bytes(unit, split, element)
    if split.chunks == 1:
        return whole
    kept = _kept(replace(unit, kept=tuple(each for each in unit.kept if not each.units)), split, "none") * element
    return UnitBytes(kept, whole.forward / split.chunks, (whole.backward + whole.kept - kept) / split.chunks)


def _kept(unit: UnitProfile, split: Split, recompute: str) -> float:
    sequence = split.tp if split.sp else 1
    if recompute == "full" and unit.entry[1]:
        return _at(unit.entry, split) / sequence
    if recompute == "selective" and unit.spared is not None:
        return _kept(unit, split, "none") * unit.spared
    total = 0.0
    for kept in unit.kept:
        if kept.core and recompute == "selective":
            continue
        share = degree(split.tp, kept.units) if kept.units else 1 if kept.enters else sequence
        if kept.experts and kept.units:
            share = max(share, sequence)
        total += _at(kept.size, split) / share
    return total


def _moment(working: tuple[tuple[Size, int], ...], split: Split) -> float:
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
    """Parameters gathered, and gradients whole, for a moment (zero=2 and zero=3)."""
    host: float = 0.0
    """What `offload=` puts in the host's memory."""


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
    gathered = 0.0
    if zero == 3 and plan.pp > 1:  # gathered once a step and kept through it
        gathered = compute * whole + gradient * whole / 8
    elif zero == 3:
        gathered = compute * (elements.outside + 2 * elements.largest_block) + gradient * max(
            elements.largest_block, elements.outside
        )
    elif zero == 2:
        gathered = gradient * max(whole / 16, elements.outside / 2 if elements.outside else 0.0) * 2
    elif units:  # from the host, block by block
        gathered = compute * (elements.outside + 2 * elements.largest_block)
    gradients = trained * gradient * (part if zero >= 2 else whole)
    if plan.update == "backward" and plan.microbatches == 1:  # two units' at a time
        gradients = min(gradients, trained * gradient * 2 * max(elements.largest_block, elements.outside))
    kept = {
        "params": live * (part if zero == 3 else whole),
        "optimizer": trained * (master + 2 * state) * (part if zero else whole),
    }
    host = 0.0
    for item in offloads(plan.offload):
        if item.what in kept and (item.directory is not None or not on_host) and (item.what == "optimizer" or units):
            host += 0.0 if item.directory else item.fraction * kept[item.what]
    here = {what: nbytes * (1.0 - moved(plan.offload, what, on_host)) for what, nbytes in kept.items()}
    return States(here["params"] if units else kept["params"], gradients, here["optimizer"], gathered, host)


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
