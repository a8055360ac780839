"""The ranks of a run: which process this is, its device, and its place on every axis.

Starting processes is left to `train/launch.py`; this file joins what was started and builds the device mesh of a plan.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshwright._torch import tree_map_tensors
from meshwright.errors import ConfigError
from meshwright.plan import Plan


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, under one resolved plan.

    `mesh` has the axes (`pp`, `dp_replicate`, `dp_shard`, `tp`) and is None for one rank without a process group; as far as
    parameters and gradients go, ranks of `cp` are data ranks: `dp_shard` here counts them too where the plan shards, else
    `dp_replicate` does. `data_rank` of `data_ranks`
    is the share of every global batch that belongs to this process; all ranks of `tp`, `cp` and `pp` have the same share, and
    `speaks` for it is one of `tp` and `cp`. Groups: the axes, `cp`, and `data` (every rank with the same part of the parameters);
    `homes` has those of some ranks of this pipeline.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    data_rank: int
    data_ranks: int
    groups: dict[str, dist.ProcessGroup]
    cp_rank: int = 0
    tp_rank: int = 0
    pp_rank: int = 0
    homes: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Return the process group along `axis`, or None where the axis has a single rank."""
        return self.groups.get(axis)

    def size(self, axis: str) -> int:
        """Return the number of ranks along `axis`."""
        group = self.groups.get(axis)
        return 1 if group is None else group.size()

    @property
    def speaks(self) -> bool:
        """Return whether this rank reports for its share of the batch where all ranks are summed."""
        return self.cp_rank == 0 and self.tp_rank == 0


def connect(timeout_s: float = 1800.0) -> None:
    """Join the process group that torchrun or Slurm announced in the environment; do nothing if there is none.

    gloo on the CPU; NCCL plus gloo (for host tensors) where CUDA devices are. Every rank must call it.
    """
    if dist.is_initialized():
        return
    environment = slurm_environment(os.environ) | dict(os.environ)
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} but {', '.join(missing)} is not set: start with torchrun or srun"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    os.environ.update({name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT")})
    store, rank, world_size = next(iter(dist.rendezvous("env://", int(environment["RANK"]), int(environment["WORLD_SIZE"]))))
    # A fresh prefix per attempt: after a restart the shared store still holds the addresses of the attempt that died.
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore(f"meshwright/attempt-{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Translate Slurm's variables into torchrun's; empty where this is no multi-task Slurm step or torchrun already spoke."""
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in environment:
        return {}
    first = environment.get("SLURM_LAUNCH_NODE_IPADDR") or environment.get("SLURM_SRUN_COMM_HOST") or "127.0.0.1"
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        # Two jobs on one node must not meet: derive the port from the job's number.
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)),
    }


def from_rank_zero(value: Any) -> Any:
    """Return rank 0's value, its tensors on the CPU, on every rank: one pickled object over all ranks. Every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    held = [tree_map_tensors(lambda tensor: tensor.cpu(), value) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def build_ranks(plan: Plan, device: torch.device | None = None) -> Ranks:
    """Build the mesh of a resolved plan over the ranks that are connected. Every rank must call it."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # As tensors say it: cuda is not equal to cuda:0. And where FSDP2 looks for it.
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    if world_size == 1:
        return Ranks(rank, world_size, device, None, 0, 1, {})
    # Neighbouring ranks share a node, and the more an axis talks the further in it is: tp, then cp, dp_shard, dp_replicate, pp.
    ids = torch.arange(world_size).view(plan.pp, plan.dp_replicate, plan.dp_shard, plan.cp, plan.tp)
    pp_rank, replicate, shard, cp_rank, tp_rank = ((ids == rank).nonzero()[0]).tolist()
    # What a context-parallel rank computes on is whole, so it shards with dp_shard, or is one more replica (`Plan.shards`).
    replicas = world_size // (plan.pp * plan.shards * plan.tp)
    sizes = {"pp": plan.pp, "dp_replicate": replicas, "dp_shard": plan.shards, "tp": plan.tp}
    # A process group costs threads and connections: an axis of one rank gets none.
    names = tuple(name for name, size in sizes.items() if size > 1)
    mesh = DeviceMesh(device.type, ids.reshape([sizes[name] for name in names]), mesh_dim_names=names)
    groups = {axis: mesh.get_group(axis) for axis in names}
    if plan.cp > 1:
        alone = plan.dp_replicate == plan.dp_shard == 1
        groups["cp"] = (
            groups["dp_shard" if plan.shards > 1 else "dp_replicate"]
            if alone
            else _subgroup(ids.permute(0, 1, 2, 4, 3).reshape(-1, plan.cp))
        )
    data_axes = [name for name in ("dp_replicate", "dp_shard") if name in groups]
    if len(data_axes) == 1:
        groups["data"] = groups[data_axes[0]]
    elif data_axes:
        by_part = ids.permute(0, 4, 1, 2, 3).reshape(plan.pp * plan.tp, -1)
        groups["data"] = cast(dist.ProcessGroup, dist.group.WORLD) if plan.tp == plan.pp == 1 else _subgroup(by_part)
    data_rank, data_ranks = replicate * plan.dp_shard + shard, plan.dp_replicate * plan.dp_shard
    return Ranks(rank, world_size, device, mesh, data_rank, data_ranks, groups, cp_rank, tp_rank, pp_rank)


def open_homes(ranks: Ranks, plan: Plan, sets: Iterable[tuple[int, ...]]) -> None:
    """Make the groups of some ranks of each pipeline, for parameters that they share. Every rank must call it with equal sets."""
    lines = torch.arange(ranks.world_size).view(plan.pp, -1).T  # one pipeline each
    for homes in sorted(set(sets)):
        if len(homes) == plan.pp:
            ranks.homes[homes] = ranks.groups["pp"]
            continue
        group, _ = dist.new_subgroups_by_enumeration(lines[:, list(homes)].tolist())
        if group is not None and ranks.pp_rank in homes:
            ranks.homes[homes] = group


def _subgroup(lines: torch.Tensor) -> dist.ProcessGroup:
    """Return this rank's group among disjoint groups [groups, ranks] of all ranks; every rank must call it."""
    group, _ = dist.new_subgroups_by_enumeration(lines.tolist())
    return cast(dist.ProcessGroup, group)
