"""The state of a run as logical tensors: gathered whole, or as this rank's part of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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


def full_state_dict(engine: Engine) -> dict[str, Tensor]:
    """See `Engine.full_state_dict`."""
    by_name = {name: entry for entry in engine.table for name in entry.names}
    first = engine.ranks.rank == 0
    done: dict[int, Tensor] = {}
    result = {}
    with torch.no_grad():
        for name, value in engine.module.state_dict(keep_vars=True).items():
            entry = by_name.get(name)
            if entry is None:
                whole = value.detach().cpu().clone() if isinstance(value, Tensor) else value
            elif id(entry) in done:
                whole = done[id(entry)]
            else:
                gathered = gather_rows(entry, entry.master.detach(), engine.ranks)
                whole = done[id(entry)] = gathered.to("cpu", copy=True) if first else torch.empty(0)
            if first:
                result[name] = whole
    return result
