"""How right predictions were on this machine: one line of JSON for each finished run, in the user's cache."""

from __future__ import annotations

import contextlib
import json
import statistics
from typing import Any

from meshwright.cluster.probe import cache_file


def remember(line: dict[str, Any]) -> None:
    """Append one run's predicted and measured values; a cache that can't be written is no reason to fail a run."""
    path = cache_file().with_name("history.jsonl")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def recall() -> list[dict[str, Any]]:
    """Every remembered run, oldest first; lines that are not JSON are left out."""
    path = cache_file().with_name("history.jsonl")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def errors(runs: list[dict[str, Any]], what: str) -> float | None:
    """The median absolute relative error of `what` (`seconds` or `bytes`); None if no run has both values."""
    pairs = [(run[f"predicted_{what}"], run[f"measured_{what}"]) for run in runs if run.get(f"measured_{what}")]
    return statistics.median(abs(p / m - 1) for p, m in pairs) if pairs else None
