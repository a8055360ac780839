"""The tensors of a checkpoint under logical names: one shape whatever the plan, so that any plan can load any other's.

`model.NAME` for parameters (one of its names, in full precision) and persistent buffers; `optimizer.NAME.STATE` for optimizer
states of the parameter's shape. Sharded tensors appear as DTensors over `dp_shard`; those that tensor parallelism cuts (in segments
that no DTensor describes, perhaps) are dealt out anew by whole rows over `tp`. What the plan stores in another form or place
appears as a tensor without memory, which the planners below replace by its values when its turn comes, one tensor at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor, Shard

from meshwright.engine.optimizer import as_dtensor
from meshwright.engine.state import gather_rows
from meshwright.parallel.parameters import Parameter, Stored, shard_rows

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine


class SavePlanner(DefaultSavePlanner):
    """Makes a stored tensor when it is written."""

    def __init__(self, stored: dict[str, Stored]) -> None:
        super().__init__()
        self._stored = stored

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the object that is to be written."""
        stored = self._stored.get(index.fqn)
        return super().lookup_object(index) if stored is None else stored.get().cpu()


class LoadPlanner(DefaultLoadPlanner):
    """Reads into a stored tensor's values, and puts them back after each of its parts."""

    def __init__(self, stored: dict[str, Stored]) -> None:
        super().__init__()
        self._stored = stored
        self._name, self._values = "", torch.empty(0)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that is to be read into."""
        if index.fqn not in self._stored:
            return super().lookup_tensor(index)
        if index.fqn != self._name:
            self._name, self._values = index.fqn, self._stored[index.fqn].get()
        return self._values

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Take note that a part of a tensor has been read."""
        if read_item.dest_index.fqn in self._stored:
            self._stored[read_item.dest_index.fqn].put(self._values)


class Recut:
    """Tensors of cut parameters as rows over `tp`: copies, to be put back after they have been loaded into.

    `stored` collects, by name, what the planners are to make or to put back.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stored: dict[str, Stored] = {}
        self._pending: list[tuple[Parameter, Tensor | Stored, DTensor]] = []

    def logical(self, entry: Parameter, local: Tensor | Stored, name: str) -> Tensor:
        """Return a tensor of which this rank holds `local` as what a checkpoint calls `name`; every rank must call it."""
        if entry.cut is not None:
            return self.rows(entry, local)
        if isinstance(local, Stored):
            self.stored[name] = local
            local = torch.zeros((), dtype=local.dtype).expand(local.shape)
        return as_dtensor(local, entry, self.engine.ranks) if entry.sharded else local

    def rows(self, entry: Parameter, local: Tensor | Stored) -> Tensor:
        """Return this rank's rows of the whole tensor of which it holds `local`; every rank must call it."""
        whole = gather_rows(entry, local.get() if isinstance(local, Stored) else local, self.engine.ranks)
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
            part = entry.local(made.full_tensor())
            if isinstance(local, Stored):
                local.put(part)
            else:
                local.copy_(part)


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
            name = f"model.{entry.name}"
            tensors[name] = recut.logical(entry, entry.stored or entry.master.detach(), name)
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


def optimizer_tensors(engine: Engine, recut: Recut) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return this rank's optimizer states: tensors by `optimizer.NAME.STATE`, and plain numbers by the same names."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for entry in engine.bound.entries if engine.bound else []:
        assert engine.bound is not None
        for key, value in engine.bound.states(entry).items():
            name = f"optimizer.{entry.name}.{key}"
            if isinstance(value, Stored) or (isinstance(value, Tensor) and _in_parts(engine, entry, value.shape)):
                tensors[name] = recut.logical(entry, value, name)
            elif isinstance(value, Tensor):
                tensors[name] = value
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
    bound = engine.bound
    assert bound is not None
    by_parameter: dict[str, list[str]] = {}
    for name in (*saved, *numbers):
        if name.startswith("optimizer."):
            by_parameter.setdefault(name.rpartition(".")[0], []).append(name)
    tensors: dict[str, Tensor] = {}
    for entry in bound.entries:
        parameter = bound.of(entry)
        if parameter is None:
            continue
        bound.forget(entry)
        small: dict[str, Any] = {}
        names = by_parameter.get(f"optimizer.{entry.name}", ())
        for name in names:
            key = name.rpartition(".")[2]
            if name in numbers:
                small[key] = numbers[name]
                continue
            shape, dtype = saved[name]
            if bound.of_its_shape(entry, key, shape):
                value = bound.empty_state(entry, key, dtype)
                tensors[name] = recut.logical(entry, value, name)
                if isinstance(value, Tensor):
                    small[key] = value
            else:
                small[key] = tensors[name] = torch.zeros(shape, dtype=dtype, device=_device_of(engine, entry, shape))
        if names:
            bound.begin(entry, small)
    return tensors


def _device_of(engine: Engine, entry: Parameter, shape: torch.Size) -> torch.device:
    """Return where torch's optimizers keep a whole state: step counts on the CPU, unless the update runs as one kernel."""
    assert engine.bound is not None
    parameter = engine.bound.of(entry)
    group = next(g for g in engine.bound.torch.param_groups if any(p is parameter for p in g["params"]))
    on_device = bool(shape) or group.get("fused") or group.get("capturable")
    return engine.ranks.device if on_device else torch.device("cpu")
