"""The state of a run as logical tensors: gathered whole, or as this rank's part of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright import _torch
from meshwright.parallel.parameters import Parameter
from meshwright.parallel.ranks import Ranks

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine


def gather_rows(entry: Parameter, local: Tensor, ranks: Ranks) -> Tensor:
    """Return the whole of a tensor of `entry`'s whole shape from each rank's rows of its part; every rank must call it.

    An all-gather over `dp_shard` of ceil(rows / ranks) rows each, then one over `tp` of the parts; a tensor that is neither
    sharded nor cut is returned as it is.
    """
    part = _gather_part(entry, local, ranks)
    return part if entry.cut is None else entry.cut.join(part)


def _gather_part(entry: Parameter, local: Tensor, ranks: Ranks) -> Tensor:
    group = ranks.group("dp_shard")
    if not entry.sharded or group is None:
        return local
    rows = -(-entry.shape[0] // group.size())
    mine = local.new_zeros((rows, *entry.shape[1:]))
    mine[: local.shape[0]] = local
    whole = local.new_empty((rows * group.size(), *entry.shape[1:]))
    _torch.all_gather(whole, mine, group).wait()
    return whole[: entry.shape[0]]


def to_first(value: Tensor | None, shape: torch.Size, dtype: torch.dtype, home: int, ranks: Ranks) -> Tensor:
    """Bring a tensor from pipeline rank `home` to rank 0; every rank must call it, and others than rank 0 get what they gave.

    One message of the whole tensor over rank 0's own pipeline.
    """
    group = ranks.group("pp")
    if group is not None and home > 0 and dist.get_global_rank(group, 0) == 0:
        if ranks.pp_rank == home:
            assert value is not None
            dist.send(value.contiguous(), group=group, group_dst=0)
        elif ranks.pp_rank == 0:
            value = torch.empty(shape, dtype=dtype, device=ranks.device)
            dist.recv(value, group=group, group_src=home)
    return torch.empty(0) if value is None else value


def _gathered(entry: Parameter, local: Tensor | None, ranks: Ranks) -> Tensor:
    home = entry.homes[0]
    mine = gather_rows(entry, local, ranks) if ranks.pp_rank == home and local is not None else None
    return to_first(mine, entry.whole, entry.dtype, home, ranks)


def full_gradients(engine: Engine, ratio: float) -> dict[str, Tensor]:
    """Return every gradient times `ratio`, whole, by name, on the CPU of rank 0; elsewhere an empty dict."""
    ranks = engine.ranks
    there = torch.tensor([float(entry.gradient is not None) for entry in engine.table], device=ranks.device)
    if ranks.group("pp") is not None:
        dist.all_reduce(there, op=dist.ReduceOp.MAX, group=ranks.group("pp"))  # 4 bytes per parameter
    gradients: dict[str, Tensor] = {}
    for entry, exists in zip(engine.table, there.tolist(), strict=True):
        if exists and entry.shape.numel():
            full = _gathered(entry, entry.gradient, ranks)
            if ranks.rank == 0:
                gradients.update(dict.fromkeys(entry.names, full.cpu() * ratio))
    return gradients


def full_state_dict(engine: Engine) -> dict[str, Tensor]:
    """See `Engine.full_state_dict`."""
    by_name = {name: entry for entry in engine.table for name in entry.names}
    first = engine.ranks.rank == 0
    homes = engine.pipeline.buffer_homes if engine.pipeline is not None else {}
    done: dict[int, Tensor] = {}
    result = {}
    with torch.no_grad():
        for name, value in engine.module.state_dict(keep_vars=True).items():
            entry = by_name.get(name)
            if entry is None:
                if isinstance(value, Tensor):
                    value = to_first(value.detach(), value.shape, value.dtype, homes.get(name, 0), engine.ranks).cpu().clone()
                whole = value
            elif id(entry) in done:
                whole = done[id(entry)]
            else:
                gathered = _gathered(entry, entry.value() if entry.here else None, engine.ranks)
                whole = done[id(entry)] = gathered.to("cpu", copy=True) if first else torch.empty(0)
            if first:
                result[name] = whole
    return result
