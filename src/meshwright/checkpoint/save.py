"""`save`: a checkpoint is written beside its place and renamed into it, so it is complete or absent.

The bytes are written by `torch.distributed.checkpoint` (every rank its own part, replicas once); this file decides what is in a
checkpoint and when it counts.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from meshwright.checkpoint.folders import STATE
from meshwright.checkpoint.tensors import model_tensors, optimizer_tensors
from meshwright.errors import CheckpointError

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine


def save(engine: Engine, path: Path, extra: dict[str, Any]) -> None:
    """Save `engine` as the folder `path`; every rank must call it, with one `path`. See `Engine.save`.

    Raises `CheckpointError` on every rank if it can't be written; then `path` is as it was before.
    """
    partial = path.with_name(path.name + ".partial")
    tensors, numbers = optimizer_tensors(engine)
    tensors |= model_tensors(engine)
    leads = engine.ranks.rank == 0
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
    _meet(engine)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        writer = dcp.FileSystemWriter(partial / "tensors", sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a single process saves alone
            dcp.save(tensors, storage_writer=writer, no_dist=engine.ranks.mesh is None)
        if leads:
            _finish(engine, partial, path, numbers, extra)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the checkpoint {path} can't be written: {str(error).splitlines()[0]}") from error
    _meet(engine)


def _finish(engine: Engine, partial: Path, path: Path, numbers: dict[str, Any], extra: dict[str, Any]) -> None:
    scale = engine.loss_scale
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups] if engine.bound else []
    state = {
        "format": "meshwright-dcp-1",
        "plan": str(engine.plan),
        "steps": engine.steps,
        "loss_scale": {"value": scale.value, "good_steps": scale.good_steps},
        "names": {entry.name: list(entry.names) for entry in engine.table},
        "optimizer": {"class": type(engine.optimizer).__name__ if engine.bound else None, "groups": groups, "numbers": numbers},
        "extra": extra,
    }
    with (partial / STATE).open("w") as file:
        json.dump(state, file, default=str)
        file.flush()
        os.fsync(file.fileno())
    old = path.with_name(path.name + ".old.partial")
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    shutil.rmtree(old, ignore_errors=True)


def _meet(engine: Engine) -> None:
    if engine.ranks.mesh is not None:
        dist.barrier()
