"""Applies a resolved Plan to a model, in one fixed order; the page to read first in this room.

model on the meta device (or as given) -> parameter table (ties) -> fp8 layers -> cuts for tensor parallelism, loss chunks ->
pipeline stages -> FSDP2 units, parked where they are offloaded -> memory for what is left on meta, and initial values, the same for
every mesh -> gradient buckets with full-precision masters -> recompute and offload of the blocks' activations. Later axes take
their place in this order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright import _torch
from meshwright._torch import tensors_of, tree_map_tensors
from meshwright.blueprint.blocks import block_names
from meshwright.errors import ModelError, PlanError
from meshwright.parallel import float8, fsdp, materialise
from meshwright.parallel.activations import Activations
from meshwright.parallel.buckets import Buckets
from meshwright.parallel.disk import check_directory
from meshwright.parallel.parameters import Parameter, collect, rebind
from meshwright.parallel.parked import Parked
from meshwright.parallel.partitioned import Partition, axes
from meshwright.parallel.pipelined import Pipeline
from meshwright.parallel.ranks import Ranks, from_rank_zero, open_homes
from meshwright.parallel.recompute import Recompute, has_blocks
from meshwright.parallel.shelf import active, stores
from meshwright.parallel.weights import Weights
from meshwright.plan import Plan
from meshwright.plan.orders import SPLIT_BACKWARD
from meshwright.plan.plan import offloads
from meshwright.plan.storage import refuse_contradictions

COMPUTE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Precision in the plan -> the dtype that matmuls run in; None leaves every tensor in the dtype the model gave it. fp8 is what
linear layers make of bfloat16 for their matmuls."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Applied:
    """A module made parallel: what the engine drives.

    `sharded` are the entries that FSDP2 holds; then everything that touches parameters runs inside `root`. `buckets` reduces the
    others (None where one rank trains in its own dtype, and autograd's gradients are used as they are). `batch_norms` are the
    statistics that are averaged over ranks after each step. Under `tp` and `cp` the model runs by the programs of `partition`.
    """

    module: nn.Module
    forward: Callable[..., object]
    table: list[Parameter]
    sharded: list[Parameter]
    root: fsdp.Root | None
    buckets: Buckets | None
    batch_norms: list[Tensor] = field(default_factory=list)
    partition: Partition | None = None
    pipeline: Pipeline | None = None
    recompute: Recompute | None = None
    parked: Parked | None = None

    def agree(self, ranks: Ranks) -> None:
        """Raise `PlanError` on every rank for what one has found to be impossible; every rank must call it once a step."""
        if self.recompute is not None:
            self.recompute.agree(ranks)

    def groups(self) -> list[list[Parameter]]:
        """Return the trainable entries that this rank updates together, in the order in which a backward is done with them."""
        units = [] if self.root is None else [entries for _, entries in reversed(fsdp.units(self.root, self.sharded))]
        cut = [] if self.buckets is None else [bucket.entries for bucket in self.buckets.buckets]
        known = {id(entry) for group in (*units, *cut) for entry in group}
        rest = [entry for entry in reversed(self.table) if entry.here and id(entry) not in known]
        return [[e for e in group if e.trainable] for group in (*cut, *units, rest) if any(e.trainable for e in group)]


@dataclass(frozen=True)
class Reading:
    """How the model is read before its weights are cut: `function(module)` gives what is to be traced, on the batch `example`."""

    function: Callable[[nn.Module], Callable[[Any], Any]]
    example: Any


def apply(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan,
    ranks: Ranks,
    seed: int,
    reading: Reading,
    weights: Weights | None = None,
) -> Applied:
    """Make `model` run under `plan` on `ranks`, in place for a module. Every rank must call it with the same arguments.

    Initial values are those of `weights`, else those that the factory draws from `seed`, else the module's own.

    Raises `PlanError` for what this version can't run, `ModelError` for a model that can't be built or initialised.
    """
    refuse_unavailable(plan)
    if ranks.rank == 0 and len(active(plan, ranks.device)) < len(offloads(plan.offload)):
        warnings.warn(f"offload={plan.offload}: the device is a CPU, so what goes to cpu is there already and stays", stacklevel=2)
    if isinstance(model, nn.Module):
        module, recording = model, None
    else:
        module, recording = materialise.build(model, seed)
    table = collect(module)
    if not any(entry.trainable for entry in table):
        raise ModelError("the model has no parameter that requires a gradient: there is nothing to train")
    values = _Values(module, table, recording, weights)
    module = float8.convert(module) if plan.precision == "fp8" else module
    compute_dtype = COMPUTE_DTYPES[plan.precision]
    if recording is None:
        module.to(ranks.device)
        _copy_from_rank_zero(module, ranks)
    if ranks.world_size > 1 or compute_dtype is not None or stores(plan, ranks.device):
        for entry in table:
            _make_plain(entry, compute_dtype if plan.master != "fp32" else None)
    partition, pipeline = _divide(module, table, plan, ranks, reading, compute_dtype)
    root: fsdp.Root | None = None
    sharded: list[Parameter] = []
    parks = any(item.what == "params" for item in active(plan, ranks.device))
    if plan.zero == 3 and pipeline is None and (plan.shards > 1 or parks):
        root, sharded = _shard(module, table, ranks, compute_dtype, partition)
    parked = Parked(root, sharded, active(plan, ranks.device), ranks) if parks and root is not None else None
    if recording is not None:
        _allocate(module, table, root, sharded if parked else [], ranks.device, pipelined=pipeline is not None)
    apart = {id(entry) for entry in sharded}
    values.fill([entry for entry in table if id(entry) not in apart])
    values.fill_rest(module)
    if root is not None:
        fsdp.bind(root, sharded, values.fill, parked.park if parked else lambda *_: None)
    left = [entry for entry in table if entry.here and entry.shape.numel() and not any(entry is taken for taken in sharded)]
    sleeps = pipeline is not None and plan.shards > 1 and plan.zero == 3
    buckets = _buckets(left, plan, ranks, compute_dtype, sleeps, wanted=root is not None)
    if pipeline is not None:
        pipeline.buckets = buckets
    if partition is not None and not sleeps:
        partition.as_dtensors(left, ranks)
    recompute = _recompute(plan, module, partition, ranks)
    forward = nn.DataParallel(module) if plan.data_parallel and torch.cuda.device_count() > 1 else module
    statistics = _batch_norm_statistics(module, ranks)
    return Applied(module, forward, table, sharded, root, buckets, statistics, partition, pipeline, recompute, parked)


def _buckets(
    left: list[Parameter], plan: Plan, ranks: Ranks, compute_dtype: torch.dtype | None, sleeps: bool, wanted: bool
) -> Buckets | None:
    """Collect the gradients of what FSDP2 does not hold, unless autograd's own can be used as they are."""
    in_backward = plan.update == "backward"
    collects = ranks.group("data") is not None or compute_dtype is not None or in_backward or wanted
    if not (collects and any(entry.trainable for entry in left)):
        return None
    stage = 0 if plan.shards == 1 else min(plan.zero, 2)
    return Buckets(left, ranks, stage, compute_dtype, sleeps, small=in_backward)


def _shard(
    module: nn.Module, table: list[Parameter], ranks: Ranks, compute_dtype: torch.dtype | None, partition: Partition | None
) -> tuple[fsdp.Root, list[Parameter]]:
    """Make FSDP2's units of what it can take, after tensor parallelism has cut it."""
    if partition is not None:
        partition.as_dtensors(fsdp.shardable(table), ranks)
        rebind(module, table)
    root, sharded = fsdp.shard(module, block_names(module), table, ranks, compute_dtype)
    if partition is not None:
        partition.gathered_in(fsdp.unit_names(root), sharded)
    return root, sharded


def _allocate(
    module: nn.Module, table: list[Parameter], root: fsdp.Root | None, later: list[Parameter], device: torch.device, pipelined: bool
) -> None:
    """Give what is on the meta device memory, but for the shards of `later`, whose values are made unit by unit."""
    if pipelined:
        materialise.allocate(module, table, device)
        return
    waiting = {name for entry in later for name in entry.names}
    prefix = "module." if root is not None else ""
    for name, child in (root or module).named_modules():
        child.to_empty(device=device, recurse=False)
        for own, parameter in child.named_parameters(recurse=False):
            if f"{name}.{own}".removeprefix(prefix) in waiting:
                _torch.local_of(parameter).untyped_storage().resize_(0)
    rebind(module, table)


def _divide(
    module: nn.Module, table: list[Parameter], plan: Plan, ranks: Ranks, reading: Reading, compute_dtype: torch.dtype | None
) -> tuple[Partition | None, Pipeline | None]:
    """Cut the ops over `tp` and `cp` and the model over `pp`; what belongs to other ranks is let go of."""
    if not axes(plan) and plan.pp == 1 and plan.loss_chunks == 1:
        return None, None
    example = from_rank_zero(reading.example)  # what is read off it must come out the same everywhere
    partition = Partition(module, table, plan, ranks, compute_dtype)
    partition.choose(reading.function(module), example)
    if plan.pp == 1:
        partition.apply(table)
        return partition, None
    pipeline = Pipeline(partition, plan, ranks)
    pipeline.choose(reading.function(module), example)
    open_homes(ranks, plan, [entry.homes for entry in table if len(entry.homes) > 1])
    partition.apply(table)
    pipeline.drop_others(module, table, compute_dtype)
    return partition, pipeline


def _recompute(plan: Plan, module: nn.Module, partition: Partition | None, ranks: Ranks) -> Recompute | None:
    """Send the calls of blocks through `recompute`: by the module where it runs as it is, else by the programs that run it."""
    names = block_names(module)
    moved = [item for item in active(plan, ranks.device) if item.what == "activations"]
    asked = [f"recompute={plan.recompute}"] * (plan.recompute != "none") + [f"offload={plan.offload}"] * bool(moved)
    if not asked or not has_blocks(names, " ".join(asked), type(module).__name__):
        return None
    if plan.data_parallel and torch.cuda.device_count() > 1:
        raise PlanError(f"{' '.join(asked)}: the plan dp copies the module to every device at each step: use ddp")
    runs = Recompute(plan.recompute, names, ranks.device, Activations(moved, ranks.device) if moved else None)
    if partition is None:
        runs.wrap(module)
    else:
        partition.runs = runs
    return runs


def _make_plain(entry: Parameter, dtype: torch.dtype | None) -> None:
    """Give a parameter row-major memory and no gradient: flat buckets, rows and fused optimizers all count on it.

    `dtype` is that of weights without a full-precision master.
    """
    entry.live.grad = None
    if dtype is not None and entry.trainable and entry.dtype.is_floating_point:
        entry.live.data = entry.live.data.to(dtype)
    if not entry.live.is_contiguous():
        entry.live.data = entry.live.data.contiguous()


def refuse_unavailable(plan: Plan) -> None:
    """Raise `PlanError` for a legal plan that this version does not execute yet."""
    default = Plan()
    pipeline = () if plan.pp != 1 else ("schedule", "virtual", "split")
    for name in ("ep", *pipeline, "compile"):
        if getattr(plan, name) != getattr(default, name):
            item = str(Plan(**{name: getattr(plan, name)}))
            raise PlanError(
                f"{item} is not available in this version: leave {name} out; dp_replicate, dp_shard, zero, tp, cp and pp are"
            )
    if plan.sp and plan.tp == 1:
        raise PlanError("sp=on divides activations over the ranks of tp: add tp=N, or leave sp out")
    refuse_storage(plan)
    if plan.precision == "fp8":
        float8.check(plan)


def refuse_storage(plan: Plan) -> None:
    """Raise `PlanError` for ways to store states that contradict each other, or that this version does not execute yet."""
    for item in offloads(plan.offload):
        if item.directory is not None:
            check_directory(item.directory)
        holds = item.what == "activations" and plan.recompute == "none" and plan.pp > 1 and plan.schedule in SPLIT_BACKWARD
        if holds and (item.directory is not None or torch.cuda.is_available()):
            raise PlanError(
                f"offload=activations: {plan.schedule} holds on to activations until it has computed the weights' gradients: add "
                "recompute=selective or recompute=full, or use schedule=1f1b"
            )
    refuse_contradictions(plan)


class _Values:
    """The initial values of everything in a module that was built on the meta device."""

    def __init__(
        self, module: nn.Module, table: list[Parameter], recording: materialise.Recording | None, weights: Weights | None
    ) -> None:
        self.recording, self.weights = recording, weights
        if weights is not None:
            weights.check(table, dict(module.named_buffers(remove_duplicate=False)))
        tensors = [*((entry.name, entry.live) for entry in table), *module.named_buffers(remove_duplicate=False)]
        unknown = [name for name, tensor in tensors if tensor.is_meta and not (recording and recording.knows(tensor))]
        if unknown:
            raise ModelError(
                f"{unknown[0]} is on the meta device and its initial value is unknown: pass the function that builds the "
                "model instead of the built module"
            )
        # Aliases: `to_empty` gives the module's own tensors other storage.
        self.tensors = {name: tensor.detach() for name, tensor in tensors} if recording else {}

    @torch.no_grad()
    def fill(self, entries: list[Parameter]) -> None:
        """Give parameters (this rank's rows of them) their initial values; one whole tensor at a time."""
        for entry in entries:
            if not entry.here or (self.recording is None and self.weights is None):
                continue
            target = _torch.local_of(entry.live) if isinstance(entry.live, DTensor) else entry.live
            storage, needed = target.untyped_storage(), target.numel() * target.element_size()
            if storage.nbytes() < needed:
                storage.resize_(needed)
            if self.weights is None:
                target.copy_(entry.local(self._value(self.tensors[entry.name])))
            elif entry.cut is None:
                target.copy_(self.weights.read(entry.names, entry.rows))
            else:
                target.copy_(entry.local(self.weights.read(entry.names)))

    @torch.no_grad()
    def fill_rest(self, module: nn.Module) -> None:
        """Give every buffer and tensor attribute its value."""
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if self.weights is not None and name in self.weights:
                buffer.copy_(self.weights.read((name,)))
            elif self.recording is not None:
                buffer.copy_(self._value(self.tensors[name]))
        for child in module.modules():
            for name, attribute in list(vars(child).items()):
                if name.startswith("_") or not isinstance(attribute, (Tensor, list, tuple, dict)):
                    continue  # parameters, buffers and submodules live under underscored names and are filled already
                if any(tensor.is_meta for tensor in tensors_of(attribute)):
                    setattr(child, name, tree_map_tensors(self._value, attribute))

    def _value(self, tensor: Tensor) -> Tensor:
        assert self.recording is not None
        return self.recording.value(tensor) if self.recording.knows(tensor) else tensor


def _copy_from_rank_zero(module: nn.Module, ranks: Ranks) -> None:
    """Broadcast every parameter and buffer from rank 0: ranks that were seeded differently still start equal."""
    if ranks.mesh is None:
        return
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()]
    sent = [tensor.detach().contiguous() for tensor in tensors]
    # As bytes: gloo does not know every dtype.
    for work in [dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0, async_op=True) for tensor in sent]:
        work.wait()
    for tensor, received in zip(tensors, sent, strict=True):
        if received.data_ptr() != tensor.data_ptr():
            tensor.data = received


def _batch_norm_statistics(module: nn.Module, ranks: Ranks) -> list[Tensor]:
    norms = [child for child in module.modules() if isinstance(child, _BATCH_NORMS) and child.track_running_stats]
    if norms and ranks.data_ranks > 1 and ranks.rank == 0:
        warnings.warn(
            "BatchNorm normalises each rank's micro-batch by that micro-batch's own statistics, so results depend on how the "
            "batch is split; the running statistics are averaged over ranks after each step (use GroupNorm or SyncBatchNorm "
            "for results that do not)",
            stacklevel=2,
        )
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def average_batch_norms(statistics: list[Tensor], ranks: Ranks) -> None:
    """Average running means and variances over the data ranks; every rank must call it."""
    group = ranks.group("data")
    if not statistics or group is None:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics])
    dist.all_reduce(flat, group=group)  # two numbers a channel, over the ranks with the same part of the model
    flat /= group.size()
    for buffer, part in zip(statistics, flat.split([buffer.numel() for buffer in statistics]), strict=True):
        buffer.copy_(part.view_as(buffer))
