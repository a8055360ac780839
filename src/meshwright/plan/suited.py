"""Makes a blueprint fit what it is predicted for: the kernels of the cluster's devices, and the dtype that runs.

A blueprint of a model spec is captured again where it was captured for another device or dtype (the spec is its name); one of a
user's module can't be, and its bytes are scaled to the dtype instead.
"""

from __future__ import annotations

from typing import Any

import torch

from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.record import Blueprint
from meshwright.blueprint.spec import FAMILIES, ModelSpec, parse_spec, presets
from meshwright.cluster import Cluster
from meshwright.errors import ConfigError
from meshwright.plan.time import COMPUTE


def check_subjects(blueprint: Any, cluster: Any, global_batch: Any) -> None:
    """Raise `ConfigError` for arguments that neither `predict` nor `search` can take."""
    made = {
        "blueprint": (blueprint, Blueprint, "mw.inspect(model, batch)"),
        "cluster": (cluster, Cluster, "mw.Cluster.parse(text)"),
    }
    for name, (value, kind, how) in (made | {"global_batch": (global_batch, int, "a whole number")}).items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{name} must be {how}, not {repr(value)[:60]}")
    if global_batch < 1:
        raise ConfigError(f"global_batch={global_batch} must be at least 1")


def spec_of(blueprint: Blueprint) -> ModelSpec | None:
    """The spec that a blueprint was made from, None for a user's module."""
    text = blueprint.model
    if text in presets() or text.partition(":")[0] in FAMILIES:
        return parse_spec(text)
    return None


def run_mode(blueprint: Blueprint, compiled: bool) -> str:
    """`compiled`, or what the spec's `kernels=` says: `eager` or `fused`."""
    if compiled:
        return "compiled"
    kept: dict[str, Any] = blueprint.__dict__.setdefault("_mode", {})
    if "mode" not in kept:
        spec = spec_of(blueprint)
        kept["mode"] = spec.config.kernels if spec is not None and spec.config is not None else "eager"
    return str(kept["mode"])


def suited(blueprint: Blueprint, cluster: Cluster, precision: str) -> Blueprint:
    """The blueprint with the kernels of the cluster's devices in the dtype that runs, if its spec is known; else as it is."""
    device = "cpu" if cluster.device.kernels == "cpu" else "cuda"
    dtype = COMPUTE[precision]
    if (blueprint.device, blueprint.dtype) == (device, dtype):
        return blueprint
    kept: dict[Any, Blueprint] = blueprint.__dict__.setdefault("_suited", {})
    if (device, dtype) not in kept:
        spec = spec_of(blueprint)
        if spec is None:
            return blueprint
        kept[device, dtype] = inspect(spec, seq=blueprint.sequence, dtype=getattr(torch, dtype), device=device)
    return kept[device, dtype]
