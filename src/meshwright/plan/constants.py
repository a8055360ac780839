"""The calibration constants of `constants.toml`, and how a benchmark may try others."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any


@cache
def constants() -> dict[str, dict[str, Any]]:
    """Every table of the data file; to be read, not written."""
    return tomllib.loads(resources.files("meshwright.plan").joinpath("constants.toml").read_text())


@contextlib.contextmanager
def tried(changes: dict[str, float]) -> Iterator[None]:
    """Run a block with other constants (`"hopper.rate": 0.8`): for calibration and sensitivity only, not for threads."""
    before = {name: dict(table) for name, table in constants().items()}
    try:
        for name, value in changes.items():
            family, _, key = name.partition(".")
            constants()[family][key] = value
        yield
    finally:
        for name, table in before.items():
            constants()[name].clear()
            constants()[name].update(table)
