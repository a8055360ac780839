"""`load`: reads a checkpoint that was saved under any plan into an engine under any other."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from meshwright.checkpoint.folders import STATE
from meshwright.checkpoint.tensors import LoadPlanner, Recut, empty_optimizer_states, model_shapes, model_tensors
from meshwright.errors import CheckpointError

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine


def load(engine: Engine, path: Path) -> dict[str, Any]:
    """Load the checkpoint folder `path` into `engine`; every rank must call it. Returns the `extra` that was saved.

    Raises `CheckpointError` if it is missing, incomplete, or of another model or optimizer, before anything is changed; and if
    its tensors turn out to be damaged while they are read.
    """
    state, reader, saved = _read(path)
    recut = Recut(engine)
    tensors = model_tensors(engine, recut)
    _compare(path, model_shapes(engine), {n: s for n, (s, _) in saved.items()})
    with_optimizer = engine.bound is not None and state["optimizer"]["class"] is not None
    if with_optimizer:
        _compare_groups(engine, path, state["optimizer"])
        tensors |= empty_optimizer_states(engine, saved, state["optimizer"]["numbers"], recut)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch warns that a single process loads alone
            dcp.load(tensors, storage_reader=reader, planner=LoadPlanner(recut.stored), no_dist=engine.ranks.mesh is None)
            recut.put_back()
    except (OSError, RuntimeError, ValueError, dcp.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{path} is damaged, and this engine's state is now undefined: {reason}") from error
    if with_optimizer:
        _restore_groups(engine, state["optimizer"]["groups"])
    engine.adopt(state["steps"], state["loss_scale"], state.get("last_norm"))
    extra = state["extra"]
    assert isinstance(extra, dict)
    return extra


def _read(path: Path) -> tuple[dict[str, Any], dcp.FileSystemReader, dict[str, tuple[torch.Size, torch.dtype]]]:
    """Return a checkpoint's state, a reader of its tensors, and their shapes and dtypes by name."""
    try:
        state = json.loads((path / STATE).read_text())
        reader = dcp.FileSystemReader(path / "tensors")
        entries = reader.read_metadata().state_dict_metadata
        if state["format"] != "meshwright-dcp-1":
            raise ValueError(state["format"])
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"{path} is not a complete checkpoint: {STATE} or its tensors are missing or damaged") from error
    found = {
        name: (entry.size, entry.properties.dtype) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
    }
    return state, reader, found


def _compare(path: Path, ours: dict[str, torch.Size], saved: dict[str, torch.Size]) -> None:
    theirs = {name: shape for name, shape in saved.items() if name.startswith("model.")}
    for name in sorted(ours.keys() ^ theirs.keys()):
        where = "the checkpoint" if name in theirs else "the model"
        raise CheckpointError(f"{path} is of another model: {name.removeprefix('model.')!r} is only in {where}")
    for name, shape in ours.items():
        if shape != theirs[name]:
            found, wanted = list(theirs[name]), list(shape)
            raise CheckpointError(
                f"{path} is of another model: {name.removeprefix('model.')!r} has shape {found} there and {wanted} here"
            )


def _compare_groups(engine: Engine, path: Path, saved: dict[str, Any]) -> None:
    optimizer = engine.optimizer
    if saved["class"] != type(optimizer).__name__ or len(saved["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{path} was saved with {saved['class']} over {len(saved['groups'])} parameter groups, "
            f"but this engine has {type(optimizer).__name__} over {len(optimizer.param_groups)}"
        )


def _restore_groups(engine: Engine, groups: list[dict[str, Any]]) -> None:
    """Give the optimizer the hyperparameters of the checkpoint; one that is a tensor here stays one."""
    for group, values in zip(engine.optimizer.param_groups, groups, strict=True):
        for key, value in values.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            elif key in group:
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
