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
from dataclasses import dataclass, field, replace
from typing import Any

from meshwright.blueprint.record import Blueprint
from meshwright.cluster import Cluster
from meshwright.errors import ConfigError, PlanError
from meshwright.pause import uncollected
from meshwright.plan import pipeline
from meshwright.plan.footprint import Elements, States
from meshwright.plan.fractions import SPARED, least, lighter, model_states, open_state, settle
from meshwright.plan.plan import AUTO, Plan, moved
from meshwright.plan.predict import Pricer
from meshwright.plan.prediction import Prediction
from meshwright.plan.space import LARGEST_MICRO_BATCH, Family, Space, altered, divisors
from meshwright.plan.storage import refuse_contradictions
from meshwright.plan.suited import check_subjects
from meshwright.plan.time import Split
from meshwright.plan.units import Base, InFlight, Need

OBJECTIVES = ("fastest", "cheapest", "smallest", "longest")
MEMORY = "does not fit in memory"
SLOWER = "slower than the plans kept, by a bound"


Tail = tuple[int, dict[str, Any]]


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


@uncollected()
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
    check_subjects(blueprint, cluster, global_batch)
    _check(objective, precision, top, fixed)
    if objective == "longest":
        from meshwright.plan.longest import longest  # it searches by calling this

        return longest(blueprint, cluster, global_batch, precision, top, compiled, fixed, accepts)
    sizes = [cluster] if objective == "fastest" else _sizes(cluster)
    found: list[tuple[Cluster, _Best]] = []
    for each in sizes:
        pricer = Pricer.of(blueprint, each, precision, compiled)
        space = Space(
            pricer.shape, each.devices, global_batch, precision, compiled, tuple((fixed or {}).items()), accepts, pricer.on_host
        )
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
        from meshwright.plan.advice import nothing  # it searches by calling this

        raise PlanError(nothing(blueprint, cluster, global_batch, precision, compiled, fixed or {}, accepts))
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


def _check(objective: str, precision: str, top: int, fixed: dict[str, Any] | None) -> None:
    Plan(precision=precision)  # raises for one that is unknown
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r} is unknown: use one of {', '.join(OBJECTIVES)}")
    if top < 1:
        raise ConfigError(f"top={top} must be at least 1")
    known = {f.name for f in dataclasses.fields(Plan)}
    for name in fixed or {}:
        if name not in known:
            raise ConfigError(f"a plan has no field {name!r} to hold fixed: its fields are {', '.join(sorted(known))}")
    held = {name: value for name, value in (fixed or {}).items() if name in ("zero", "offload", "master", "update", "clip", "pp")}
    refuse_contradictions(dataclasses.replace(Plan(precision=precision, microbatches=AUTO), **held))


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


@dataclass
class _Held:
    """Model states on ranks that may be the heaviest: elements, needs by tail's place and offload, and the least of these."""

    elements: list[Elements]
    needs: dict[tuple[int, str], list[Need]] = field(default_factory=dict)
    least: list[Need] = field(default_factory=list)


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
        self._known_tails: dict[tuple[int, bool], list[list[Tail]]] = {}
        self._totals: dict[tuple[int, int], float] = {}
        self._known_held: dict[Any, _Held] = {}
        self._known_needs: dict[Any, Need] = {}
        self._known_states: dict[Any, States] = {}

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
                self.reject(MEMORY, n)
                continue
            waiting.append((self._floor(family, floors), order, False, family))
        heapq.heapify(waiting)
        while waiting:
            bound, order, sharp, family = heapq.heappop(waiting)
            if bound >= self.worst:
                self.reject(SLOWER, self._count(family) + sum(self._count(f) for *_, f in waiting))
                break
            if sharp:
                self._visit(family, order)
            else:
                whole = self._blocks(family, family.items) * family.micro / family.pp
                heapq.heappush(waiting, (max(bound, whole), order, True, family))

    def held(self, family: Family, some: Plan) -> _Held:
        """What the tails of families with equal axes hold."""
        key = (family.tp, family.cp, family.ep, family.pp, family.data, family.micro == 1, some.schedule, some.virtual)
        if key not in self._known_held:
            stages = self.pricer.stages(some)
            self._known_held[key] = _Held([self.pricer.elements(some, stages[rank]) for rank in self.pricer.heads(some)])
        return self._known_held[key]

    @property
    def worst(self) -> float:
        """Seconds that a new plan must beat."""
        return -self.kept[0][0] if len(self.kept) == self.top else float("inf")

    def _schedules(self, family: Family) -> list[dict[str, Any]]:
        key = (family.pp, family.micro)
        if key not in self._known_schedules:
            self._known_schedules[key] = self.space.schedules(*key)
        return self._known_schedules[key]

    def need(self, plan: Plan, offload: str, key: tuple[Any, ...], elements: Elements) -> Need:
        """`Pricer.needs` of a rank; `key` is what it depends on besides offload and elements, which live as the pricer does."""
        at = id(elements), key, offload
        found = self._known_needs.get(at)
        if found is None:
            tried = altered(plan, offload=offload)
            held = id(elements), key, model_states(offload)
            if held not in self._known_states:
                self._known_states[held] = self.pricer.states(tried, elements)
            found = self._known_needs[at] = self.pricer.needs(tried, self._known_states[held])
        return found

    def _tails(self, family: Family) -> list[list[Tail]]:
        """The tails of a family, those alike but for the number of shards together, the most shards first.

        More shards never hold more, so where one of a list does not fit, nor do those after it. No shards is apart: it takes one
        communicator less.
        """
        key = (family.data, family.pp == 1)
        if key not in self._known_tails:
            lists: dict[Any, list[Tail]] = {}
            for place, tail in enumerate(self.space.tails(family)):
                lists.setdefault((tail["zero"], tail["offload"], tail["dp_shard"] > 1), []).append((place, tail))
            self._known_tails[key] = [sorted(each, key=lambda entry: -entry[1]["dp_shard"]) for each in lists.values()]
        return self._known_tails[key]

    def _count(self, family: Family) -> int:
        return len(self._schedules(family)) * sum(map(len, self._tails(family)))

    def predictions(self) -> list[Prediction]:
        """The kept plans, best first."""
        ranked = sorted(self.kept, key=lambda entry: (-entry[0], -entry[1]))
        return [self.pricer.price(plan, self.space.global_batch) for _, _, plan in ranked]

    def _floor(self, family: Family, floors: dict[Any, float]) -> float:
        """A lower bound of the step: the family's blocks at the best efficiency that any micro-batch has, in perfect balance.

        Seconds per item fall as micro-batches grow, but for the power limit on large products: `sustained` gives that back.
        """
        largest = min(self.space.global_batch // family.data, LARGEST_MICRO_BATCH)
        key = (family.tp, family.sp, family.cp, family.ep, family.recompute, largest)
        if key not in floors:
            floors[key] = self._blocks(family, largest) / largest * float(self.pricer.rate.table["sustained"])
        return floors[key] * family.items * family.micro / family.pp

    def _blocks(self, family: Family, items: int) -> float:
        times = self.pricer.units(self._split(family, items)).times
        calls = self.pricer.shape.calls
        counts = [calls.count(kind) for kind in range(len(self.pricer.shape.kinds))] + [1, 1]
        return sum(count * (unit.total_forward + unit.total_backward) for unit, count in zip(times, counts, strict=True))

    def _split(self, family: Family, items: int) -> Split:
        return self.pricer.split(self.space.plan(family, {}), items)

    def _least_memory(self, family: Family) -> float:
        """A lower bound of the bytes on the heaviest rank: weights and gradients, sharded over all that may shard them."""
        key = (family.tp, family.ep)
        if key not in self._totals:
            shape = self.pricer.shape
            self._totals[key] = sum(sum(kind.weights.local(*key)) * shape.calls.count(i) for i, kind in enumerate(shape.kinds))
        return self._totals[key] / family.pp / max(1, family.data * family.cp) * self.space.least_width(family.pp)

    def _visit(self, family: Family, order: int) -> None:
        """Price the members of a family, a schedule at a time: by the time of the busiest rank, by memory, then one by one."""
        split = self._split(family, family.items)
        splits = split, replace(split, recompute="full")
        tails = self._tails(family)
        count = sum(map(len, tails))
        for place, schedule in enumerate(self._schedules(family)):
            some = self.space.plan(family, schedule)
            if self.pricer.least(some, split) >= self.worst:
                self.reject(SLOWER, count)
                continue
            member = _Member(self, family, schedule, some, splits, order * 1000000 + place * count)
            if not member.may_fit(tails):
                self.reject(MEMORY, count)
                continue
            for alike in tails:
                member.price(alike)

    def offer(self, seconds: float, order: int, plan: Plan) -> None:
        """Keep a plan that fits if it is among the best so far; of equals the first in the space."""
        entry = (-seconds, -order, plan)
        if len(self.kept) < self.top:
            heapq.heappush(self.kept, entry)
        elif entry[:2] > self.kept[0][:2]:
            heapq.heapreplace(self.kept, entry)
            self.reject("slower than the plans kept", 1)
        else:
            self.reject("slower than the plans kept", 1)

    def reject(self, reason: str, count: int) -> None:
        """Count plans that are left out."""
        if count:
            self.rejected[reason] = self.rejected.get(reason, 0) + count


class _Member:
    """A family under one schedule: what all its ways to use the data axes and to offload have in common is computed once."""

    def __init__(
        self, best: _Best, family: Family, schedule: dict[str, Any], some: Plan, splits: tuple[Split, Split], order: int
    ) -> None:
        self.best, self.pricer, self.family, self.schedule = best, best.pricer, family, schedule
        self.some, self.order = some, order
        self.split, self.full = splits  # as the family recomputes, and everything
        self.heads = self.pricer.heads(some)
        self.held = best.held(family, some)
        self.budgets = best.space.budgets(family)
        self._bases: dict[str, Base] = {}
        self._moments: dict[Any, list[InFlight]] = {}

    def may_fit(self, tails: Sequence[Sequence[Tail]]) -> bool:
        """Whether the least of each kind of bytes that any tail holds would fit together."""
        if not self.held.least:
            most = max(moved(tail["offload"], "optimizer") for (_, tail), *_ in tails)
            lean = [entry for entry, *_ in tails if moved(entry[1]["offload"], "optimizer") == most]  # moving away never adds
            plans = [(place, self.best.space.plan(self.family, self.schedule | tail)) for place, tail in lean]
            needs = [self._needs(place, plan, plan.offload) for place, plan in plans]
            for each in zip(*needs, strict=True):
                least = Need(*map(min, zip(*each, strict=True)))
                self.held.least.append(least._replace(room=self.pricer.cluster.device.host_memory_bytes))
        if self.budgets:
            loosest = self.pricer.budget(self.held.least, self._kept("none", self.full), self._kept("none", self.split))
            self.budgets = loosest is not None and self._least(loosest) < self.best.worst
        away = max((tail["offload"] for (_, tail), *_ in tails), key=lambda offload: moved(offload, "activations"))
        if self.budgets:
            return True
        moments, host = self._kept(away, self.split), self.pricer.cluster.device.host_memory_bytes
        if any(each.host > host for each in moments):  # they stay; what is alive beside them at the first backward is less then
            moments = [each._replace(movable=0.0, host=0.0, first=-each.kept) for each in moments]
        return self.pricer.fits(self.held.least, moments)

    def _least(self, recompute: str) -> float:
        """A lower bound of the span under a budget: its busiest rank's time; where that bounds it, with the fill of no recompute.

        The fill of 1f1b and of looped schedules is the sum over ranks without the longest, which grows with every rank's time.
        """
        tried = self.best.space.plan(self.family, self.schedule | {"recompute": recompute})
        fill = 0.0
        if self.some.pp > 1 and self.some.schedule in ("1f1b", *pipeline.VIRTUAL):
            fill = self._base(self.some, self.split).span - self.pricer.least(self.some, self.split)
        return fill + self.pricer.least(tried, self.full)

    def price(self, tails: Sequence[Tail]) -> None:
        """Offer each plan that fits and may be among the best; the first that does not fit stands for those after it."""
        for index, (place, tail) in enumerate(tails):
            plan = self.best.space.plan(self.family, self.schedule | tail)
            if not self.budgets and plan.recompute in self._bases and self._bases[plan.recompute].span >= self.best.worst:
                self.best.reject(SLOWER, len(tails) - index)
                return
            fields = self._settled(place, plan)
            if fields is None:
                self.best.reject(MEMORY, len(tails) - index)
                return
            if fields.get("offload") == SPARED:
                self.best.reject(SPARED, 1)
                continue
            split = self.full if "recompute" in fields else self.split
            if fields:
                plan = self.best.space.plan(self.family, self.schedule | tail | fields)
            if split is self.full and self._least(plan.recompute) >= self.best.worst:
                self.best.reject(SLOWER, len(tails) - index)
                return
            base = self._base(plan, split)
            if base.span >= self.best.worst:
                self.best.reject(SLOWER, len(tails) - index)
                return
            self.best.offer(sum(self.pricer.cost(plan, base).values()), self.order + place, plan)

    def _base(self, plan: Plan, split: Split) -> Base:
        if plan.recompute not in self._bases:
            self._bases[plan.recompute] = self.pricer.base(plan, split)
        return self._bases[plan.recompute]

    def _settled(self, place: int, plan: Plan) -> dict[str, str] | None:
        """What to change in a plan so that it fits: how much it moves, or its recompute; None if nothing does.

        Its offload becomes `SPARED` where it fits with less moved than its least, so that another plan is the better one.
        """

        def needs(text: str) -> list[Need]:
            return self._needs(place, plan, text)

        kept = self._kept(plan.offload, self.split)
        if not self.best.space.fractions or open_state(plan.offload) is None:
            if self.pricer.fits(needs(plan.offload), kept):
                return {}
        elif settle(lighter(plan.offload), needs, kept, self.pricer):
            return {"offload": SPARED}
        elif text := least(plan.offload, needs, kept, self.pricer):
            return {"offload": text}
        recompute = self._budget(needs(plan.offload), plan)
        return None if recompute is None else {"recompute": recompute}

    def _needs(self, place: int, plan: Plan, offload: str) -> list[Need]:
        """What the ranks need besides activations where `offload` is moved; `place` is the tail's."""
        at = place, offload
        if at not in self.held.needs:
            data = (plan.shards, plan.dp_shard > 1, plan.dp_replicate, plan.cp > 1)
            key = (*data, plan.zero, plan.microbatches == 1)
            self.held.needs[at] = [self.best.need(plan, offload, key, each) for each in self.held.elements]
        return self.held.needs[at]

    def _kept(self, offload: str, split: Split) -> list[InFlight]:
        """Activations on the ranks that may be the heaviest (see `Pricer.activations`)."""
        key = split is self.full, moved(offload, "activations")
        if key not in self._moments:
            plan = self.best.space.plan(self.family, self.schedule | {"offload": offload})
            self._moments[key] = self.pricer.activations(plan, split, self.heads)
        return self._moments[key]

    def _budget(self, needs: Sequence[Need], plan: Plan) -> str | None:
        """The largest budget of activations that makes a plan without recompute fit."""
        if not self.budgets or moved(plan.offload, "activations"):
            return None
        return self.pricer.budget(needs, self._kept("none", self.full), self._kept("none", self.split))
