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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from meshwright.checkpoint.folders import STATE
from meshwright.checkpoint.tensors import Recut, SavePlanner, model_tensors, optimizer_tensors
from meshwright.errors import CheckpointError, SaveError, first_line
from meshwright.parallel.parameters import Stored

_NUMBERS = "numbers"
_FULL = 1 << 20
"""Bytes: with less than that left nothing of a checkpoint can be written."""

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine


def save(engine: Engine, path: Path, extra: dict[str, Any]) -> None:
    """Save `engine` as the folder `path`; every rank must call it, with one `path`. See `Engine.save`.

    Raises `CheckpointError` on every rank if it can't be written; then `path` is as it was before.
    """
    path = path.absolute()
    partial = path.with_name(path.name + ".partial") if path.name else path
    problem, kind = "", CheckpointError
    try:
        tensors, stored, state = _contents(engine, extra)
        if engine.ranks.rank == 0:
            _make_room(path, partial)
    except (TypeError, ValueError) as error:
        problem = first_line(error)
    except OSError as error:
        problem, kind = _cause(error, path), SaveError
    _agree(engine, path, problem, kind)
    try:
        writer = dcp.FileSystemWriter(partial / "tensors", sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a single process saves alone
            dcp.save(tensors, storage_writer=writer, planner=SavePlanner(stored), no_dist=engine.ranks.mesh is None)
        (partial / f"{_NUMBERS}-{engine.ranks.rank}.json").write_text(json.dumps(state.pop("numbers")))
    except (OSError, dcp.CheckpointException) as error:
        problem = _cause(error, path)
    _agree(engine, path, problem, SaveError)
    try:
        if engine.ranks.rank == 0:
            _finish(partial, path, state)
    except OSError as error:
        problem = _cause(error, path)
    _agree(engine, path, problem, SaveError)


def _contents(engine: Engine, extra: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Stored], dict[str, Any]]:
    """Return the tensors, those of them that are to be made when they are written, and everything else as JSON values.

    Raises `TypeError` for what JSON can't hold."""
    recut = Recut(engine)
    tensors, numbers = optimizer_tensors(engine, recut)
    tensors |= model_tensors(engine, recut, to_save=True)
    scale = engine.loss_scale
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups] if engine.bound else []
    state = {
        "format": "meshwright-dcp-1",
        "plan": str(engine.plan),
        "steps": engine.steps,
        "last_norm": engine.in_backward.last_norm if engine.in_backward else None,
        "loss_scale": {"value": scale.value, "good_steps": scale.good_steps, "dynamic": scale.dynamic},
        "names": {entry.name: list(entry.names) for entry in engine.table},
        "optimizer": {"class": type(engine.optimizer).__name__ if engine.bound else None, "groups": groups},
        "extra": extra,
        "numbers": numbers,  # of this rank's optimizer states
    }
    # A learning rate may be a tensor; it is a number here.
    text = json.dumps(state, default=lambda value: value.item() if isinstance(value, Tensor) else json.JSONEncoder().default(value))
    loaded: dict[str, Any] = json.loads(text)
    return tensors, recut.stored, loaded


def _make_room(path: Path, partial: Path) -> None:
    """Refuse to replace what is no checkpoint, and clear what an interrupted save left."""
    if not path.name or (path.exists() and not (path / STATE).is_file() and (not path.is_dir() or any(path.iterdir()))):
        raise ValueError("something that is no checkpoint stands there already")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(_old(path), ignore_errors=True)
    partial.mkdir(parents=True)


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old.partial")


def _finish(partial: Path, path: Path, state: dict[str, Any]) -> None:
    """Write what makes it a checkpoint, and put it in its place."""
    numbers: dict[str, Any] = {}
    for part in partial.glob(f"{_NUMBERS}-*.json"):
        numbers |= json.loads(part.read_text())
        part.unlink()
    state["optimizer"]["numbers"] = numbers
    with (partial / STATE).open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, _old(path))
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    shutil.rmtree(_old(path), ignore_errors=True)


def _cause(error: OSError | dcp.CheckpointException, path: Path) -> str:
    """What went wrong, in words: torch wraps each rank's error with its traceback. Ctrl-C is passed on as what it is."""
    inner: BaseException = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
    if isinstance(inner, KeyboardInterrupt):
        raise KeyboardInterrupt from error
    reason = inner.strerror if isinstance(inner, OSError) and inner.strerror else f"{type(inner).__name__}: {first_line(inner)}"
    folder = next(parent for parent in path.parents if parent.exists())
    if shutil.disk_usage(folder).free < _FULL:  # torch's writer has words of its own for that
        reason = "the disk is full; free some and resume"
    return f"{reason} (checkpoints from before are intact)"


def _agree(engine: Engine, path: Path, problem: str, kind: type[CheckpointError]) -> None:
    """Meet all ranks; if one of them has a problem, clean up and raise on every one."""
    failed = torch.tensor(float(bool(problem)), device=engine.ranks.device)
    if engine.ranks.mesh is not None:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)  # 4 bytes over every rank
    if failed.item():
        if engine.ranks.rank == 0 and path.name:
            shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
        raise kind(f"the checkpoint {path} can't be written: {problem or 'another rank failed'}")
