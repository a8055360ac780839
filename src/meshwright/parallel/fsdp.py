"""`zero=3`: parameters, gradients and optimizer states sharded over `dp_shard`, by torch's FSDP2.

What FSDP2 can't take (scalars, empty tensors, parameters of a second dtype) is left to `buckets.py`.
Memory on each rank: 16 Psi / N bytes of states (see `plan/memory.py`) plus the gathered units at work: the root's own
parameters, and one block in the forward; in the backward also that block's full gradients.
Communication per step: each block is all-gathered twice (forward, backward) and its gradients reduce-scattered once:
3 Psi elements over `dp_shard`, then an all-reduce of Psi / N over `dp_replicate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from meshwright import _torch
from meshwright.errors import ModelError
from meshwright.parallel.parameters import Parameter, on_accumulated, rebind, shard_rows
from meshwright.parallel.ranks import Ranks


class Root(nn.Module):
    """What FSDP2 sees as the outermost module: runs a function in its forward.

    So the parameters that belong to no block are there for whatever the function does with the model (its forward, another
    method, the loss), and the hooks that start the backward hang on the tensors that it returns.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.trail = 0  # which units a step has run, in which order, as a number

    def forward(self, function: Callable[[], Any]) -> Any:
        """Return what `function` returns. Raises `ModelError` for a block that FSDP2's hooks can't work with."""
        try:
            return function()
        except RuntimeError as error:
            if "RegisterPostBackwardFunction" not in str(error):
                raise
            raise ModelError(
                "a block writes to a tensor that it is given, which zero=3 and offload=params do not allow: let it write to a "
                "copy, or use zero=2"
            ) from error

    def ran(self, number: int) -> None:
        """Note that a unit runs."""
        if torch.is_grad_enabled() and not _torch.in_backward():
            self.trail = (self.trail * 31 + number + 1) % _TRAILS


_TRAILS = 1 << 20


def trail(root: Root | None) -> list[float]:
    """What ranks sum, for `refuse_other_trails` to see whether all have the same: both exact for up to 4,096 ranks."""
    return [0.0, 0.0] if root is None else [float(root.trail), float(root.trail**2)]


def refuse_other_trails(total: float, squares: float, ranks: int) -> None:
    """Raise `ModelError` if ranks ran different units in a step: they gathered each other's rows in the place of their own."""
    if int(total) ** 2 != ranks * int(squares):
        raise ModelError(
            "ranks ran different blocks in this step, or in another order, and zero=3 gathers a block on all ranks at once: use "
            "zero=2, or have the model decide alike on every rank"
        )


def shardable(table: list[Parameter]) -> list[Parameter]:
    """Return the parameters that FSDP2 can take: of one trainable dtype (the one with most elements), with rows and elements."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in table:
        if entry.trainable:
            sizes[entry.dtype] += entry.shape.numel()
    main = sizes.most_common(1)[0][0]
    return [e for e in table if len(e.shape) > 0 and e.shape.numel() > 0 and (not e.trainable or e.dtype == main)]


def shard(
    module: nn.Module,
    units: list[str],
    table: list[Parameter],
    ranks: Ranks,
    compute_dtype: torch.dtype | None,
) -> tuple[Root, list[Parameter]]:
    """Shard `module` in place, one FSDP2 unit per name in `units` and one for the rest; return the root and the entries taken.

    Their `live` becomes a DTensor sharded on dim 0 (of this rank's part, where tensor parallelism has cut it). A unit that shares
    a parameter with the world outside it is left to the root, since FSDP2 lets only one unit own a parameter. Every rank must call
    it.
    """
    taken = shardable(table)
    chosen = {id(entry) for entry in taken}
    ignored = {entry.live for entry in table if id(entry) not in chosen}
    mesh = _mesh(ranks)
    # Inputs are not cast at every unit: autocast does that at each op, so that all plans round at the same places.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=_reduce_dtype(taken), cast_forward_inputs=False)
    for name in _separable(units, taken):
        fully_shard(module.get_submodule(name), mesh=mesh, mp_policy=policy, ignored_params=ignored)
    root = Root(module)
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)  # losses are weighted by item count beforehand: gradients are summed
            unit.set_force_sum_reduction_for_comms(True)
    _torch.fsdp_reduce_unused(cast(FSDPModule, root))
    for number, (_, group, _) in enumerate(_torch.fsdp_groups(root)):
        _torch.fsdp_around(group, "pre_forward", partial(root.ran, number), lambda: None)
    rebind(module, taken)
    if ranks.mesh is not None:
        for entry in taken:
            entry.rows = shard_rows(entry.shape[0], ranks.mesh["dp_shard"].size(), ranks.mesh.get_local_rank("dp_shard"))
    return root, taken


def _mesh(ranks: Ranks) -> DeviceMesh:
    """The mesh that shards, and replicates on its first axis; for a rank without peers one of itself, whose group stays open."""
    if ranks.mesh is None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return DeviceMesh(ranks.device.type, [0], mesh_dim_names=("dp_shard",))
    return ranks.mesh["dp_replicate", "dp_shard"] if ranks.group("dp_replicate") is not None else ranks.mesh["dp_shard"]


def unit_names(root: Root) -> list[str]:
    """Return the names in the model of the modules that are FSDP2 units of their own."""
    return [name.removeprefix("module.") for name, child in root.named_modules() if name and isinstance(child, FSDPModule)]


def units(root: Root, taken: list[Parameter]) -> list[tuple[Any, list[Parameter]]]:
    """Return FSDP2's groups (what is gathered and reduced together) and their entries, in the order of the modules."""
    by_live = {id(entry.live): entry for entry in taken}
    return [(group, [by_live[id(sharded)] for sharded in parameters]) for _, group, parameters in _torch.fsdp_groups(root)]


def bind(
    root: Root, taken: list[Parameter], fill: Callable[[list[Parameter]], None], done: Callable[[Any, list[Parameter]], None]
) -> None:
    """Give the entries their masters (this rank's rows, sharing memory with the DTensors), and learn of each one's use.

    One unit after the other, inner ones first: `fill` gives its shards their values, `done` gets its group once it is bound. `used`
    is set whenever a backward accumulates into the parameter. Every rank must call it.
    """
    by_live = {id(entry.live): entry for entry in taken}
    for module, group, parameters in reversed(list(_torch.fsdp_groups(root))):
        entries = [by_live[id(sharded)] for sharded in parameters]
        fill(entries)
        for entry, (_, unsharded) in zip(entries, _torch.fsdp_unsharded_parameters(module), strict=True):
            local = _torch.local_of(entry.live)  # FSDP2 has padded it by now
            entry.master = nn.Parameter(local.detach(), requires_grad=entry.trainable)
            entry.gathered = unsharded
            if entry.trainable:
                on_accumulated(unsharded, entry.mark_used)
        done(group, entries)


class Reduced:
    """Says when a unit's gradients are whole: in the backward after the one that made them, or at `flush`.

    A unit whose module was called several times is whole after as many backwards. Waiting for one more unit lets a device reduce
    the first while it computes the second.
    """

    def __init__(self, root: Root, taken: list[Parameter], ready: Callable[[list[Parameter]], object]) -> None:
        """Call `ready` with each unit's trainable entries, once for each backward that follows `begin(last=True)`."""
        self._ready, self._last = ready, False
        self._units: list[tuple[Any, list[Parameter]]] = []
        self._calls: list[int] = []
        self._backwards: list[int] = []
        self._left: list[int] = []
        self._waiting: int | None = None
        for group, entries in units(root, taken):
            number = len(self._units)
            self._units.append((group, [entry for entry in entries if entry.trainable]))
            _torch.fsdp_around(group, "pre_forward", partial(self._count, number), lambda: None)
            _torch.fsdp_around(group, "post_backward", lambda: None, partial(self._after, number))
        self.begin(last=False)

    def begin(self, last: bool) -> None:
        """Prepare for a forward and backward; `last` says it is the step's last."""
        self._last = last
        self._calls = [0] * len(self._units)
        self._backwards = [0] * len(self._units)
        self._left = list(range(len(self._units)))[::-1]
        self._waiting = None

    def _count(self, number: int) -> None:
        self._calls[number] += not _torch.in_backward()

    def _after(self, number: int) -> None:
        self._backwards[number] += 1
        if not self._last or number not in self._left or self._backwards[number] != self._calls[number]:
            return
        self._left.remove(number)
        before, self._waiting = self._waiting, number
        if before is not None:
            self._report(before)

    def flush(self) -> None:
        """After the backward: report what has not been reported."""
        if self._last:
            waiting = [] if self._waiting is None else [self._waiting]
            left, self._left, self._waiting = [*waiting, *self._left], [], None
            for number in left:
                self._report(number)
        self._last = False

    def _report(self, number: int) -> None:
        group, entries = self._units[number]
        _torch.fsdp_wait_for_gradients(group)
        attach(entries)
        self._ready(entries)
        for entry in entries:
            entry.live.grad = entry.gradient = entry.summed = None


def reduce_on_last(root: Root, last: bool) -> None:
    """Say whether the coming backward is the step's last: only then are shards all-reduced over `dp_replicate`.

    The reduce-scatter over `dp_shard` runs in every backward, so that no rank ever keeps full gradients.
    """
    cast(FSDPModule, root).set_requires_all_reduce(last)


def reshard(root: Root) -> None:
    """Free the parameters that a forward without backward leaves gathered."""
    cast(FSDPModule, root).reshard()


def attach(taken: list[Parameter]) -> None:
    """Set each entry's `gradient` to this rank's rows of the reduced one."""
    for entry in taken:
        if entry.gathered is not None and entry.gathered.grad is not None:
            raise ModelError(
                f"{entry.name} got a gradient after FSDP2 had reduced its unit, as under reentrant activation checkpointing: "
                "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        gradient = entry.live.grad
        entry.gradient = None if gradient is None else _torch.local_of(gradient)


def _separable(units: list[str], taken: list[Parameter]) -> list[str]:
    inside = []
    for unit in units:
        prefix = f"{unit}."
        if all(len({name.startswith(prefix) for name in entry.names}) == 1 for entry in taken):
            inside.append(unit)
    return inside


def _reduce_dtype(taken: list[Parameter]) -> torch.dtype:
    dtype = next((entry.dtype for entry in taken if entry.trainable), torch.float32)
    return torch.promote_types(dtype, torch.float32)
