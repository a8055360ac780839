"""meshwright: any PyTorch module under any mix of parallelism, with the same numbers as on one device.

Names are imported when they are first used: `import meshwright` costs no more than `import torch`, and starts nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from meshwright.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MeshwrightError,
    ModelError,
    PlanError,
    TrainingError,
)

if TYPE_CHECKING:
    from meshwright import losses
    from meshwright.blueprint.inspection import inspect
    from meshwright.blueprint.record import Blueprint
    from meshwright.engine import Engine, Metrics, parallelize
    from meshwright.plan import Plan

_HOMES = {
    "Blueprint": "meshwright.blueprint.record",
    "Engine": "meshwright.engine",
    "Metrics": "meshwright.engine",
    "Plan": "meshwright.plan",
    "inspect": "meshwright.blueprint.inspection",
    "parallelize": "meshwright.engine",
}

__all__ = [
    "Blueprint",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Engine",
    "MeshwrightError",
    "Metrics",
    "ModelError",
    "Plan",
    "PlanError",
    "TrainingError",
    "inspect",
    "losses",
    "parallelize",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("meshwright.losses")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'meshwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
