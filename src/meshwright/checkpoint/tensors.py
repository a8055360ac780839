"""The tensors of a checkpoint under logical names: one shape whatever the plan, so that any plan can load any other's.

`model.NAME` for parameters (one of its names, in full precision) and persistent buffers; `optimizer.NAME.STATE` for optimizer
states of the parameter's shape. Sharded tensors appear as DTensors over `dp_shard`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meshwright.engine.optimizer import as_dtensor
from meshwright.parallel.parameters import Parameter

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine


def model_tensors(engine: Engine, to_save: bool = False) -> dict[str, Tensor]:
    """Return this rank's parameters and persistent buffers; loading into the returned tensors changes the engine's own.

    `to_save`: those that this pipeline rank speaks for, so that what several hold is written by one.
    """
    names = {name: entry for entry in engine.table for name in entry.names}
    homes = engine.pipeline.buffer_homes if engine.pipeline is not None else {}
    mine = engine.ranks.pp_rank
    tensors: dict[str, Tensor] = {}
    for entry in engine.table:
        if entry.here and not (to_save and entry.homes[0] != mine):
            tensors[f"model.{entry.name}"] = _logical(engine, entry, entry.master.detach())
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


def _logical(engine: Engine, entry: Parameter, local: Tensor) -> Tensor:
    return as_dtensor(local, entry, engine.ranks) if entry.sharded else local


def optimizer_tensors(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
                tensors[name] = _logical(engine, entry, value) if _by_rows(engine, entry, value.shape) else value
            else:
                numbers[name] = value
    return tensors, numbers


def _by_rows(engine: Engine, entry: Parameter, shape: torch.Size) -> bool:
    """Return whether a state of this (local) shape holds this rank's rows, rather than something whole."""
    assert engine.bound is not None
    return entry.sharded and not engine.bound.whole(entry) and len(shape) > 0 and shape == entry.master.detach().shape


def empty_optimizer_states(
    engine: Engine, saved: dict[str, tuple[torch.Size, torch.dtype]], numbers: dict[str, Any]
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
            if entry.sharded and not engine.bound.whole(entry) and shape == entry.shape:
                state[key] = torch.zeros_like(entry.master.detach(), dtype=dtype)
                tensors[name] = _logical(engine, entry, state[key])
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
