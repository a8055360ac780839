"""Where a run's checkpoints lie: `checkpoints/step-N`, of which a complete one has a `state.json`."""

from __future__ import annotations

import shutil
from pathlib import Path

STATE = "state.json"
"""Written last: a folder without it is not a checkpoint."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"step-{step}"


def complete(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    found = [path for path in checkpoints.glob("step-*") if path.name[5:].isdigit() and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint, None if there is none."""
    found = complete(checkpoints)
    return found[-1] if found else None


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all complete checkpoints but the newest `keep`, and whatever an interrupted save left behind."""
    for path in complete(checkpoints)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints.glob("*.partial"):
        shutil.rmtree(path, ignore_errors=True)
