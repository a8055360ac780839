"""`pp`: where a model is cut, which rank holds which parameters, and a step's micro-batches through the stages.

The trace of the model and its loss (after the passes of `tp` and `cp`, if any) is cut between block calls; every rank traces the
whole and keeps its own pieces, so all agree on what is sent. A parameter stands on every rank one of whose stages reads it (tied
weights on two or more) and, if the example batch did not use it, on all; the gradients of such are summed over them once a step.
Under `zero` the parameters are gathered once a step, not once a micro-batch.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright import _torch
from meshwright.blueprint import costs
from meshwright.blueprint.tape import Ref
from meshwright.errors import ConfigError, DataError, ModelError
from meshwright.parallel.buckets import Buckets
from meshwright.parallel.parameters import Parameter, replace_live
from meshwright.parallel.partitioned import Function, Partition
from meshwright.parallel.pipeline import Job, Runner, Stage
from meshwright.parallel.ranks import Ranks
from meshwright.partition.program import Program
from meshwright.partition.stages import Piece, cut, edges, refuse_shared_memory
from meshwright.partition.trace import Guard, Stale, Trace, set_attribute
from meshwright.plan import Plan
from meshwright.plan.orders import stage_ranks
from meshwright.plan.schedule import Action, Schedule, build
from meshwright.plan.stages import CPU, GPU, Rates, place

_KEPT = 64

Context = Callable[[int, int], AbstractContextManager[None]]


class _Cutting:
    """A kind of batch, cut: every stage's piece, this rank's stages, and what tells whether a batch's values lead the same way."""

    def __init__(self, found: Trace, ends: Sequence[int], mine: Sequence[int], partition: Partition, device: torch.device) -> None:
        model, bound = partition.module, partition.bound()
        guards = [op for op in found.ops if isinstance(op.func, Guard)]
        self.checks = Program(replace(found, outputs=None), model, frozenset(), device) if guards else None
        self.pieces = cut(replace(found, ops=[op for op in found.ops if not isinstance(op.func, Guard)]), ends)
        self.stages = {stage: Stage(self.pieces[stage], model, device, bound, partition.runs) for stage in mine}
        self.edges, self.gradients = edges(self.pieces)
        self.changes = found.changes

    def fits(self, leaves: list[Tensor]) -> bool:
        """Whether the batch's values lead the model's Python where they led it when it was traced."""
        if self.checks is None:
            return True
        try:
            self.checks.check(leaves)
        except Stale:
            return False
        return True


class Pipeline:
    """The stages of a plan on this rank. `choose` decides the cut from an example; `run` takes a step's micro-batches through."""

    def __init__(self, partition: Partition, plan: Plan, ranks: Ranks) -> None:
        group = ranks.group("pp")
        assert group is not None
        self.partition, self.plan, self.ranks, self.group = partition, plan, ranks, group
        self.rank = dist.get_rank(group)
        self.owners = stage_ranks(plan.schedule, plan.pp, plan.virtual)
        self.mine = [stage for stage, owner in enumerate(self.owners) if owner == self.rank]
        self.ends: list[int] = []
        self.buffer_homes: dict[str, int] = {}
        self.watch: Callable[[Action], AbstractContextManager[Any]] = lambda _: nullcontext()
        self.runner: Runner | None = None  # of the latest run
        self.buckets: Buckets | None = None  # takes the gradients, if there is something to reduce or to cast
        self._cuttings: OrderedDict[Any, list[_Cutting]] = OrderedDict()
        self._homes: dict[str, tuple[int, ...]] = {}

    @property
    def last(self) -> bool:
        """Whether this rank holds the last stage, where the loss is."""
        return self.owners[-1] == self.rank

    def choose(self, function: Function, example: Any) -> None:
        """Decide the cut and every parameter's ranks. Raises `PlanError` for more stages than blocks, or a wrong `split=`."""
        whole = self.partition.traced(function, example)
        self.ends = stage_ends(self.plan, whole, CPU if self.ranks.device.type == "cpu" else GPU)
        pieces = cut(self.partition.passed(whole, "loss"), self.ends)
        readers: dict[str, set[int]] = {}
        for piece in pieces:
            for name in piece.parameters():
                readers.setdefault(name, set()).add(self.owners[piece.stage])
            self.buffer_homes.update(dict.fromkeys(piece.buffers(), self.owners[piece.stage]))
        for entry in self.partition.table:
            found = set().union(*(readers.get(name, set()) for name in entry.names))
            entry.homes = tuple(sorted(found)) or tuple(range(self.plan.pp))
            entry.here = self.rank in entry.homes
            self._homes.update(dict.fromkeys(entry.names, entry.homes))

    def drop_others(self, module: nn.Module, table: list[Parameter], compute_dtype: torch.dtype | None) -> None:
        """Leave parameters of other ranks without memory: on the meta device, under their names, in the dtype they have there."""
        for entry in table:
            if not entry.here:
                low = compute_dtype if entry.trainable and entry.dtype.is_floating_point else None
                empty = torch.empty(entry.shape, dtype=low or entry.dtype, device="meta")
                replace_live(module, entry, nn.Parameter(empty, requires_grad=entry.trainable))

    def run(
        self, kind: str, function: Function, parts: Sequence[Any], weights: Sequence[float], context: Context, backward: bool
    ) -> list[Any]:
        """Run `function` on every micro-batch; return what it returned for each, on the rank of the last stage (else nothing).

        With `backward` the gradients of the sum of `weights[i]` times the i-th result are added to the parameters'. All ranks of
        this pipeline must call it with equal batches. Raises `ModelError` on all of them if a batch leads the model to a parameter
        that is on another rank.
        """
        jobs, found = [], []
        for part, weight in zip(parts, weights, strict=True):
            leaves = _torch.tensors_of(part)
            cutting = self._cutting(kind, function, part, leaves)
            found.append(cutting)
            for home, name, value in cutting.changes:  # the next micro-batch's Python sees what this one's has set
                set_attribute(home, name, value)
            jobs.append(Job(cutting.stages, leaves, weight))
        outputs: dict[int, Any] = {}
        if jobs:
            with _torch.without_autocast():
                schedule = self._schedule(found)
                self.runner = runner = Runner(schedule, self.rank, self.group, self.ranks.device, context, self.watch)
                if backward and self.buckets is not None:
                    runner.differentiated = _Reduction(self.buckets, self.partition.table, found, schedule, self.rank)
                outputs = runner.run(jobs, backward)
        return [outputs[number] for number in range(len(jobs))] if self.last else []

    def output(self, function: Function, batch: Any, context: Context) -> Any:
        """Return `function(batch)` on every rank of this pipeline, without backward; all give the same batch.

        The last stage's rank broadcasts each tensor of the result over `pp`.
        """
        last = self._cutting("output", function, batch, _torch.tensors_of(batch)).pieces[-1].trace
        results = self.run("output", function, [batch], [0.0], context, backward=False)
        made = iter(_torch.tensors_of(results))

        def receive(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            value = last.values[leaf.number]
            tensor = next(made).contiguous() if self.last else torch.empty(value.shape, dtype=value.dtype, device=self.ranks.device)
            dist.broadcast(tensor, group=self.group, group_src=self.owners[-1])
            return tensor

        leaves, spec = _torch.tree_flatten(last.outputs[1])
        return _torch.tree_unflatten([receive(leaf) for leaf in leaves], spec)

    def _schedule(self, found: Sequence[_Cutting]) -> Schedule:
        """The plan's schedule for as many micro-batches as there are, with the messages that any of them needs."""
        name, count = self.plan.schedule, len(found)
        if name == "dualpipev" and count < 2 * self.plan.pp:
            name = "zbv"  # the same fold
        if name == "layerwise" and count > 1:
            name = "gpipe"
        forward = {edge for cutting in found for edge in cutting.edges}
        back = {edge for cutting in found for edge in cutting.gradients}
        return build(name, self.plan.pp, self.plan.virtual, count, tuple(sorted(forward)), tuple(sorted(back)))

    def _cutting(self, kind: str, function: Function, batch: Any, leaves: list[Tensor]) -> _Cutting:
        key = (kind, *self.partition.key(batch))
        known = self._cuttings.setdefault(key, [])
        self._cuttings.move_to_end(key)
        if len(self._cuttings) > _KEPT:
            self._cuttings.popitem(last=False)
        for cutting in known:
            if cutting.fits(leaves):
                return cutting
        with torch.enable_grad():
            whole = self.partition.traced(function, batch)
        if len(whole.calls) != self.ends[-1]:
            raise ModelError(
                f"this batch leads the model through {len(whole.calls)} block calls, and the example through {self.ends[-1]}: a "
                "pipeline needs the same blocks for every batch"
            )
        refuse_shared_memory(whole, self.ends)
        local = self.partition.passed(whole, kind)
        made = _Cutting(local, self.ends, self.mine, self.partition, self.ranks.device)
        self._check_homes(made.pieces)
        known.insert(0, made)
        del known[8:]
        return made

    def _check_homes(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            owner = self.owners[piece.stage]
            away = sorted(name for name in piece.parameters() if owner not in self._homes[name])
            if away:
                raise ModelError(
                    f"this batch leads stage {piece.stage} to {away[0]}, which is on another pipeline rank: give parallelize an "
                    "example_batch that uses it there"
                )


def stage_ends(plan: Plan, whole: Trace, rates: Rates) -> list[int]:
    """Return where each stage ends, as numbers of block calls. Raises `PlanError` or `ModelError` where no such cut can run."""
    names = [call.name for call in whole.calls]
    ends = place(plan, names, _seconds(whole, rates), [0.0] * len(names))
    refuse_shared_memory(whole, ends)
    return ends


class _Reduction:
    """Brings gradients to the buckets after every backward of a stage, and lets them leave after its last.

    So what the data ranks sum travels while the rank's other stages, and other ranks, still work.
    """

    def __init__(self, buckets: Buckets, table: list[Parameter], found: Sequence[_Cutting], schedule: Schedule, rank: int) -> None:
        self.buckets = buckets
        self.left = Counter(a.stage for a in schedule.actions[rank] if a.kind in ("B", "W"))
        by_name = {name: entry for entry in table for name in entry.names}
        self.entries: dict[int, list[Parameter]] = {}
        for stage in self.left:
            names = set().union(*(cutting.stages[stage].names for cutting in found))
            self.entries[stage] = list({id(by_name[name]): by_name[name] for name in sorted(names)}.values())
        self._release(table)

    def __call__(self, action: Action) -> None:
        """Take what a backward (B or W) has left."""
        self.buckets.take(self.entries[action.stage])
        self.left[action.stage] -= 1
        if not self.left[action.stage]:
            del self.left[action.stage]
            self._release(self.entries[action.stage])

    def _release(self, entries: Sequence[Parameter]) -> None:
        waiting = {id(entry) for stage in self.left for entry in self.entries[stage]}
        self.buckets.release([entry for entry in entries if id(entry) not in waiting])


def sum_shared(table: list[Parameter], ranks: Ranks) -> None:
    """Sum the gradients of parameters that several pipeline ranks hold over those ranks: one all-reduce per set of ranks and dtype.

    Elements of the shared parameters, and one number for each: whether any of the ranks used it.
    """
    shared: dict[tuple[tuple[int, ...], torch.dtype], list[Parameter]] = {}
    for entry in table:
        if len(entry.homes) > 1 and entry.here and entry.trainable and entry.shape.numel():
            shared.setdefault((entry.homes, entry.master.dtype), []).append(entry)
    for (homes, _), entries in sorted(shared.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        gradients = [torch.zeros_like(e.master) if e.gradient is None else e.gradient for e in entries]
        used = gradients[0].new_tensor([float(entry.gradient is not None) for entry in entries])
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), used])
        dist.all_reduce(flat, group=ranks.homes[homes])
        *parts, used = flat.split([*(gradient.numel() for gradient in gradients), len(entries)])
        for entry, part, users in zip(entries, parts, used.tolist(), strict=True):
            entry.gradient = part.view_as(entry.master) if users else None


def refuse_output(plan: Plan) -> None:
    """Raise `ConfigError` where somebody wants to differentiate an output that only the last stage has."""
    if plan.pp > 1:
        raise ConfigError(
            f"pp={plan.pp}: the model's output is made on its last stage only, so a pipeline trains by engine.step(batch), or by "
            "engine.accumulate(batch) and engine.optimizer_step()"
        )


def refuse_short(plan: Plan, rows: int, ranks: Ranks) -> None:
    """Raise `DataError` on every rank for batches of too few rows; every rank must call it, with its own number of them."""
    most = torch.tensor(rows, device=ranks.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)  # 8 bytes over every rank
    raise DataError(
        f"microbatches={plan.microbatches}: the first batch has {most.item()} rows on a data rank, so the nearest that works is "
        f"microbatches={max(1, int(most))}, or more rows"
    )


def _seconds(found: Trace, rates: Rates) -> list[float]:
    """What each call and the ops outside right before it (for the last call: and after it) cost, by FLOPs and bytes of the forward.

    The backward of an op costs about twice its forward wherever it is, so the forward weighs the stages.
    """
    cells = [0.0] * len(found.calls)
    after = 0
    for op in found.ops:
        after = max(after, op.call + 1)
        cell = op.call if op.call >= 0 else min(after, len(cells) - 1)
        if not hasattr(op.func, "_schema") or costs.kind_of(op.func) == "view" or not cells:
            continue

        def stand_in(value: Any) -> Any:
            if isinstance(value, Ref):
                known = found.values[value.number]
                return torch.empty_strided(known.shape, known.strides, dtype=known.dtype, device="meta")
            return [stand_in(item) for item in value] if isinstance(value, list | tuple) else value

        args, results = [stand_in(value) for value in op.args], [stand_in(Ref(number)) for number in op.outputs]
        flops = costs.flops_of(op.func, args, op.kwargs, results[0] if len(results) == 1 else tuple(results))
        moved = sum(costs.tensor_bytes(tensor) for tensor in _torch.tensors_of([args, results]))
        cells[cell] += max(flops / rates.flops_per_s, moved / rates.bytes_per_s)
    return cells
