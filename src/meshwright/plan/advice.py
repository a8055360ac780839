"""What would do where no plan fits: what this cluster can still do with the same numbers, what with others, and a larger cluster.

Every plan that is named was found by a search and fits; a disk is named `DIR`, as only the user knows one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from meshwright.blueprint.record import Blueprint
from meshwright.cluster import Cluster
from meshwright.errors import PlanError
from meshwright.plan.fractions import onto_disk
from meshwright.plan.plan import Plan
from meshwright.plan.predict import Pricer
from meshwright.plan.prediction import Prediction
from meshwright.plan.search import Search, search
from meshwright.plan.space import Family, Space

PATIENCE_S = 2.0
"""Seconds after which no further search of a kind begins: of what this cluster can do, and of larger ones."""
TWO_PASSES = {"update": "backward", "clip": "two_pass"}
"""No gradients are kept, and numbers stay as they are."""
CHUNKS = {"loss_chunks": 16}
ALL = {"offload": "optimizer:nvme=DIR,params:nvme=DIR,activations:cpu"}
SAME: tuple[dict[str, Any], ...] = (
    CHUNKS,
    CHUNKS | TWO_PASSES,
    {"offload": "optimizer:nvme=DIR"},
    ALL,
    ALL | TWO_PASSES,
    ALL | CHUNKS | TWO_PASSES,
)
OTHER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("optimizer states in 16 bits", {"optimizer_state": "bf16"}),
    ("optimizer states in 8 bits", {"optimizer_state": "int8"}),
    ("no fp32 master", {"master": "stochastic"}),
    ("optimizer states in 8 bits, no fp32 master", {"optimizer_state": "int8", "master": "stochastic"}),
    (
        "optimizer states in 8 bits, no fp32 master, gradients clipped by the last step's norm",
        {"optimizer_state": "int8", "master": "stochastic", "update": "backward", "clip": "delayed"},
    ),
)
"""Changes that alter numbers, the smallest first."""


@dataclass(frozen=True)
class _Asked:
    """The search that found nothing."""

    blueprint: Blueprint
    cluster: Cluster
    global_batch: int
    precision: str
    compiled: bool
    fixed: dict[str, Any]
    accepts: Callable[[Plan], bool] | None

    @property
    def pricer(self) -> Pricer:
        return Pricer.of(self.blueprint, self.cluster, self.precision, self.compiled)

    @property
    def space(self) -> Space:
        held, shape, batch = tuple(self.fixed.items()), self.pricer.shape, self.global_batch
        compiled, on_host = self.compiled, self.pricer.on_host
        return Space(shape, self.cluster.devices, batch, self.precision, compiled, held, self.accepts, on_host)

    def attempt(self, where: Cluster, batch: int, held: dict[str, Any]) -> Search | None:
        """The best plan there, None if nothing fits."""
        options: dict[str, Any] = {"top": 1, "compiled": self.compiled, "accepts": self.accepts, "advise": False}
        with contextlib.suppress(PlanError):
            return search(self.blueprint, where, batch, self.precision, fixed=held, **options)
        return None

    def elsewhere(self, where: Cluster) -> Search | None:
        """The best plan there; with the nearest global batch that its devices divide where none has this one."""
        near = max(1, round(self.global_batch / where.devices)) * where.devices
        tried = (self.attempt(where, batch, self.fixed) for batch in dict.fromkeys((self.global_batch, near)))
        return next((found for found in tried if found is not None), None)

    def here(self, fields: dict[str, Any]) -> Prediction | None:
        """The best plan on this cluster with other fields than were asked for, as little on a disk as must be."""
        if fields.keys() & self.fixed.keys():
            return None
        found = self.attempt(self.cluster, self.global_batch, self.fixed | fields)
        if found is None:
            return None
        best = found.candidates[0]
        if "nvme" in str(fields.get("offload")):
            less = self.pricer.price(onto_disk(self.pricer, found.best, best.micro_batch), self.global_batch)
            best = less if less.fits else best
        return best if best.fits else None


def nothing(
    blueprint: Blueprint,
    cluster: Cluster,
    global_batch: int,
    precision: str,
    compiled: bool,
    fixed: dict[str, Any],
    accepts: Callable[[Plan], bool] | None,
) -> str:
    """Why there is no plan, and what would do, a sentence each."""
    asked = _Asked(blueprint, cluster, global_batch, precision, compiled, fixed, accepts)
    if not any(asked.space.families()):
        return _impossible(asked)
    here = f"{blueprint.model} does not fit on {cluster.devices} x {cluster.device.name}"
    would = [*_same_numbers(asked), *_other_numbers(asked)]
    larger = _smallest(cluster, asked.elsewhere)
    if larger is not None:
        beside = f" (with global_batch={larger.global_batch})" if larger.global_batch != global_batch else ""
        would.append(f"A larger cluster: {larger.cluster.text or larger.cluster.devices}{beside} as {larger.best} would do")
    if not would:
        return f"{here}, nor on any number of them that was tried: use devices with more memory"
    return ". ".join([here, *would])


def _impossible(asked: _Asked) -> str:
    """The nearest thing that works where the degrees or the batch allow no plan at all."""
    devices, batch = asked.cluster.devices, asked.global_batch
    held = " ".join(f"{name}={value}" for name, value in asked.fixed.items())
    if held:
        return f"no plan has {held} with {devices} devices and global_batch={batch}: {_nearest(asked.space, asked.fixed)}"
    near = max(devices, round(batch / devices) * devices)
    return f"no data axis of {devices} devices divides global_batch={batch}: the nearest that works is {near}"


def _same_numbers(asked: _Asked) -> list[str]:
    """What this cluster can do without changing numbers, its host's memory being too small: the first that fits."""
    began = time.perf_counter()
    for fields in SAME:
        if time.perf_counter() - began > PATIENCE_S:
            break
        found = asked.here(fields)
        if found is not None:
            disk = f", with {found.disk_bytes / 1e9:,.1f} GB for each device on a disk at DIR" if found.disk_bytes else ""
            return [f"Here, with the same numbers: {found.plan} would do{disk}"]
    return []


def _other_numbers(asked: _Asked) -> list[str]:
    """What this cluster can do with states in other forms: the first that fits."""
    began = time.perf_counter()
    for what, fields in OTHER:
        if time.perf_counter() - began > PATIENCE_S:
            break
        if "master" in fields and asked.precision != "bf16":
            continue
        found = asked.here(fields)
        if found is not None:
            return [f"Here, with other numbers ({what}): {found.plan} would do"]
    return []


def _nearest(space: Space, fixed: dict[str, Any]) -> str:
    """The nearest value of one held field that works with the others."""
    for name, value in fixed.items():
        others = tuple((other, each) for other, each in fixed.items() if other != name)
        if name not in {f.name for f in dataclasses.fields(Family)} or not isinstance(value, int):
            continue
        values = {getattr(family, name) for family in replace(space, fixed=others).families()}
        if values:
            return f"the nearest that works is {name}={min(values, key=lambda each: (abs(each - value), each))}"
    return "leave one of them out"


def _smallest(cluster: Cluster, attempt: Callable[[Cluster], Search | None]) -> Search | None:
    """The smallest cluster that was found to do: by doubling, then between the last that does not and the first that does."""
    began = time.perf_counter()
    sizes: list[Cluster] = []
    for factor in (2, 4, 8, 16, 32, 64, 128, 256):
        sizes.append(cluster.resized(cluster.nodes * factor) if cluster.nodes > 1 else _grown(cluster, factor))
    least, found = cluster, None
    for where in sizes:
        if time.perf_counter() - began > PATIENCE_S:
            return None
        found = attempt(where)
        if found is not None:
            break
        least = where
    while found is not None and found.cluster.nodes - least.nodes > 1 and time.perf_counter() - began < PATIENCE_S:
        between = found.cluster.resized((found.cluster.nodes + least.nodes) // 2)
        again = attempt(between)
        found, least = (again, least) if again is not None else (found, between)
    return found


def _grown(cluster: Cluster, factor: int) -> Cluster:
    """A single node grows to eight devices before there are more of it."""
    each = min(max(8, cluster.per_node), cluster.per_node * factor)
    return cluster.resized(max(1, cluster.per_node * factor // each), each)
