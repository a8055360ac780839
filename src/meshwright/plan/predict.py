"""`predict`: what one plan costs, put together from units, stages, data ranks and the schedule.

`Pricer` holds what does not change between plans (the profile, the cluster, the batch) and remembers what units cost; `search.py`
asks it thousands of times, `predict` once. What a unit takes is in `time.py` and `footprint.py`, what a schedule does in
`pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from meshwright.blueprint.record import Blueprint
from meshwright.cluster import Cluster
from meshwright.errors import ModelError, PlanError
from meshwright.plan import pipeline
from meshwright.plan.collectives import all_reduce, gather, group, scatter, send
from meshwright.plan.constants import constants
from meshwright.plan.footprint import Elements, States, chunk_bytes, outside_allocator, states, unit_bytes
from meshwright.plan.memory import widths
from meshwright.plan.plan import Plan, moved, offloads
from meshwright.plan.prediction import Prediction, bound
from meshwright.plan.profile import Profile, profile
from meshwright.plan.recompute import budget_bytes, check_budget, shared_out, steps
from meshwright.plan.stages import balance, place
from meshwright.plan.storage import refuse_contradictions
from meshwright.plan.suited import check_subjects, run_mode, suited
from meshwright.plan.time import Rates, Split, UnitTime, in_chunks, rates, unit_time
from meshwright.plan.units import Base, InFlight, Need, Stage, Units


def predict(blueprint: Blueprint, cluster: Cluster, plan: Plan | str, global_batch: int) -> Prediction:
    """Memory and time of one plan, itemised (see `Prediction`); `global_batch` is in items (sequences, images).

    A plan text is resolved for the cluster's devices. Raises `PlanError` if the axes don't multiply to the devices or don't divide
    the batch, `ModelError` for a blueprint that was not captured.
    """
    check_subjects(blueprint, cluster, global_batch)
    plan = (plan if isinstance(plan, Plan) else Plan.parse(plan)).resolve(cluster.devices)
    refuse_contradictions(plan)
    found = Pricer.of(blueprint, cluster, plan.precision, plan.compile).price(plan, global_batch)
    check_budget(blueprint, plan, found.micro_batch)
    return found


FULL_STORAGE = 12.0
"""Bytes per parameter of a full-precision weight and Adam's two states, which `constants.toml`'s optimizer traffic is for."""


class Pricer:
    """Costs of plans for one profile on one cluster at one precision; remembers every unit's cost."""

    def __init__(self, shape: Profile, cluster: Cluster, precision: str) -> None:
        self.shape, self.cluster, self.precision = shape, cluster, precision
        self.rate: Rates = rates(cluster, precision, shape.mode, shape.dtype)
        self.width = 4  # bytes of a parameter as a user's model holds it
        self.kernels = cluster.device.kernels
        self.on_host = self.kernels == "cpu"
        self.slack = 0.0 if self.kernels == "cpu" else float(constants()["memory"]["slack"])
        self.flat_gradients = shape.mode != "eager"
        """Gradients lie in buffers that live from step to step."""
        self.share = dict(cluster.device.rates).get("share", 1.0)
        self._units: dict[Split, Units] = {}
        self._stages: dict[tuple[int, str, int, str], list[Stage]] = {}
        self._balanced: dict[int, list[int]] = {}
        self._groups: dict[tuple[int, int], Any] = {}
        self._heads: dict[tuple[int, str, int, str], list[int]] = {}
        self._elements: dict[tuple[int, int, int], Elements] = {}

    @staticmethod
    def of(blueprint: Blueprint, cluster: Cluster, precision: str, compiled: bool = False) -> Pricer:
        """The pricer for a blueprint; kept beside the blueprint, so that a second prediction costs no capture."""
        if not blueprint.captured:
            raise ModelError(f"{blueprint.model} was not captured, so nothing can be predicted: {' '.join(blueprint.notes)}")
        kept: dict[Any, Any] = blueprint.__dict__.setdefault("_pricers", {})
        mode = run_mode(blueprint, compiled)
        key = (id(constants()), str(cluster), cluster, precision, mode)
        if key not in kept:
            ready = suited(blueprint, cluster, precision)
            profiles: dict[str, Profile] = ready.__dict__.setdefault("_profiles", {})
            if mode not in profiles:
                profiles[mode] = profile(ready, mode)
            kept[key] = Pricer(profiles[mode], cluster, precision)
        found: Pricer = kept[key]
        return found

    def group(self, n: int, stride: int) -> Any:
        """The group of `n` ranks `stride` apart on this cluster."""
        if (n, stride) not in self._groups:
            self._groups[n, stride] = group(self.cluster, n, stride)
        return self._groups[n, stride]

    def units(self, split: Split) -> Units:
        """Time and bytes of every block kind, then of what runs before and after, for one split of the work."""
        found = self._units.get(split)
        if found is None:
            tp = self.group(split.tp, 1)
            cp = self.group(split.cp, split.tp)
            ep = self.group(split.ep, split.tp * split.cp)
            plain, after = replace(split, recompute="none"), self.shape.after
            all_units = [(unit, split) for unit in self.shape.kinds] + [(self.shape.before, plain)]
            times = [unit_time(unit, each, self.rate, tp, cp, ep) for unit, each in all_units]
            sizes = [unit_bytes(unit, each, self.rate.element) for unit, each in all_units]
            last = in_chunks(after, plain, self.rate, tp, cp, ep), chunk_bytes(after, plain, self.rate.element)
            found = self._units[split] = Units([*times, last[0]], [*sizes, last[1]])
        return found

    def stages(self, plan: Plan) -> list[Stage]:
        """What each rank of the pipeline holds: blocks cut as the executor cuts them, or as `split=` says."""
        key = (plan.pp, plan.schedule, plan.virtual, plan.split)
        if key not in self._stages:
            held = pipeline.chunks(plan.schedule, plan.virtual) if plan.pp > 1 else 1
            total, calls = plan.pp * held, self.shape.calls
            ends = self._ends(plan, total)
            found = []
            for rank in range(plan.pp):
                mine = [pipeline.owner(plan.schedule, plan.pp, chunk, rank) for chunk in range(held)]
                here = [kind for index in mine for kind in calls[ends[index - 1] if index else 0 : ends[index]]]
                every = range(len(self.shape.kinds))
                last = [max((at for at, kind in enumerate(here) if kind == one), default=-1) for one in every]
                later = tuple(tuple(here[at + 1 :].count(kind) for kind in every) for at in last)
                found.append(Stage(tuple(map(here.count, every)), 0 in mine, total - 1 in mine, later))
            same = {stage: stage for stage in found}  # one object for equal stages: they are looked up by identity
            self._stages[key] = [same[stage] for stage in found]
        return self._stages[key]

    def _ends(self, plan: Plan, total: int) -> list[int]:
        """Where each of `total` stages ends; what has more stages than blocks (Megatron's standalone embeddings) is cut evenly."""
        calls = len(self.shape.calls)
        if total == 1:
            return [calls]
        if plan.split != "balanced":
            return place(plan, [str(number) for number in range(calls)], self.shape.cells, [])
        if total not in self._balanced:
            even = [min(calls, index + 1) for index in range(total)]
            self._balanced[total] = balance(self.shape.cells, total) if total <= calls else even
        return self._balanced[total]

    def items(self, plan: Plan, global_batch: int) -> int:
        """Items of one micro-batch on a rank. Raises `PlanError` if the batch can't be divided so."""
        share = plan.dp_replicate * plan.dp_shard * plan.microbatches
        if global_batch % share:
            near = max(share, round(global_batch / share) * share)
            what = f"{plan.dp_replicate * plan.dp_shard} data ranks x {plan.microbatches} microbatches"
            raise PlanError(f"global_batch={global_batch} can't be divided over {what}: the nearest that can is {near}")
        return global_batch // share

    def check(self, plan: Plan) -> None:
        """Raise `PlanError` for a plan that this model or the data axes can't take."""
        if plan.pp > 1:
            pipeline.check(plan.schedule, plan.pp, plan.virtual, plan.microbatches, len(self.shape.calls))
        if plan.ep > 1:
            if not self.shape.n_experts:
                raise PlanError(f"ep={plan.ep} needs a model with experts, and this one has none: leave ep out")
            if self.shape.n_experts % plan.ep:
                raise PlanError(f"ep={plan.ep} does not divide the {self.shape.n_experts} experts: use a divisor of it")
            if (plan.dp_shard * plan.dp_replicate * plan.tp * plan.cp) % plan.ep:
                data = plan.dp_shard * plan.dp_replicate
                raise PlanError(f"ep={plan.ep} lies inside the data axes, which have {data} ranks: use a divisor of {data}")
        if plan.cp > 1 and (not self.shape.sequence or self.shape.sequence % (2 * plan.cp)):
            raise PlanError(f"cp={plan.cp} does not divide a sequence of {self.shape.sequence} in two equal parts per rank")
        if plan.sp and plan.tp == 1:
            raise PlanError("sp=on needs tp of at least 2: sequence parallelism lies between tensor-parallel regions")

    def price(self, plan: Plan, global_batch: int) -> Prediction:
        """The prediction of a resolved plan."""
        self.check(plan)
        items = self.items(plan, global_batch)
        cost = self.cost(plan, self.base(plan, self.split(plan, items)))
        return self._report(plan, global_batch, items, cost, *self.memory(plan, items))

    def split(self, plan: Plan, items: int) -> Split:
        """The part of the work of one rank."""
        recompute = "full" if plan.recompute.startswith("budget") else plan.recompute
        return Split(items, plan.tp, plan.sp, plan.cp, plan.ep, plan.precision, recompute, plan.loss_chunks)

    def elements(self, plan: Plan, stage: Stage) -> Elements:
        """Parameters of a rank of the pipeline before the data axes divide them."""
        key = (id(stage), plan.tp, plan.ep)  # stages live as long as the pricer
        if key not in self._elements:
            self._elements[key] = self._count_elements(plan, stage)
        return self._elements[key]

    def _count_elements(self, plan: Plan, stage: Stage) -> Elements:
        shape = self.shape
        dense = experts = largest = outside = first = frozen = total = 0.0
        for kind, count in enumerate(stage.kinds):
            if count:
                d, e = shape.kinds[kind].weights.local(plan.tp, plan.ep)
                dense, experts, largest = dense + count * d, experts + count * e, max(largest, d + e)
                frozen, total = frozen + count * shape.kinds[kind].weights.frozen, total + count * shape.kinds[kind].weights.total
        for side, held in ((shape.before, stage.before), (shape.after, stage.after)):
            if held:
                outside += side.weights.local(plan.tp, plan.ep)[0]
                frozen, total = frozen + side.weights.frozen, total + side.weights.total
        if stage.before:
            first = shape.before.weights.local(plan.tp, plan.ep)[0]
        if stage.before and stage.after and shape.tied:
            outside, first = outside - shape.tied / plan.tp, max(0.0, first - shape.tied / plan.tp)
        return Elements(dense + outside, experts, largest, outside, 1.0 - frozen / total if total else 1.0, first)

    def memory(self, plan: Plan, items: int) -> tuple[dict[str, float], float, int]:
        """Live bytes by purpose and the allocator's bytes on the rank with the most of these, and which rank that is."""
        stages = self.stages(plan)
        held = {stage: self.states(plan, self.elements(plan, stage)) for stage in dict.fromkeys(stages)}
        moments = self.activations(plan, self.split(plan, items), range(plan.pp))
        found = [self._moments(plan, held[stage], moment) for stage, moment in zip(stages, moments, strict=True)]
        heaviest = max(range(len(found)), key=lambda rank: found[rank][1])
        return *found[heaviest], heaviest

    def elsewhere(self, plan: Plan, items: int) -> tuple[float, float]:
        """Bytes that the rank with the most of them has in its host's memory, and on a disk: model states and activations."""
        stages, heads = self.stages(plan), self.heads(plan)
        moments = self.activations(plan, self.split(plan, items), heads)
        held = [self.states(plan, self.elements(plan, stages[rank])) for rank in heads]
        host = max(states.host + moment.host for states, moment in zip(held, moments, strict=True))
        return host, max(states.disk + moment.disk for states, moment in zip(held, moments, strict=True))

    def heads(self, plan: Plan) -> list[int]:
        """Of ranks that hold the same, the first: it keeps most micro-batches, so the heaviest rank is one of these."""
        key = (plan.pp, plan.schedule, plan.virtual, plan.split)
        if key not in self._heads:
            first: dict[Stage, int] = {}
            for rank, stage in enumerate(self.stages(plan)):
                first.setdefault(stage, rank)
            self._heads[key] = sorted(first.values())
        return self._heads[key]

    def activations(self, plan: Plan, split: Split, ranks: Iterable[int]) -> list[InFlight]:
        """Activations on each of `ranks`, with all its micro-batches in flight."""
        stages, units = self.stages(plan), self.units(split)
        budget, away = budget_bytes(plan.recompute), moved(plan.offload, "activations", self.on_host)
        disk = moved(plan.offload, "activations", on_host=True)
        found = []
        for rank in ranks:
            stage = stages[rank]
            flight = pipeline.in_flight(plan.schedule, plan.virtual, plan.pp, plan.microbatches, rank)
            of = units.keep(stage)
            saved, loss, first = of.saved, of.loss, of.alone if away else of.first
            if budget is not None:
                saved += self._spared(budget, stage, units, split, flight)[0]
            kept = flight * saved + of.ends
            if pipeline.all_forward(plan.schedule, plan.pp):  # every loss is there first, every gradient after one micro-batch
                loss, first = loss + (flight - 1) * of.ends, first - (0.0 if away else saved)
            most = max(0.0, kept - min(kept, of.two + of.ends))
            found.append(InFlight(kept, away * most, loss, first, of.last, (away - disk) * most, disk * most))
        return found

    def _spared(self, budget: int, stage: Stage, full: Units, split: Split, flight: float) -> tuple[float, float]:
        """Bytes that a stage keeps of each micro-batch beyond full recompute within a budget, and seconds of backward spared."""
        saved, ends = full.keep(stage)[:2]
        if id(stage) not in full.steps:
            free, blocks = self.units(replace(split, recompute="none")), []
            for kind, count in enumerate(stage.kinds):
                more = free.sizes[kind].kept - full.sizes[kind].kept
                seconds = full.times[kind].total_backward - free.times[kind].total_backward
                blocks.append((count, more, seconds, self.shape.kinds[kind].front))
            full.steps[id(stage)] = steps(blocks)
        return shared_out(full.steps[id(stage)], stage.kinds, (budget - ends) / flight - saved)

    def states(self, plan: Plan, elements: Elements) -> States:
        """Model states of a rank with these parameters."""
        return states(plan, elements, self.width, self.on_host)

    def needs(self, plan: Plan, held: States) -> Need:
        """What the device and its host hold besides activations."""
        always = held.parameters + held.optimizer + held.buffers + outside_allocator(plan, self.kernels)
        moments = (always + gradients + more * (1 + self.slack) for gradients, more in self._beside(plan, held))
        loss, first, last, after = moments
        return Need(loss, first, last, after, self.cluster.device.host_memory_bytes - held.host)

    def _beside(self, plan: Plan, held: States) -> tuple[tuple[float, float], ...]:
        """Gradients and what is there for a moment besides activations, at the moments of `Need`."""
        whole = self.whole_gradients(plan)
        at_loss = held.gradients if whole and not pipeline.all_forward(plan.schedule, plan.pp) else 0.0
        first, last = (held.opened, held.gathered), held.last
        if moved(plan.offload, "activations", self.on_host):  # those here stay as many, while gradients grow from block to block
            first = held.second, held.last[1]
        if whole:
            first, last = (held.gradients, first[1]), (held.gradients, last[1])
        return (at_loss, held.awake), first, last, (held.gradients, max(held.gathered, held.updating))

    def fits(self, needs: Sequence[Need], moments: Sequence[InFlight]) -> bool:
        """Whether some ranks have what they need."""
        for need, moment in zip(needs, moments, strict=True):
            loss, first, last, after, host = self.excess(need, moment)
            if loss > 0 or first > 0 or last > 0 or after > 0 or host > 0:
                return False
        return True

    def excess(self, need: Need, moment: InFlight) -> tuple[float, float, float, float, float]:
        """Bytes too many on a rank's device at the moments of `Need`, then on its host; below 0 where there is room."""
        loss, first, last, after, room = need
        kept, movable, at_loss, at_first, at_last, host, _ = moment
        capacity, slack, here = self.cluster.device.memory_bytes, 1 + self.slack, kept - movable
        return (
            loss + (here + at_loss) * slack - capacity,
            first + (here + at_first) * slack - capacity,
            last + at_last * slack - capacity,
            after - capacity,
            host - room,
        )

    def budget(self, needs: Sequence[Need], least: Sequence[InFlight], most: Sequence[InFlight]) -> str | None:
        """`recompute=` with the largest budget (whole MB) that fits every rank, None if none does.

        By rank: what `needs` says, and activations with everything and with nothing recomputed.
        """
        capacity, room = self.cluster.device.memory_bytes, float("inf")
        slack = 1 + self.slack
        for need, few, many in zip(needs, least, most, strict=True):
            can = min((capacity - need.loss) / slack - few.loss, (capacity - need.first) / slack - few.first)
            if need.room < 0 or max(need.after, need.last + few.last * slack) > capacity or can < few.kept:
                return None
            if can < many.kept:
                room = min(room, can)
        whole = int(min(room, max(many.kept for many in most)) // 1e6)
        return f"budget={whole}M" if all(whole * 1e6 >= few.kept for few in least) else None

    def budgeted(self, plan: Plan, items: int) -> Plan | None:
        """A plan that does not fit without recompute, with the largest budget that does; None if there is none."""
        if moved(plan.offload, "activations"):
            return None
        stages, heads = self.stages(plan), self.heads(plan)
        needs = [self.needs(plan, self.states(plan, self.elements(plan, stages[rank]))) for rank in heads]
        split = self.split(plan, items)
        least, most = (self.activations(plan, replace(split, recompute=r), heads) for r in ("full", "none"))
        found = self.budget(needs, least, most)
        return None if found is None else replace(plan, recompute=found)

    def whole_gradients(self, plan: Plan) -> bool:
        """Whether every gradient is in memory while the first backward runs: with several micro-batches, or in flat buffers."""
        return self.flat_gradients or plan.microbatches > 1 or plan.pp > 1

    def _moments(self, plan: Plan, held: States, moment: InFlight) -> tuple[dict[str, float], float]:
        """What each purpose takes in full, and as the peak the worst of its moments; also that with the allocator's slack."""
        kept = moment.kept - moment.movable
        first = kept + min(0.0, moment.first), max(0.0, moment.first)
        moving = (kept, moment.loss), first, (0.0, moment.last), (0.0, 0.0)
        beside = self._beside(plan, held)
        found = [(g, alive, more + there) for (g, there), (alive, more) in zip(beside, moving, strict=True)]
        worst = max(found, key=lambda each: each[0] + (each[1] + each[2]) * (1 + self.slack))
        parts = {"parameters": held.parameters, "gradients": held.gradients, "optimizer": held.optimizer}
        parts |= {"activations": kept, "temporary": worst[2] + held.buffers}
        peak = held.parameters + held.optimizer + held.buffers + sum(worst)
        return parts | {"peak": peak}, peak + self.slack * (worst[1] + worst[2])

    def _ranks(self, plan: Plan, split: Split, ranks: Iterable[int]) -> list[tuple[float, float, float]]:
        """Seconds of one micro-batch on ranks of the pipeline: forward, backward, weights, without sends."""
        stages, units, budget = self.stages(plan), self.units(split), budget_bytes(plan.recompute)
        if budget is None:
            return [units.time(stages[rank]) for rank in ranks]
        seen: dict[Any, tuple[float, float, float]] = {}
        found = []
        for rank in ranks:
            stage = stages[rank]
            flight = pipeline.in_flight(plan.schedule, plan.virtual, plan.pp, plan.microbatches, rank)
            if (id(stage), flight) not in seen:
                forward, backward, weight = units.time(stage)
                seen[id(stage), flight] = forward, backward - self._spared(budget, stage, units, split, flight)[1], weight
            found.append(seen[id(stage), flight])
        return found

    def least(self, plan: Plan, split: Split) -> float:
        """Seconds of its busiest rank, a lower bound of a schedule's span."""
        return plan.microbatches * max(map(sum, self._ranks(plan, split, self.heads(plan))))

    def base(self, plan: Plan, split: Split) -> Base:
        """What the schedule takes: the same for every way to use the data axes and to offload."""
        stages, sent = self.stages(plan), self._sent(plan, split.items)
        ranks = self._ranks(plan, split, range(plan.pp))
        forward, backward, weight = [f + sent for f, _, _ in ranks], [b + sent for _, b, _ in ranks], [w for _, _, w in ranks]
        micro = plan.microbatches
        span = pipeline.step(plan.schedule, plan.virtual, micro, forward, backward, weight)
        whole = [f + b + w for f, b, w in zip(forward, backward, weight, strict=True)]
        busiest = whole.index(max(whole))
        parts = self._parts(stages[busiest], self.units(split).times)
        cost = {name: micro * seconds for name, seconds in parts.items()}
        cost["pp_comm"] = micro * 2 * sent
        cost["compute"] = micro * (whole[busiest] - 2 * sent - sum(parts.values()))
        if self.share < 1:  # ranks share cores: while one waits, others have more of them
            span = max(micro * whole[busiest], span * self.share)
        cost["bubble"] = span - micro * whole[busiest]
        most = max((self.elements(plan, stages[rank]) for rank in self.heads(plan)), key=lambda e: e.total)
        return Base(span, cost, most, stages[busiest], split, backward[busiest] + weight[busiest], whole[busiest])

    def cost(self, plan: Plan, base: Base) -> dict[str, float]:
        """Seconds by purpose; they sum to the step."""
        times, sizes = self.units(base.split).times, self.units(base.split).sizes
        cost = dict(base.cost)
        cost["dp_comm_exposed"] = self._data_axes(plan, base.most, base.stage, times, base.backward)
        if plan.update == "backward" and plan.clip == "two_pass":  # a first pass for the norm, whose gradients are dropped
            cost = {name: 2 * seconds for name, seconds in cost.items()}
        cost["optimizer"] = self._optimizer(plan, base.most)
        cost["offload"] = self._offload(plan, base.most, sizes, base.stage, plan.microbatches, base.busy)
        return cost

    def _parts(self, stage: Stage, times: Sequence[UnitTime]) -> dict[str, float]:
        total = dict.fromkeys(("tp_comm", "cp_comm", "ep_comm"), 0.0)
        counts = [*stage.kinds, int(stage.before), int(stage.after)]
        for unit, count in zip(times, counts, strict=True):
            total["tp_comm"] += count * (unit.tp_forward + unit.tp_backward)
            total["cp_comm"] += count * (unit.cp_forward + unit.cp_backward)
            total["ep_comm"] += count * (unit.ep_forward + unit.ep_backward)
        return total

    def _sent(self, plan: Plan, items: float) -> float:
        """Seconds that a stage's sends add to a micro-batch's forward, and again to its backward."""
        if plan.pp == 1 or not self.shape.boundaries:
            return 0.0
        fixed, per_item = self.shape.boundaries[len(self.shape.boundaries) // 2]
        size = (fixed + per_item * items) * self.rate.element / plan.cp / (plan.tp if plan.sp else 1)
        stride = max(1, self.cluster.devices // plan.pp)  # the pipeline is the outermost axis
        return pipeline.chunks(plan.schedule, plan.virtual) * send(self.cluster, stride, size)

    def _data_axes(self, plan: Plan, most: Elements, stage: Stage, times: Sequence[UnitTime], backward: float) -> float:
        """Exposed seconds of gradients' and parameters' collectives over the data axes."""
        inner = plan.tp * plan.cp
        shard, replicate = self.group(plan.dp_shard * plan.cp, plan.tp), self.group(plan.dp_replicate, inner * plan.dp_shard)
        table = constants()["collective"]
        # A CPU moves the bytes of a collective with the cores that compute: nothing is hidden there.
        slow = float(table["interference"]) if self.cluster.device.kernels != "cpu" else 1.0
        gradients = most.total
        if plan.dp_shard > 1 and plan.zero == 3 and plan.pp == 1:  # stages of a pipeline gather theirs once a step
            return self._fully_sharded(plan, stage, times, slow)
        width, live = float(self.width), 2.0 if plan.precision != "fp32" else float(self.width)
        if plan.shards == 1:
            shard, replicate = self.group(1, inner), self.group(plan.dp_replicate * plan.cp, plan.tp)
        once = all_reduce(replicate, width * gradients / shard.n)
        parted = scatter(shard, width * gradients)
        each = plan.microbatches if plan.zero >= 2 and plan.dp_shard > 1 else 1
        window = float(table["window"]) * backward
        sent = once + each * parted
        hidden = min(sent, window * each)
        return sent - (1 - slow) * hidden + gather(shard, live * gradients)

    def _fully_sharded(self, plan: Plan, stage: Stage, times: Sequence[UnitTime], slow: float) -> float:
        """FSDP: each block's parameters come while the one before computes, its gradients leave while the next one does."""
        inner = plan.tp * plan.cp
        shard, replicate = self.group(plan.dp_shard * plan.cp, plan.tp), self.group(plan.dp_replicate, inner * plan.dp_shard)
        live, width = 2.0 if plan.precision != "fp32" else float(self.width), float(self.width)
        total = first = 0.0
        for kind, count in enumerate(stage.kinds):
            if not count:
                continue
            size = sum(self.shape.kinds[kind].weights.local(plan.tp, plan.ep))
            come, leave = gather(shard, live * size), scatter(shard, width * size)
            leave += all_reduce(replicate, width * size / shard.n) / plan.microbatches
            f, b = times[kind].total_forward, times[kind].total_backward
            total += count * (max(0.0, come - f) + slow * min(come, f))
            total += count * (max(0.0, come + leave - b) + slow * min(come + leave, b))
            first = come + leave
        elements = self.elements(plan, stage)
        outside = gather(shard, live * elements.outside) + scatter(shard, width * elements.outside)
        return plan.microbatches * (total + first) + plan.microbatches * outside

    def _optimizer(self, plan: Plan, most: Elements) -> float:
        table = constants()["step"]
        seconds = table["fixed_ms"] * 1e-3
        if self.on_host:  # of a step outside of kernels, the one collective that carries norm and loss
            alone = plan.shards == plan.tp == plan.pp == 1
            seconds = 0.0 if alone else all_reduce(self.group(self.cluster.devices, 1), 64.0)
        here = self._divided(plan, most) * (1.0 - moved(plan.offload, "optimizer", self.on_host))
        each = table["optimizer_bytes"] + 2 * (self._stored(plan) - FULL_STORAGE)
        return float(seconds + here * each / self.cluster.device.memory_bytes_per_s)

    def _divided(self, plan: Plan, most: Elements) -> float:
        """Parameters that a rank's optimizer updates."""
        shard = plan.shards
        held = most.total / shard if plan.ep == 1 else most.dense / shard + most.experts / max(1, shard // plan.ep)
        return held * most.trained

    def _stored(self, plan: Plan) -> float:
        """Bytes per parameter that an update reads and writes: full-precision weights (or what stands for them) and two states."""
        live, _, master, state = widths(plan, self.width, plan.zero == 3 and plan.shards > 1)
        return 2 * state + (master if master == self.width else live + master)

    def _offload(self, plan: Plan, most: Elements, sizes: Sequence[Any], stage: Stage, micro: int, busy: float) -> float:
        """Seconds that transfers to host memory or disk add beyond what compute hides."""
        table, device = constants()["step"], self.cluster.device
        link = device.host_bytes_per_s or 25e9
        seconds = 0.0
        for item in offloads(plan.offload):
            if self.on_host and item.directory is None:
                continue
            held, stored = item.fraction * self._divided(plan, most), self._stored(plan)
            disk = table["nvme_gb_s"] * 1e9 / self.cluster.per_node if item.directory else None
            if item.what == "optimizer":
                each = table["cpu_adam_bytes"] + 2 * (stored - FULL_STORAGE)
                seconds += 6.0 * held / link + held * each * self.cluster.per_node / (table["host_memory_gb_s"] * 1e9)
                seconds += 2 * stored * held / disk if disk else 0.0
            elif item.what == "params":
                seconds += max(0.0, 2 * micro * 2.0 * held / min(link, disk or link) - micro * busy)
            else:
                kept = item.fraction * sum(c * sizes[kind].kept for kind, c in enumerate(stage.kinds))
                seconds += micro * max(0.0, 2 * kept / min(link, disk or link) - 0.8 * busy)
        return seconds

    def _report(
        self,
        plan: Plan,
        batch: int,
        items: int,
        cost: dict[str, float],
        memory: dict[str, float],
        reserved: float,
        heaviest: int,
    ) -> Prediction:
        names = ("compute", "tp_comm", "cp_comm", "ep_comm", "pp_comm", "dp_comm_exposed", "optimizer", "offload", "bubble")
        seconds = {name: cost[name] for name in names}
        step = sum(seconds.values())
        devices = plan.degree_product()
        shape, device = self.shape, self.cluster.device
        flops = shape.flops[0] + shape.flops[1] * batch
        on_device = reserved + outside_allocator(plan, self.kernels)
        peak = device.peak_flops("float8" if plan.precision == "fp8" else {"fp32": "float32"}.get(plan.precision, "bfloat16"))
        on_host, on_disk = self.elsewhere(plan, items)
        fits = on_device <= device.memory_bytes and on_host <= device.host_memory_bytes
        return Prediction(
            plan=str(plan),
            devices=devices,
            step_seconds=step,
            tokens_per_second_per_device=batch * (shape.sequence or 1) / step / devices,
            model_tflops_per_device=flops / step / devices / 1e12,
            hardware_tflops_per_device=self._hardware(plan, items) / step / devices / 1e12,
            mfu=flops / step / devices / peak,
            bubble_fraction=seconds["bubble"] / step,
            memory_bytes=memory,
            fits=fits,
            time_seconds=seconds,
            reserved_bytes=reserved,
            device_bytes=on_device,
            capacity_bytes=float(device.memory_bytes),
            host_bytes=on_host,
            disk_bytes=on_disk,
            host_capacity_bytes=float(device.host_memory_bytes),
            bound="memory" if not fits else bound(seconds, step),
            price_per_hour=devices * device.price,
            micro_batch=items,
            heaviest_rank=heaviest,
        )

    def _hardware(self, plan: Plan, items: int) -> float:
        times = self.units(self.split(plan, items)).times
        counts = [self.shape.calls.count(kind) for kind in range(len(self.shape.kinds))] + [1, 1]
        per_rank = sum(unit.hardware_flops * count for unit, count in zip(times, counts, strict=True))
        return per_rank * plan.microbatches * plan.degree_product() / plan.pp
