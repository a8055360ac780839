"""The tensors of a checkpoint under logical names: one shape whatever the plan, so that any plan can load any other's.

`model.NAME` for parameters (one of its names, in full precision) and persistent buffers; `optimizer.NAME.STATE` for optimizer
states of the parameter's shape. Sharded tensors appear as DTensors over `dp_shard`; those that tensor parallelism cuts (in segments
that no DTensor describes, perhaps) are dealt out anew by whole rows over `tp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from meshwright.engine.optimizer import as_dtensor
from meshwright.engine.state import gather_rows
from meshwright.parallel.parameters import Parameter, shard_rows

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine


class Recut:
    """Tensors of cut parameters as rows over `tp`: copies, to be put back after they have been loaded into."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._pending: list[tuple[Parameter, Tensor, DTensor]] = []

    def rows(self, entry: Parameter, local: Tensor) -> Tensor:
        """Return this rank's rows of the whole tensor of which it holds `local`; every rank must call it."""
        whole = gather_rows(entry, local, self.engine.ranks)
        if not whole.dim():
            return whole
        ranks = self.engine.ranks
        assert ranks.mesh is not None
        mesh = ranks.mesh["tp"]
        mine = whole.narrow(0, *shard_rows(whole.shape[0], mesh.size(), ranks.tp_rank)).clone()
        made = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        self._pending.append((entry, local, made))
        return made

    def put_back(self) -> None:
        """Copy what was loaded to this rank's parts; every rank must call it."""
        for entry, local, made in self._pending:
            local.copy_(entry.local(made.full_tensor()))


def model_tensors(engine: Engine, recut: Recut, to_save: bool = False) -> dict[str, Tensor]:
    """Return this rank's parameters and persistent buffers; loading into the returned tensors, and then `recut.put_back()`, changes
    the engine's own.

    `to_save`: those that this pipeline rank speaks for, so that what several hold is written by one.
    """
    names = {name: entry for entry in engine.table for name in entry.names}
    homes = engine.pipeline.buffer_homes if engine.pipeline is not None else {}
    mine = engine.ranks.pp_rank
    tensors: dict[str, Tensor] = {}
    for entry in engine.table:
        if entry.here and not (to_save and entry.homes[0] != mine):
            tensors[f"model.{entry.name}"] = _logical(engine, entry, entry.master.detach(), recut)
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if name not in names and isinstance(value, Tensor) and not (to_save and homes.get(name, 0) != mine):
            tensors[f"model.{name}"] = value.detach()
    return tensors


def model_shapes(engine: Engine) -> dict[str, torch.Size]:
    """Return the whole shapes of all parameters and persistent buffers, of every pipeline rank, by their names in a checkpoint."""
    names = {name: entry for entry in engine.table for name in entry.names}
    shapes = {f"model.{entry.name}": entry.whole for entry in engine.table}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if name not in names and isinstance(value, Tensor):
            shapes[f"model.{name}"] = value.shape
    return shapes


def _logical(engine: Engine, entry: Parameter, local: Tensor, recut: Recut) -> Tensor:
    if entry.cut is not None:
        return recut.rows(entry, local)
    return as_dtensor(local, entry, engine.ranks) if entry.sharded else local


def optimizer_tensors(engine: Engine, recut: Recut) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return this rank's optimizer states: tensors by `optimizer.NAME.STATE`, and plain numbers by the same names."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for entry in engine.bound.entries if engine.bound else []:
        assert engine.bound is not None
        parameter = engine.bound.of(entry)
        state = {} if parameter is None else engine.bound.torch.state.get(parameter, {})
        for key, value in state.items():
            name = f"optimizer.{entry.name}.{key}"
            if isinstance(value, Tensor):
                tensors[name] = _logical(engine, entry, value, recut) if _in_parts(engine, entry, value.shape) else value
            else:
                numbers[name] = value
    return tensors, numbers


def _in_parts(engine: Engine, entry: Parameter, shape: torch.Size) -> bool:
    """Return whether a state of this (local) shape holds this rank's part, rather than something whole."""
    assert engine.bound is not None
    return (
        (entry.sharded or entry.cut is not None)
        and not engine.bound.whole(entry)
        and len(shape) > 0
        and shape == entry.master.detach().shape
    )


def empty_optimizer_states(
    engine: Engine, saved: dict[str, tuple[torch.Size, torch.dtype]], numbers: dict[str, Any], recut: Recut
) -> dict[str, Tensor]:
    """Give this rank's optimizer a state for each saved one that it needs; return the tensors by name, ready to be loaded into.

    `saved` is name -> (whole shape, dtype), `numbers` name -> value. A state of its parameter's shape is laid out as this plan
    lays out the parameter's update; any other is whole.
    """
    assert engine.bound is not None
    by_parameter: dict[str, list[str]] = {}
    for name in (*saved, *numbers):
        if name.startswith("optimizer."):
            by_parameter.setdefault(name.rpartition(".")[0], []).append(name)
    tensors: dict[str, Tensor] = {}
    for entry in engine.bound.entries:
        parameter = engine.bound.of(entry)
        if parameter is None:
            continue
        engine.bound.torch.state.pop(parameter, None)
        for name in by_parameter.get(f"optimizer.{entry.name}", ()):
            state, key = engine.bound.torch.state[parameter], name.rpartition(".")[2]
            if name in numbers:
                state[key] = numbers[name]
                continue
            shape, dtype = saved[name]
            if (entry.sharded or entry.cut) and not engine.bound.whole(entry) and shape == entry.whole and shape:
                state[key] = torch.zeros_like(entry.master.detach(), dtype=dtype)
                tensors[name] = _logical(engine, entry, state[key], recut)
            else:
                state[key] = tensors[name] = torch.zeros(shape, dtype=dtype, device=_device_of(engine, entry, shape))
    return tensors


def _device_of(engine: Engine, entry: Parameter, shape: torch.Size) -> torch.device:
    """Return where torch's optimizers keep a whole state: step counts on the CPU, unless the update runs as one kernel."""
    assert engine.bound is not None
    parameter = engine.bound.of(entry)
    group = next(g for g in engine.bound.torch.param_groups if any(p is parameter for p in g["params"]))
    on_device = bool(shape) or group.get("fused") or group.get("capturable")
    return engine.ranks.device if on_device else torch.device("cpu")
