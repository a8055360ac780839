"""`tp`, `sp` and `cp`: the model and its loss run as programs of local ops, one for each kind of batch.

Parameters are cut along the regions of the model as traced on an example batch, before anything is allocated for them. A whole
parameter that works on cut activations gets only a part of its gradient on each tensor-parallel rank; these parts are summed once
a step, in one all-reduce. Gradients over `cp` are parts for every parameter, and are summed with those of the data ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from meshwright import _torch
from meshwright.blueprint.blocks import block_names
from meshwright.errors import ConfigError, ModelError, PlanError
from meshwright.parallel.parameters import Cut, Parameter, assign
from meshwright.parallel.ranks import Ranks
from meshwright.parallel.recompute import Recompute
from meshwright.partition import arguments, cuts
from meshwright.partition.chunks import chunk_loss
from meshwright.partition.partition import Pass, Policy
from meshwright.partition.program import Program
from meshwright.partition.sequence import follow_sequence
from meshwright.partition.state import Axis
from meshwright.partition.trace import Stale, Subject, Trace, content, is_opaque, plain_attributes, trace
from meshwright.plan import Plan

_KEPT = 64
"""Programs kept for batches of other shapes; the one not used for longest goes first."""

Function = Callable[[Any], Any]


def axes(plan: Plan, ranks: Ranks | None = None) -> dict[str, Axis]:
    """The axes along which a plan partitions ops; without `ranks`, as rank 0 sees them."""
    found = {}
    for name in ("cp", "tp"):
        size = getattr(plan, name)
        if size > 1:
            group = ranks.group(name) if ranks is not None else None
            rank = dist.get_rank(group) if group is not None else 0
            found[name] = Axis(name, size, rank, group, mirrored=name == "cp")
    return found


class Partition:
    """What a plan's axes make of a model: which parameters are cut, and a program for each kind of batch.

    `cuts` are chosen from `example` by tracing `function` (the loss if there is one, else the output) over the model.
    """

    def __init__(
        self, module: nn.Module, table: list[Parameter], plan: Plan, ranks: Ranks | None, compute_dtype: torch.dtype | None = None
    ) -> None:
        self.module, self.table, self.plan = module, table, plan
        self.axes = axes(plan, ranks)
        self.units: frozenset[str] = frozenset()
        self.blocks = tuple(block_names(module))
        self.runs: Recompute | None = None
        self._compute_dtype = compute_dtype
        self._sharded: frozenset[int] = frozenset()
        self.cuts = cuts.Cuts()
        self.copied: frozenset[str] = frozenset()
        self._programs: OrderedDict[Any, list[Program]] = OrderedDict()
        self._plain: list[tuple[dict[str, Any], str, Any]] = []

    def choose(self, function: Function, example: Any) -> None:
        """Decide which parameters are cut and which get parts of gradients. Raises `PlanError` in one sentence.

        An example of one row is read as one of two: a dim of size one takes paths that others don't.
        """
        example = _torch.tree_map_tensors(lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t, example)
        found = self.traced(function, example)
        axis = self.axes.get("tp")
        if axis is not None:
            self.cuts = cuts.choose(found, axis, self._held(found))
        self._refuse_recurrence(found)
        passes = self._passes(found)
        if "cp" in self.axes and not passes[0].did_cut:
            raise PlanError(
                f"cp={self.plan.cp}: the batch has no sequence that {self.plan.cp} ranks can divide: use a length that is a "
                f"multiple of {self.plan.cp} (of {2 * self.plan.cp} for an even share of causal work), or cp=1"
            )
        if axis is not None:
            self.copied = frozenset(passes[-1].wanted) - self._held(found)
        if self.plan.loss_chunks > 1:
            self.passed(found, "loss")  # refused before anything is allocated

    def _held(self, found: Trace) -> frozenset[str]:
        """Parameters of modules that run as they are: whole, with whole gradients, wherever else they are used."""
        inside = tuple(f"{op.func.path}." for op in found.ops if is_opaque(op))
        return frozenset(name for entry in self.table for name in entry.names if any(n.startswith(inside) for n in entry.names))

    def _refuse_recurrence(self, found: Trace) -> None:
        if "cp" not in self.axes:
            return
        for name, child in self.module.named_modules():
            if isinstance(child, nn.RNNBase | nn.RNNCellBase) and any(op.module == name for op in found.ops):
                raise PlanError(
                    f"cp={self.plan.cp}: {name} ({type(child).__name__}) needs every position before the next: use cp=1, "
                    "and tp, dp_shard or pp in its place"
                )

    def gathered_in(self, units: list[str], sharded: list[Parameter]) -> None:
        """Parameters of these modules are whole only while the module is called (FSDP2), and then in the compute dtype."""
        self.units, self._sharded = frozenset(units), frozenset(map(id, sharded))

    def bound(self) -> dict[str, Tensor]:
        """What programs compute with in the place of parameters, by name; FSDP2's are looked up when they have been gathered."""
        return {name: entry.live for entry in self.table if id(entry) not in self._sharded for name in entry.names}

    def as_dtensors(self, entries: list[Parameter], ranks: Ranks) -> None:
        """Put DTensors of true shape in the module, in the place of those parts that a DTensor can describe; they share memory.

        Parts in several segments, and uneven ones, stay plain tensors: a DTensor would join them in another order.
        """
        for entry in entries:
            cut = entry.cut
            if cut is None or isinstance(entry.live, DTensor) or cut.label.repeat > 1 or len(cut.label.segments) > 1:
                continue
            if not cut.axis.divides(cut.label):
                continue
            assert ranks.mesh is not None
            stride = torch.empty(entry.whole, device="meta").stride()
            local = entry.live.detach()
            shown = DTensor.from_local(local, ranks.mesh["tp"], [Shard(cut.dim)], run_check=False, shape=entry.whole, stride=stride)
            parameter = nn.Parameter(shown, requires_grad=entry.trainable)
            for name in entry.names:
                assign(self.module, name, parameter)

    def _dtype(self, entry: Parameter) -> torch.dtype:
        cast = self._compute_dtype is not None and entry.dtype.is_floating_point and id(entry) in self._sharded
        return self._compute_dtype if cast and self._compute_dtype is not None else entry.live.dtype

    def traced(self, function: Function, batch: Any) -> Trace:
        """Trace a function of a batch, and follow its sequences."""
        shapes = {}
        for entry in self.table:
            shapes.update(dict.fromkeys(entry.names, (entry.whole, self._dtype(entry), entry.trainable)))
        with _torch.autocast_of_traces():
            found = trace(Subject(self.module, shapes, self.blocks), function, batch)
        found.sequence = follow_sequence(found)
        self._plain = plain_attributes(self.module)  # its Python may have made new ones
        return found

    def _passes(self, found: Trace) -> list[Pass]:
        passes = []
        for name, axis in self.axes.items():
            if name == "cp":
                policy = Policy(copied=None, sequence=True, method=self.plan.cp_attention)
            else:
                policy = Policy(self.cuts.parameters, self.copied, scatter=self.plan.sp)
            one = Pass(found, axis, policy)
            found = one.run()
            passes.append(one)
        return passes

    def local(self, function: Function, batch: Any, kind: str) -> Trace:
        """What this rank does for a batch; `kind` is `loss` for a function that returns the loss."""
        return self.passed(self.traced(function, batch), kind)

    def passed(self, found: Trace, kind: str) -> Trace:
        """What this rank does of a trace: the result of the plan's passes."""
        passes = self._passes(found)
        if passes:
            found = passes[-1].result
        else:
            found = replace(found, ops=[arguments.whole(op) for op in found.ops])
        return chunk_loss(found, self.plan.loss_chunks) if self.plan.loss_chunks > 1 and kind == "loss" else found

    def key(self, batch: Any) -> tuple[Any, ...]:
        """What a program depends on beside the batch's values: its structure and shapes, and what modules hold."""
        leaves, spec = _torch.tree_flatten(batch)
        shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return str(spec), shapes, self._settings(), torch.is_grad_enabled()

    def apply(self, entries: list[Parameter]) -> None:
        """Cut the parameters: each keeps its object and name, and holds this rank's part."""
        axis = self.axes.get("tp")
        for entry in entries:
            found = next((self.cuts.parameters[name] for name in entry.names if name in self.cuts.parameters), None)
            if axis is None or found is None:
                entry.in_parts = bool(axis is not None and entry.trainable and self.copied & set(entry.names))
                continue
            entry.cut = Cut(axis, *found)
            entry.live.data = entry.cut.part(entry.live.data)
            entry.shape = entry.live.shape

    def _settings(self) -> tuple[Any, ...]:
        """What modules hold beside tensors: training or evaluation mode, a rate, a counter."""
        if not self._plain:
            self._plain = plain_attributes(self.module)
        return tuple(content(home.get(name)) for home, name, _ in self._plain)

    def run(self, kind: str, function: Function, batch: Any) -> Any:
        """Return `function(batch)`, computed by this rank's program for batches like this one; `kind` tells functions apart."""
        tensors = _torch.tensors_of(batch)
        key = (kind, *self.key(batch))
        programs = self._programs.setdefault(key, [])
        self._programs.move_to_end(key)
        if len(self._programs) > _KEPT:
            self._programs.popitem(last=False)
        with _torch.without_autocast():
            for program in programs:
                try:
                    return program(tensors)
                except Stale:
                    continue
        local = self.local(function, batch, kind)
        program = Program(local, self.module, self.units, tensors[0].device, self.bound(), self.runs)
        programs.insert(0, program)
        del programs[8:]
        with _torch.without_autocast():
            try:
                return program(tensors)
            except Stale as error:
                raise ModelError(
                    "the model's Python decides by values that change from one look to the next (random numbers?): this plan "
                    "runs what was decided once; use data parallelism, or make the decision with torch.where"
                ) from error


def sum_parts(table: list[Parameter], ranks: Ranks) -> None:
    """Sum the gradients that are parts over the tensor-parallel ranks, once a step: one all-reduce for all of a dtype."""
    group = ranks.group("tp")
    if group is None:
        return
    by_dtype: dict[torch.dtype, list[Parameter]] = {}
    for entry in table:
        if entry.summed is not None:
            entry.gradient = entry.summed
        elif entry.in_parts and entry.gradient is not None and entry.gradient.numel():
            by_dtype.setdefault(entry.gradient.dtype, []).append(entry)
    for entries in by_dtype.values():
        gradients = [entry.gradient for entry in entries if entry.gradient is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=group)
        for entry, gradient, part in zip(entries, gradients, flat.split([g.numel() for g in gradients]), strict=True):
            entry.summed = gradient.copy_(part.view_as(gradient))


def needs_example(plan: Plan, example: Any) -> None:
    """Raise `ConfigError` where a plan is to read the model from an example batch and has none."""
    sizes = {name: axis.size for name, axis in axes(plan).items()} | ({"pp": plan.pp} if plan.pp > 1 else {})
    sizes |= {"loss_chunks": plan.loss_chunks} if plan.loss_chunks > 1 else {}
    if sizes and example is None:
        names = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(f"{names} needs example_batch=: the model is read from one batch before its weights are cut")
