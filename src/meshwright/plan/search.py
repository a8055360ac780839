"""`search`: the best plans of the whole space, exactly, without pricing all of them.

Families are visited in the order of a lower bound of their step; a family whose bound is not better than the last of the best is
rejected whole, and so is one whose smallest possible memory does not fit. Bounds never exceed the true cost, so the result is that
of brute force (tests hold it to that). Every rejection keeps its reason and how many plans it stands for.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshwright.blueprint.record import Blueprint
from meshwright.cluster import Cluster
from meshwright.errors import ConfigError, PlanError
from meshwright.plan.footprint import Elements, States, states
from meshwright.plan.plan import Plan, moved
from meshwright.plan.predict import Base, Pricer
from meshwright.plan.prediction import Prediction
from meshwright.plan.space import Family, Space, divisors
from meshwright.plan.time import Split

OBJECTIVES = ("fastest", "cheapest", "smallest", "longest")
PATIENCE_S = 2.0
"""Seconds spent at most to find a cluster that would do, when the one at hand does not."""
MEMORY = "does not fit in memory"
SLOWER = "slower than the plans kept, by a bound"


@dataclass(frozen=True)
class Search:
    """What a search found: predictions best first, how many plans it covers, and why the others are not among them."""

    model: dict[str, Any]
    cluster: Cluster
    global_batch: int
    objective: str
    candidates: tuple[Prediction, ...]
    searched: int
    rejected: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def best(self) -> Plan:
        """The best plan, resolved."""
        return Plan.parse(self.candidates[0].plan)

    def to_json(self) -> dict[str, Any]:
        """The document of `plan --json` (DESIGN section 4)."""
        return {
            "model": self.model,
            "cluster": self.cluster.to_json() | {"devices": self.cluster.devices},
            "global_batch": self.global_batch,
            "objective": self.objective,
            "searched": self.searched,
            "rejected": self.rejected,
            "seconds": self.seconds,
            "candidates": [candidate.candidate() for candidate in self.candidates],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        from meshwright.plan.explain import table  # the printer knows the search, not the other way round

        return table(self)


def search(
    blueprint: Blueprint,
    cluster: Cluster,
    global_batch: int,
    precision: str = "bf16",
    *,
    objective: str = "fastest",
    top: int = 5,
    compiled: bool = False,
    fixed: dict[str, Any] | None = None,
    accepts: Callable[[Plan], bool] | None = None,
    advise: bool = True,
) -> Search:
    """The `top` best plans for a model on a cluster with `global_batch` items a step.

    `objective`: `fastest` step on all devices; `cheapest` step (dollars, any number of whole nodes up to the cluster's); `smallest`
    number of devices that fit; `longest` sequence that fits (models made from a spec). `fixed` holds fields of the plan at a value,
    `accepts` leaves out what an executor refuses; `advise=False` spares
    the search for a cluster that would do. Raises `PlanError` if nothing fits, with what would; `ConfigError` for a wrong
    objective, batch or field.
    """
    began = time.perf_counter()
    _check(objective, global_batch, top, fixed)
    if objective == "longest":
        from meshwright.plan.longest import longest  # it searches by calling this

        return longest(blueprint, cluster, global_batch, precision, top, compiled, fixed, accepts)
    sizes = [cluster] if objective == "fastest" else _sizes(cluster)
    found: list[tuple[Cluster, _Best]] = []
    for each in sizes:
        pricer = Pricer.of(blueprint, each, precision, compiled)
        space = Space(pricer.shape, each.devices, global_batch, precision, compiled, tuple((fixed or {}).items()), accepts)
        best = _Best(pricer, space, top)
        best.run()
        if best.kept or objective == "fastest":
            found.append((each, best))
        if objective == "smallest" and best.kept:
            break
    chosen = _chosen(found, objective)
    if (chosen is None or not chosen[1].kept) and not advise:
        raise PlanError("nothing fits")
    if chosen is None or not chosen[1].kept:
        raise PlanError(_nothing(blueprint, cluster, global_batch, precision, compiled, fixed, accepts, found))
    each, best = chosen
    return Search(
        model=_model(blueprint, best.pricer, precision),
        cluster=each,
        global_batch=global_batch,
        objective=objective,
        candidates=tuple(best.predictions()),
        searched=best.searched,
        rejected=dict(sorted(best.rejected.items())),
        seconds=time.perf_counter() - began,
        notes=tuple(blueprint.notes),
    )


def _check(objective: str, global_batch: int, top: int, fixed: dict[str, Any] | None) -> None:
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r} is unknown: use one of {', '.join(OBJECTIVES)}")
    if global_batch < 1 or top < 1:
        name, value = ("global_batch", global_batch) if global_batch < 1 else ("top", top)
        raise ConfigError(f"{name}={value} must be at least 1")
    known = {f.name for f in dataclasses.fields(Plan)}
    for name in fixed or {}:
        if name not in known:
            raise ConfigError(f"a plan has no field {name!r} to hold fixed: its fields are {', '.join(sorted(known))}")


def _sizes(cluster: Cluster) -> list[Cluster]:
    """Clusters of the same hardware from one device to all of it: parts of a node, then whole nodes."""
    parts = [d for d in divisors(cluster.per_node) if d < cluster.per_node]
    counts = sorted({*(2**k for k in range(cluster.nodes.bit_length())), *divisors(cluster.nodes)})
    return [cluster.resized(1, part) for part in parts] + [cluster.resized(n) for n in counts if n <= cluster.nodes]


def _chosen(found: Sequence[tuple[Cluster, Any]], objective: str) -> tuple[Cluster, Any] | None:
    if not found:
        return None
    if objective == "cheapest":
        return min(
            found,
            key=lambda pair: -pair[1].kept[0][0] * max(pair[0].device.price, 1e-9) * pair[0].devices if pair[1].kept else 9e99,
        )
    return found[0]


def _model(blueprint: Blueprint, pricer: Pricer, precision: str) -> dict[str, Any]:
    return {
        "model": blueprint.model,
        "parameters": blueprint.n_parameters,
        "blocks": len(blueprint.calls),
        "sequence": blueprint.sequence,
        "precision": precision,
        "kernels": pricer.shape.mode,
    }


class _Best:
    """The best plans so far, and the count of all others by reason. `kept` is a heap of (-seconds, -order, plan)."""

    def __init__(self, pricer: Pricer, space: Space, top: int) -> None:
        self.pricer, self.space, self.top = pricer, space, top
        self.kept: list[tuple[float, int, Plan]] = []
        self.rejected: dict[str, int] = {}
        self.searched = 0
        self.priced = 0
        self.capacity = pricer.cluster.device.memory_bytes
        self._known_schedules: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._known_tails: dict[int, list[dict[str, Any]]] = {}
        self._totals: dict[tuple[int, int], float] = {}
        self._held: dict[Any, list[list[States]]] = {}
        self._least: dict[Any, list[tuple[float, float]]] = {}

    def run(self) -> None:
        """Visit every family, the most promising first; its bound is sharpened when it first comes up."""
        waiting: list[tuple[float, int, bool, Family]] = []
        floors: dict[Any, float] = {}
        for order, family in enumerate(self.space.families()):
            n = self._count(family)
            self.searched += n
            if n == 0:
                continue
            if self._least_memory(family) > self.capacity:
                self._reject(MEMORY, n)
                continue
            waiting.append((self._floor(family, floors), order, False, family))
        heapq.heapify(waiting)
        while waiting:
            bound, order, sharp, family = heapq.heappop(waiting)
            if bound >= self.worst:
                self._reject(SLOWER, self._count(family) + sum(self._count(f) for *_, f in waiting))
                break
            if sharp:
                self._visit(family, order)
            else:
                whole = self._blocks(family, family.items) * family.micro / family.pp
                heapq.heappush(waiting, (max(bound, whole), order, True, family))

    @property
    def worst(self) -> float:
        """Seconds that a new plan must beat."""
        return -self.kept[0][0] if len(self.kept) == self.top else float("inf")

    def _schedules(self, family: Family) -> list[dict[str, Any]]:
        key = (family.pp, family.micro)
        if key not in self._known_schedules:
            self._known_schedules[key] = self.space.schedules(*key)
        return self._known_schedules[key]

    def _tails(self, family: Family) -> list[dict[str, Any]]:
        if family.data not in self._known_tails:
            self._known_tails[family.data] = self.space.tails(family.data)
        return self._known_tails[family.data]

    def _count(self, family: Family) -> int:
        return len(self._schedules(family)) * len(self._tails(family))

    def predictions(self) -> list[Prediction]:
        """The kept plans, best first."""
        ranked = sorted(self.kept, key=lambda entry: (-entry[0], -entry[1]))
        return [self.pricer.price(plan, self.space.global_batch) for _, _, plan in ranked]

    def _floor(self, family: Family, floors: dict[Any, float]) -> float:
        """A lower bound of the step: the family's blocks at the best efficiency that any micro-batch has, in perfect balance.

        Seconds per item fall as micro-batches grow, but for the power limit on large products: `sustained` gives that back.
        """
        key = (family.tp, family.sp, family.cp, family.ep, family.recompute, family.data)
        if key not in floors:
            largest = self.space.global_batch // family.data
            floors[key] = self._blocks(family, min(largest, 256)) / min(largest, 256) * float(self.pricer.rate.table["sustained"])
        return floors[key] * family.items * family.micro / family.pp

    def _blocks(self, family: Family, items: int) -> float:
        times = self.pricer.units(self._split(family, items))[0]
        calls = self.pricer.shape.calls
        counts = [calls.count(kind) for kind in range(len(self.pricer.shape.kinds))] + [1, 1]
        return sum(count * (unit.total_forward + unit.total_backward) for unit, count in zip(times, counts, strict=True))

    def _split(self, family: Family, items: int) -> Split:
        return Split(items, family.tp, family.sp, family.cp, family.ep, self.space.precision, family.recompute)

    def _least_memory(self, family: Family) -> float:
        """A lower bound of the bytes on the heaviest rank: everything sharded and offloaded, one micro-batch's inputs kept."""
        key = (family.tp, family.ep)
        if key not in self._totals:
            shape = self.pricer.shape
            self._totals[key] = sum(sum(kind.weights.local(*key)) * shape.calls.count(i) for i, kind in enumerate(shape.kinds))
        return self._totals[key] / family.pp / max(1, family.data * family.cp) * self.pricer.width

    def _visit(self, family: Family, order: int) -> None:
        """Price the members of a family, a schedule at a time: by its time, by the least memory, then member by member."""
        split = self._split(family, family.items)
        tails = self._tails(family)
        for place, schedule in enumerate(self._schedules(family)):
            some = self.space.plan(family, schedule)
            if self._too_large(family, some, split, self._least_states(family, some)):
                self._reject(MEMORY, len(tails))
                continue
            base = self.pricer.base(some, split)
            if base.span >= self.worst:
                self._reject(SLOWER, len(tails))
            else:
                self._price(family, some, split, base, order * 1000000 + place * len(tails))

    def _elements(self, family: Family, some: Plan) -> list[Elements]:
        """Parameters on each rank that may be the heaviest."""
        stages = self.pricer.stages(some)
        return [self.pricer.elements(some, stages[rank]) for rank in self.pricer.heads(some)]

    def _least_states(self, family: Family, some: Plan) -> list[tuple[float, float]]:
        """On each rank that may be the heaviest, the least bytes of states that any member has: with gradients, and without.

        More shards never hold more, and offload never adds, so the widest sharding at each ZeRO stage is enough.
        """
        key = (family.tp, family.cp, family.ep, family.pp, family.data, some.schedule, some.virtual)
        if key not in self._least:
            wide = {"dp_replicate": 1, "dp_shard": family.data, "schedule": some.schedule, "virtual": some.virtual}
            plans = [self.space.plan(family, wide | {"zero": zero, "offload": "optimizer:cpu"}) for zero in (1, 2, 3)]
            least = []
            for each in self._elements(family, some):
                held = [states(plan, each, self.pricer.width) for plan in plans]
                least.append(
                    (min(h.parameters + h.optimizer + h.gradients for h in held), min(h.parameters + h.optimizer for h in held))
                )
            self._least[key] = least
        return self._least[key]

    def _states(self, family: Family, some: Plan, plans: Sequence[Plan]) -> list[list[States]]:
        """Model states of each plan; the same list for plans that hold the same, and kept for families of equal axes."""
        key = (family.tp, family.cp, family.ep, family.pp, family.data, some.schedule, some.virtual)
        if key not in self._held:
            known: dict[Any, list[States]] = {}
            elements = self._elements(family, some)
            table = []
            for plan in plans:
                same = (plan.dp_shard, plan.zero, moved(plan.offload, "optimizer"), moved(plan.offload, "params"))
                if same not in known:
                    known[same] = [states(plan, each, self.pricer.width) for each in elements]
                table.append(known[same])
            self._held[key] = table
        return self._held[key]

    def _too_large(self, family: Family, some: Plan, split: Split, least: Sequence[tuple[float, float]]) -> bool:
        """Whether no member fits: the least of every kind of state, with activations offloaded where that is allowed."""
        lean = self.space.plan(family, {"schedule": some.schedule, "virtual": some.virtual, "offload": "activations:cpu"})
        heads = self.pricer.heads(some)
        whole = self.pricer.whole_gradients(some)
        moments = self.pricer.activations(lean, split, heads)
        return any(
            states[0 if whole else 1] + kept + working > self.capacity
            for states, (kept, working) in zip(least, moments, strict=True)
        )

    def _price(self, family: Family, some: Plan, split: Split, base: Base, order: int) -> None:
        heads = self.pricer.heads(some)
        schedule = {"schedule": some.schedule, "virtual": some.virtual}
        plans = [self.space.plan(family, schedule | tail) for tail in self._tails(family)]
        moments: dict[float, list[tuple[float, float]]] = {}
        for place, (plan, held) in enumerate(zip(plans, self._states(family, some, plans), strict=True)):
            away = moved(plan.offload, "activations")
            if away not in moments:
                moments[away] = self.pricer.activations(plan, split, heads)
            if self.pricer.heaviest_device_bytes(plan, held, moments[away]) > self.capacity:
                self._reject(MEMORY, 1)
                continue
            self.priced += 1
            self._offer(sum(self.pricer.cost(plan, base).values()), order + place, plan)

    def _offer(self, seconds: float, order: int, plan: Plan) -> None:
        entry = (-seconds, -order, plan)
        if len(self.kept) < self.top:
            heapq.heappush(self.kept, entry)
        elif entry[:2] > self.kept[0][:2]:
            heapq.heapreplace(self.kept, entry)
            self._reject("slower than the plans kept", 1)
        else:
            self._reject("slower than the plans kept", 1)

    def _reject(self, reason: str, count: int) -> None:
        if count:
            self.rejected[reason] = self.rejected.get(reason, 0) + count


def _nothing(
    blueprint: Blueprint,
    cluster: Cluster,
    global_batch: int,
    precision: str,
    compiled: bool,
    fixed: dict[str, Any] | None,
    accepts: Callable[[Plan], bool] | None,
    found: Sequence[tuple[Cluster, Any]],
) -> str:
    """Why there is no plan, and the nearest thing that works."""
    pricer = Pricer.of(blueprint, cluster, precision, compiled)
    space = Space(pricer.shape, cluster.devices, global_batch, precision, compiled, tuple((fixed or {}).items()), accepts)
    if not any(space.families()):
        held = " ".join(f"{name}={value}" for name, value in (fixed or {}).items())
        if held:
            return f"no plan has {held} with {cluster.devices} devices and global_batch={global_batch}: leave one of them out"
        near = max(cluster.devices, round(global_batch / cluster.devices) * cluster.devices)
        return f"no data axis of {cluster.devices} devices divides global_batch={global_batch}: the nearest that works is {near}"
    here = f"{blueprint.model} does not fit on {cluster.devices} x {cluster.device.name}"
    began = time.perf_counter()
    for factor in (2, 4, 8, 16, 32, 64, 128, 256):
        if time.perf_counter() - began > PATIENCE_S:
            break
        larger = cluster.resized(cluster.nodes * factor) if cluster.nodes > 1 else _grown(cluster, factor)
        batch = max(1, round(global_batch / larger.devices)) * larger.devices
        try:
            again = search(
                blueprint, larger, batch, precision, top=1, compiled=compiled, fixed=fixed, accepts=accepts, advise=False
            )
        except PlanError:
            continue
        beside = f" (with global_batch={batch})" if batch != global_batch else ""
        return f"{here}: {larger.text or larger.devices} would do{beside}, as {again.best}"
    return f"{here}, nor on any number of them that was tried: use devices with more memory"


def _grown(cluster: Cluster, factor: int) -> Cluster:
    """A single node grows to eight devices before there are more of it."""
    each = min(max(8, cluster.per_node), cluster.per_node * factor)
    return cluster.resized(max(1, cluster.per_node * factor // each), each)
