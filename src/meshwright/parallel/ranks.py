"""The ranks of a run: which process this is, its device, and its place on every axis.

Starting processes is left to `train/launch.py`; this file joins what was started and builds the device mesh of a plan.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshwright.errors import ConfigError
from meshwright.plan import Plan


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, under one resolved plan.

    `mesh` has the axes (`dp_replicate`, `dp_shard`) and is None for one rank without a process group. `data_rank` of
    `data_ranks` is the share of every global batch that belongs to this process.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    data_rank: int
    data_ranks: int
    groups: dict[str, dist.ProcessGroup]

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Return the process group along `axis`, or None where the axis has a single rank."""
        return self.groups.get(axis)


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


def build_ranks(plan: Plan, device: torch.device | None = None) -> Ranks:
    """Build the mesh of a resolved plan over the ranks that are connected. Every rank must call it."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    mesh, groups = None, {}
    axes = {"dp_replicate": plan.dp_replicate, "dp_shard": plan.dp_shard}
    if world_size > 1:
        mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        groups = {axis: mesh.get_group(axis) for axis, degree in axes.items() if degree > 1}
    # Neighbouring ranks share a node, and sharding talks more than replicating: dp_shard is the inner axis.
    return Ranks(rank, world_size, device, mesh, rank, plan.dp_replicate * plan.dp_shard, groups)
