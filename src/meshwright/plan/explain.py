"""What a search or a prediction says in a terminal: the best plans in a table, what limits each, why well-known alternatives lose,
and what one change of the hardware would buy. Every sentence is a second prediction, not a rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from meshwright.blueprint.record import Blueprint
from meshwright.cluster import Cluster
from meshwright.errors import MeshwrightError
from meshwright.plan.plan import Plan
from meshwright.plan.predict import Pricer, predict
from meshwright.plan.prediction import Prediction
from meshwright.plan.search import Search, search

ALTERNATIVES = ("ddp", "zero1", "zero2", "fsdp", "hsdp")
"""Named plans that everybody asks about; the best of a search is compared with each."""


def table(found: Search) -> str:
    """The candidates, one a line, and why the other plans are not among them."""
    model, cluster = found.model, found.cluster
    lines = [
        f"{model['model']}: {model['parameters'] / 1e9:,.4g} B parameters, {model['blocks']} blocks, sequence {model['sequence']}",
        f"on {cluster}",
        f"{found.objective} of {found.searched:,} plans for a global batch of {found.global_batch:,}, in {found.seconds:.2f} s",
        "",
        f"{'step s':>9} {'tokens/s/dev':>13} {'MFU':>6} {'live GB':>8} {'device GB':>9} {'host GB':>8}  {'limit':<10} plan",
    ]
    for each in found.candidates:
        memory = f"{each.memory_bytes['peak'] / 1e9:8.1f} {each.device_bytes / 1e9:9.1f} {each.host_bytes / 1e9:8.1f}"
        speed = f"{each.step_seconds:9.4g} {each.tokens_per_second_per_device:13,.0f} {each.mfu:6.1%}"
        disk = f" ({each.disk_bytes / 1e9:,.1f} GB on a disk)" if each.disk_bytes else ""
        lines.append(f"{speed} {memory}  {each.bound:<10} {each.plan}{disk}")
    lines += ["", "where the time of the best goes: " + shares(found.candidates[0])]
    if found.cluster.device.price:
        dollars = found.candidates[0].price_per_hour * found.candidates[0].step_seconds / 3600
        lines.append(
            f"price: {dollars:,.4g} dollars a step at {found.cluster.device.price:.2f} a device-hour (price= overrides it)"
        )
    lines += ["not among them: " + "; ".join(f"{count:,} plans: {why}" for why, count in found.rejected.items())] * bool(
        found.rejected
    )
    return "\n".join([*lines, *found.notes])


def shares(prediction: Prediction) -> str:
    """The parts of a step that take more than half a percent, largest first."""
    parts = sorted(prediction.time_seconds.items(), key=lambda item: -item[1])
    step = prediction.step_seconds
    return ", ".join(f"{name.replace('_', ' ')} {seconds / step:.0%}" for name, seconds in parts if seconds > 0.005 * step)


def itemised(prediction: Prediction) -> str:
    """One plan's memory and time, item by item."""
    lines = [str(prediction), "", "memory on the heaviest rank (rank of the pipeline: " + str(prediction.heaviest_rank) + ")"]
    for name, size in prediction.memory_bytes.items():
        lines.append(f"  {name:<20} {size / 1e9:10.3f} GB")
    lines.append(f"  {'with slack':<20} {prediction.reserved_bytes / 1e9:10.3f} GB reserved by the allocator")
    lines.append(f"  {'on the device':<20} {prediction.device_bytes / 1e9:10.3f} GB of {prediction.capacity_bytes / 1e9:.1f}")
    if prediction.host_bytes:
        host = f"{prediction.host_bytes / 1e9:10.3f} GB of {prediction.host_capacity_bytes / 1e9:.1f} for each device"
        lines.append(f"  {'on the host':<20} {host}")
    if prediction.disk_bytes:
        lines.append(f"  {'on a disk':<20} {prediction.disk_bytes / 1e9:10.3f} GB for each device")
    lines += ["", "time of a step"]
    for name, seconds in prediction.time_seconds.items():
        lines.append(f"  {name:<20} {seconds * 1e3:10.2f} ms  {seconds / prediction.step_seconds:6.1%}")
    lines.append(f"  {'step':<20} {prediction.step_seconds * 1e3:10.2f} ms")
    return "\n".join(lines)


def alternatives(blueprint: Blueprint, found: Search, precision: str) -> list[str]:
    """Why named plans lose against the best, each with the recompute that lets it fit: a sentence for those alike."""
    best, cluster = found.candidates[0], found.cluster
    winner = Plan.parse(best.plan)
    pricer = Pricer.of(blueprint, cluster, precision, winner.compile)
    reasons: dict[str, list[str]] = {}
    for name in ALTERNATIVES:
        try:
            plan = dataclasses.replace(Plan.parse(name, cluster.devices), precision=precision)
            plan = dataclasses.replace(plan, microbatches=_micro(plan, winner, best, found.global_batch))
            reasons.setdefault(_against(_fitted(pricer, plan, found.global_batch), best), []).append(name)
        except MeshwrightError as error:
            reasons.setdefault(str(error), []).append(name)
    return [f"{', '.join(names)}: {why}" for why, names in reasons.items()] + _wider(blueprint, found, winner)


def _fitted(pricer: Pricer, plan: Plan, batch: int) -> Prediction:
    """The prediction of a plan with as much recompute as lets it fit; with all of it where nothing does."""
    found = pricer.price(plan, batch)
    if found.fits:
        return found
    less = pricer.budgeted(plan, found.micro_batch)
    return pricer.price(less or dataclasses.replace(plan, recompute="full"), batch)


def _micro(plan: Plan, winner: Plan, best: Prediction, batch: int) -> int:
    """As many micro-batches as bring the alternative nearest to the best plan's micro-batch."""
    each = batch // (plan.dp_replicate * plan.dp_shard)
    counts = [m for m in range(1, max(1, each) + 1) if each % m == 0]
    return min(counts, key=lambda m: abs(each // m - best.micro_batch)) if counts else winner.microbatches


def _against(other: Prediction, best: Prediction) -> str:
    if not other.fits:
        return f"does not fit: {other.shortage()}"
    slower = other.step_seconds / best.step_seconds - 1
    part = max(other.time_seconds, key=lambda name: other.time_seconds[name] - best.time_seconds[name])
    more = (other.time_seconds[part] - best.time_seconds[part]) / best.step_seconds
    return f"{slower:+.1%} a step ({more:+.1%} of it {part.replace('_', ' ')})" if slower > 5e-4 else "as fast as the best"


def _wider(blueprint: Blueprint, found: Search, winner: Plan) -> list[str]:
    """Twice the tensor-parallel degree, taken from the data axes."""
    if winner.dp_shard % 2 and winner.dp_replicate % 2:
        return []
    axis = "dp_shard" if winner.dp_shard % 2 == 0 else "dp_replicate"
    try:
        plan = dataclasses.replace(winner, **{"tp": winner.tp * 2, axis: getattr(winner, axis) // 2})
        micro = winner.microbatches * 2
        other = predict(blueprint, found.cluster, dataclasses.replace(plan, microbatches=micro), found.global_batch)
    except MeshwrightError:
        return []
    crosses = " crosses nodes" if plan.tp > found.cluster.domain else ""
    return [f"tp={plan.tp}{crosses}: {_against(other, found.candidates[0])}"]


def what_if(blueprint: Blueprint, found: Search, precision: str) -> list[str]:
    """What the best plan would be with a quarter more memory, or links twice as fast."""
    cluster, best = found.cluster, found.candidates[0]
    device = cluster.device
    more = dataclasses.replace(device, memory_bytes=int(device.memory_bytes * 1.25))
    changed = [
        (
            f"{more.memory_bytes / 1e9:.0f} GB in place of {device.memory_bytes / 1e9:.0f}",
            dataclasses.replace(cluster, device=more),
        ),
        ("twice the bandwidth inside a node", _faster(cluster, "intra")),
    ]
    if cluster.nodes > 1:
        changed.append(("twice the bandwidth between nodes", _faster(cluster, "inter")))
    lines = []
    for what, other in changed:
        again = search(blueprint, other, found.global_batch, precision, top=1).candidates[0]
        gain = 1 - again.step_seconds / best.step_seconds
        plan = "" if again.plan == best.plan else f", with {again.plan}"
        lines.append(f"{what}: {gain:.1%} less time a step{plan}" if gain > 5e-4 else f"{what}: nothing")
    return lines


def _faster(cluster: Cluster, name: str) -> Cluster:
    link = getattr(cluster, name)
    return dataclasses.replace(cluster, **{name: dataclasses.replace(link, bytes_per_s=2 * link.bytes_per_s)})


def paragraphs(title: str, lines: Iterable[str]) -> str:
    """A titled list, or nothing for no lines."""
    found = list(lines)
    return "\n".join(["", title, *(f"  {line}" for line in found)]) if found else ""
