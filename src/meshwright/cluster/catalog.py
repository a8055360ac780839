"""The catalog of known devices: peak rates, memory, links and prices, each with its source (`catalog.toml`).

A device or dtype that is not in the catalog has no peak: nothing ever falls back to another device's.
"""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib import resources
from typing import Any

from meshwright.errors import ConfigError


@cache
def devices() -> dict[str, dict[str, Any]]:
    """Every entry of the catalog by its name; read-only."""
    return tomllib.loads(resources.files("meshwright.cluster").joinpath("catalog.toml").read_text())


def find(name: str) -> tuple[str, dict[str, Any]]:
    """The entry for a name such as `A100-80GB` or `H100` (upper and lower case are one). Raises `ConfigError`."""
    names = {known.lower(): known for known in devices()}
    names |= {alias.lower(): known for known, entry in devices().items() for alias in entry.get("aliases", ())}
    found = names.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.0)
        told = " or ".join(dict.fromkeys(repr(names[each]) for each in near))
        raise ConfigError(f"unknown device {name!r}: the nearest are {told}; `intra=`, `inter=` or a TOML file describe others")
    return found, devices()[found]


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense peak in FLOP/s of a device (as the driver names it) for a dtype such as `bfloat16`; None if unknown."""
    found = by_driver_name(device_name)
    if found is None or found == "CPU":
        return None
    peak = devices()[found]["peak_tflops"].get(dtype)
    return None if peak is None else float(peak) * 1e12


def by_driver_name(device_name: str) -> str | None:
    """The catalog's name of a device as the driver names it; None if unknown."""
    for known, entry in devices().items():
        if any(name in device_name for name in entry["driver_names"]):
            return known
    return None
