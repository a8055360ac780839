"""How much `offload=` moves: the least that fits, so that a device's memory is used before its host's, and that before a disk's.

The search tries whole `WAYS`; a way's last model state is its *open* one, of which this file finds the fraction. The bytes on the
device and on its host are linear in it, so the fraction comes from two points of that line, not by trial. What it costs is priced
by `predict.py` for the plan as it stands then. Activations move whole: the executor counts their fraction in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from meshwright.plan.plan import Plan, offloads
from meshwright.plan.storage import refuses_params
from meshwright.plan.units import InFlight, Need

if TYPE_CHECKING:
    from meshwright.plan.predict import Pricer

WAYS = ("none", "optimizer:cpu", "activations:cpu", "optimizer:cpu,activations:cpu")
"""Whole things that a search moves to the host; parameters only where the optimizer alone is not enough."""
PARAMETERS = ("optimizer:cpu,params:cpu", "optimizer:cpu,params:cpu,activations:cpu")
SPARED = "moves states of which the device has room for all"


def ways(pp: int, dp_shard: int, zero: int, devices: int) -> tuple[str, ...]:
    """What plans with these degrees may move, on `devices` ranks in all."""
    probe = Plan(pp=pp, dp_shard=dp_shard, zero=zero, tp=devices // (pp * dp_shard), microbatches=0)
    return WAYS if refuses_params(probe) else WAYS + PARAMETERS


@cache
def open_state(way: str) -> str | None:
    """The state of which a whole way leaves the fraction open: parameters before the optimizer, as they are moved after it."""
    moved = {item.what for item in offloads(way)}
    return next((state for state in ("params", "optimizer") if state in moved), None)


@cache
def lighter(way: str) -> str:
    """The way without its open state."""
    kept = [part for part in way.split(",") if not part.startswith(f"{open_state(way)}:")]
    return ",".join(kept) or "none"


@cache
def model_states(text: str) -> str:
    """An offload text without activations: what decides where model states lie."""
    return ",".join(part for part in text.split(",") if not part.startswith("activations:")) or "none"


@cache
def parted(way: str, hundredths: int) -> str:
    """The offload text with so many hundredths of the open state moved."""
    fraction = f"@{hundredths / 100:g}" if hundredths < 100 else ""
    return ",".join(part + fraction * part.startswith(f"{open_state(way)}:") for part in way.split(","))


def settle(way: str, needs: Callable[[str], Sequence[Need]], moments: Sequence[InFlight], pricer: Pricer) -> str | None:
    """The offload text that moves the least of a way and fits; the lighter way's where that fits; None if nothing does.

    `needs(text)` are bytes by rank besides activations, `moments` those of activations.
    """
    if open_state(way) is None:
        return way if pricer.fits(needs(way), moments) else None
    less = settle(lighter(way), needs, moments, pricer)
    return less or least(way, needs, moments, pricer)


def least(way: str, needs: Callable[[str], Sequence[Need]], moments: Sequence[InFlight], pricer: Pricer) -> str | None:
    """The offload text with the fewest hundredths of the open state that fit, 1 or more of them; None if none do."""
    # The first byte of parameters, or on a disk, brings buffers with it: the line begins behind that.
    simple = open_state(way) == "optimizer" and "nvme" not in way
    start, at = (lighter(way), 0.0) if simple else (parted(way, 50), 0.5)
    lowest, highest = 0.0, 1.0
    for some, whole, moment in zip(needs(start), needs(way), moments, strict=True):
        for first, last in zip(pricer.excess(some, moment), pricer.excess(whole, moment), strict=True):
            slope = (last - first) / (1 - at)  # bytes too many, for all of the state
            if last <= 0 and slope >= 0:
                continue
            if slope == 0:
                return None
            if slope < 0:
                lowest = max(lowest, 1 - last / slope)
            else:
                highest = min(highest, 1 - last / slope)
    hundredths = max(1, math.ceil(100 * lowest + 1e-9))  # a byte more than the least, for what floats round
    return parted(way, hundredths) if hundredths <= 100 * highest else None


def settled(pricer: Pricer, plan: Plan, items: int) -> Plan | None:
    """A plan whose `offload` is one of the whole ways, with the least of it that fits; None if nothing of it does."""
    text = settle(plan.offload, *_bytes(pricer, plan, items), pricer)
    return None if text is None else replace(plan, offload=text)


def onto_disk(pricer: Pricer, plan: Plan, items: int) -> Plan:
    """A plan that fits with whole states on a disk, with the least moved that fits, as much of it to the host as that holds."""
    text = least(plan.offload, *_bytes(pricer, plan, items), pricer) or plan.offload
    plan = replace(plan, offload=text)
    held, whole = pricer.elsewhere(plan, items)
    room, moved = pricer.cluster.device.host_memory_bytes - held, offloads(text)
    parts = []
    for place, item in enumerate(moved):
        hundredths, host = round(100 * item.fraction), 0
        if item.directory is not None and not pricer.on_host:
            half = [*moved[:place], replace(item, fraction=item.fraction / 2), *moved[place + 1 :]]
            size = 2 * (whole - pricer.elsewhere(replace(plan, offload=",".join(map(str, half))), items)[1])
            host = min(hundredths, int(hundredths * room / size))
            room -= size * host / hundredths
        parts += [replace(item, directory=None, fraction=host / 100)] * (host > 0)
        parts += [replace(item, fraction=(hundredths - host) / 100)] * (hundredths > host)
    return replace(plan, offload=",".join(map(str, parts)))


def _bytes(pricer: Pricer, plan: Plan, items: int) -> tuple[Callable[[str], list[Need]], list[InFlight]]:
    """`needs` and `moments` of a plan, as `settle` takes them."""

    def needs(text: str) -> list[Need]:
        tried = replace(plan, offload=text)
        return [pricer.needs(tried, pricer.states(tried, pricer.elements(tried, stages[rank]))) for rank in heads]

    stages, heads = pricer.stages(plan), pricer.heads(plan)
    return needs, pricer.activations(plan, pricer.split(plan, items), heads)
