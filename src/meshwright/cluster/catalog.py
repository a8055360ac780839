"""The catalog of known devices: peak rates by dtype, each with its source (`catalog.toml`).

A device or dtype that is not in the catalog has no peak: nothing ever falls back to another device's.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any


@cache
def _devices() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("meshwright.cluster").joinpath("catalog.toml").read_text())


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense peak in FLOP/s of a device (as the driver names it) for a dtype such as `bfloat16`; None if unknown."""
    for entry in _devices().values():
        if any(name in device_name for name in entry["driver_names"]):
            peak = entry["peak_tflops"].get(dtype)
            return None if peak is None else float(peak) * 1e12
    return None
