"""The space that a search covers: which values each axis may take, and how many plans that makes.

A *family* fixes what decides the work of one rank (tp, sp, cp, ep, pp, micro-batches, recompute); its *members* differ in what is
done with the data axes, the schedule and offload. Families are what a bound can reject at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meshwright.plan import pipeline
from meshwright.plan.fractions import WAYS, ways
from meshwright.plan.plan import Plan, moved
from meshwright.plan.profile import Profile

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "zero_bubble", "zbv", "dualpipev", "interleaved")
LARGEST_TP = 64
LARGEST_CP = 64
LARGEST_MICRO_BATCH = 256


@dataclass(frozen=True)
class Family:
    """What decides the work of one rank; `items` of a micro-batch, `micro` of them, `data` ranks on the data axes."""

    tp: int
    sp: bool
    cp: int
    ep: int
    pp: int
    micro: int
    items: int
    data: int
    recompute: str


@dataclass(frozen=True)
class Space:
    """The plans of a search: for `devices` ranks, a global batch and a model. `fixed` values hold for every plan.

    `accepts` says whether an executor would run a plan; it is asked once for each value of an axis and once for each plan returned.
    """

    shape: Profile
    devices: int
    global_batch: int
    precision: str
    compiled: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()
    accepts: Callable[[Plan], bool] | None = None
    on_host: bool = False
    """Ranks compute on CPUs: offload to `cpu` does nothing."""

    @cached_property
    def _base(self) -> dict[str, Any]:
        """Every field of a plan before a family and a member set theirs."""
        return _DEFAULTS | dict(self.fixed) | {"precision": self.precision, "compile": self.compiled}

    @cached_property
    def fractions(self) -> bool:
        """Whether the search says how much is offloaded; else all plans have what is asked for."""
        return "offload" not in dict(self.fixed)

    def least_width(self, pp: int) -> int:
        """Bytes of each parameter's weight and gradient together that no plan does without, were all of it sharded."""
        full = (self._base["update"], self._base["master"]) == ("step", "fp32")
        if moved(str(self._base["offload"]), "params"):
            return 0
        if self.fractions and pp == 1 and not self.on_host:  # weights may be elsewhere, gradients are here
            frozen = any(unit.weights.frozen for unit in (*self.shape.kinds, self.shape.before, self.shape.after))
            return 0 if frozen or self._base["update"] != "step" else 4 if full else 2
        return 4 if full else 2

    def families(self) -> Iterator[Family]:
        """Every family that is legal for the model, the devices and the batch."""
        for tp in self._values("tp", [d for d in divisors(self.devices) if d <= LARGEST_TP and self._cuts(d)]):
            for sp in self._values("sp", [False, True] if tp > 1 else [False], tp=tp):
                for cp in self._values("cp", self._context(tp)):
                    for pp in self._values("pp", self._depths(tp * cp)):
                        yield from self._rest(tp, sp, cp, pp)

    def _rest(self, tp: int, sp: bool, cp: int, pp: int) -> Iterator[Family]:
        data = self.devices // (tp * cp * pp)
        if self.global_batch % data:
            return
        each = self.global_batch // data
        # Where nothing is spared (fused attention in a fused stack keeps nothing of its core), repeating would only cost time.
        core = any((kind.spared or 1.0) < 1.0 or any(kept.core for kept in kind.kept) for kind in self.shape.kinds)
        recomputes = self._free("recompute", [r for r in RECOMPUTE if core or r != "selective"])
        counts = [m for m in divisors(each) if each // m <= LARGEST_MICRO_BATCH]
        for ep in self._values("ep", self._experts(tp, cp, data)):
            for micro in self._values("microbatches", counts):
                for recompute in recomputes:
                    yield Family(tp, sp, cp, ep, pp, micro, each // micro, data, recompute)

    def members(self, family: Family) -> list[dict[str, Any]]:
        """The plans of a family, as the fields in which they differ: every schedule with every tail."""
        return [schedule | tail for schedule in self.schedules(family.pp, family.micro) for tail in self.tails(family)]

    def budgets(self, family: Family) -> bool:
        """Whether plans of a family that don't fit may recompute by a budget instead of not at all."""
        return family.recompute == "none" and self._takes_budgets

    @cached_property
    def _takes_budgets(self) -> bool:
        return "recompute" not in dict(self.fixed) and self.shape.mode != "fused" and self._runs({"recompute": "budget=1G"})

    def tails(self, family: Family) -> list[dict[str, Any]]:
        """What is done with the ranks of the data axes, and what is offloaded; how much of it, `fractions.py` says."""
        found = []
        for way in self.data_axes(family.data):
            degrees = family.pp, way["dp_shard"], way["zero"], self.devices
            found += [way | {"offload": offload} for offload in self._offloads(*degrees)]
        return found

    def _offloads(self, pp: int, dp_shard: int, zero: int, devices: int) -> list[str]:
        if self.on_host and self.fractions:
            return self._free("offload", ["none"])
        every = ways(pp, dp_shard, zero, devices)
        taken = self._free("offload", list(every))
        return taken if len(every) > len(WAYS) else [way for way in taken if not moved(way, "params")]

    def data_axes(self, data: int) -> list[dict[str, Any]]:
        """Ways to split the data ranks: replicas times shards, and what the shards divide."""
        ways = []
        for shard in divisors(data):
            stages = [3] if shard == 1 else self._values("zero", [1, 2, 3], dp_shard=shard)
            ways += [{"dp_replicate": data // shard, "dp_shard": shard, "zero": zero} for zero in stages]
        return [way for way in ways if self._agrees(way)]

    def schedules(self, pp: int, micro: int) -> list[dict[str, Any]]:
        """Schedules that a pipeline of `pp` ranks can run with `micro` micro-batches."""
        layers = len(self.shape.calls)
        if pp == 1:
            ways = [{"schedule": "1f1b", "virtual": 1}]
        else:
            asked = dict(self.fixed).get("schedule")
            plain = [asked] if asked in ("gpipe", "layerwise") else list(SCHEDULES[:2])
            ways = [{"schedule": s, "virtual": 1} for s in plain if pp <= layers and (s != "layerwise" or micro == 1)]
            folded = [("zbv", pp), ("dualpipev", 2 * pp)]  # with the micro-batches that fill them
            ways += [{"schedule": s, "virtual": 2} for s, least in folded if 2 * pp <= layers and micro >= least]
            if micro % pp == 0:
                spread = [v for v in divisors(max(1, layers // pp)) if v > 1 and layers % (pp * v) == 0]
                looped = "looped_bfs" if asked == "looped_bfs" else "interleaved"
                ways += [{"schedule": looped, "virtual": v} for v in spread]
        split = str(self._base["split"])
        if split != "balanced":
            ways = [way for way in ways if pp * int(str(way["virtual"])) == split.count(",") + 1]
        return [way for way in ways if self._agrees(way) and self._runs({"pp": pp} | way)]

    def plan(self, family: Family, member: dict[str, Any]) -> Plan:
        """The plan of one member, without a second check of its fields."""
        made: Plan = object.__new__(Plan)
        made.__dict__.update(self._base)
        made.__dict__.update(
            tp=family.tp,
            sp=family.sp,
            cp=family.cp,
            ep=family.ep,
            pp=family.pp,
            microbatches=family.micro,
            recompute=family.recompute,
        )
        made.__dict__.update(member)
        return made

    def _values(self, name: str, values: list[Any], **beside: Any) -> list[Any]:
        """The values of an axis that are asked for and that the executor takes."""
        asked = dict(self.fixed).get(name)
        kept = [value for value in values if asked is None or value == asked]
        return [value for value in kept if self._runs(beside | {name: value})]

    def _free(self, name: str, values: list[str]) -> list[str]:
        """The values of a field that takes others too (a budget, a directory): those if none is asked for."""
        asked = dict(self.fixed).get(name)
        return self._values(name, values if asked is None else [asked])

    def _agrees(self, way: dict[str, Any]) -> bool:
        fixed = dict(self.fixed)
        return all(fixed.get(name, value) == value for name, value in way.items() if name != "zero" or way.get("dp_shard", 2) > 1)

    def _runs(self, fields: dict[str, Any]) -> bool:
        if self.accepts is None:
            return True
        probe = {key: value for key, value in fields.items() if value != _DEFAULTS[key]}
        return not probe or self.accepts(dataclasses.replace(Plan(precision=self.precision), **probe))

    def _cuts(self, tp: int) -> bool:
        """Whether every head-wise region can be cut in `tp` equal parts."""
        if tp == 1:
            return True
        units = [exchange.units for kind in self.shape.kinds for exchange in kind.exchanges]
        return bool(units) and all(u % tp == 0 for u in units)

    def _context(self, tp: int) -> list[int]:
        length = self.shape.sequence
        if not length or not any(kind.attention for kind in self.shape.kinds):
            return [1]
        return [c for c in divisors(self.devices // tp) if c == 1 or (c <= LARGEST_CP and length % (2 * c) == 0)]

    def _depths(self, inner: int) -> list[int]:
        layers = len(self.shape.calls)
        if self._base["update"] == "backward" or moved(str(self._base["offload"]), "params"):
            return [1]  # no pipeline runs with these (`storage.py`)
        return [p for p in divisors(self.devices // inner) if p == 1 or (p <= layers and self.shape.boundaries)]

    def _experts(self, tp: int, cp: int, data: int) -> list[int]:
        experts = self.shape.n_experts
        return [e for e in divisors(experts) if (data * tp * cp) % e == 0 and e <= data] if experts else [1]


def altered(plan: Plan, **fields: Any) -> Plan:
    """A plan with other values that are known to be right: `dataclasses.replace` without the checks, which a search would feel."""
    made: Plan = object.__new__(Plan)
    made.__dict__.update(plan.__dict__, **fields)
    return made


_DEFAULTS = dataclasses.asdict(Plan())


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def held(schedule: str, virtual: int, pp: int) -> int:
    """Stages on each rank."""
    return pipeline.chunks(schedule, virtual) if pp > 1 else 1
