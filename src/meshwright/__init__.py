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
    from meshwright.cluster import Cluster
    from meshwright.engine import Engine, Metrics, parallelize
    from meshwright.plan import Plan
    from meshwright.plan.predict import predict
    from meshwright.plan.prediction import Prediction
    from meshwright.plan.search import Search, search

_HOMES = {
    "Blueprint": "meshwright.blueprint.record",
    "Cluster": "meshwright.cluster",
    "Engine": "meshwright.engine",
    "Metrics": "meshwright.engine",
    "Plan": "meshwright.plan",
    "Prediction": "meshwright.plan.prediction",
    "Search": "meshwright.plan.search",
    "inspect": "meshwright.blueprint.inspection",
    "parallelize": "meshwright.engine",
    "predict": "meshwright.plan.predict",
    "search": "meshwright.plan.search",
}

__all__ = [
    "Blueprint",
    "CheckpointError",
    "Cluster",
    "ConfigError",
    "DataError",
    "Engine",
    "MeshwrightError",
    "Metrics",
    "ModelError",
    "Plan",
    "PlanError",
    "Prediction",
    "Search",
    "TrainingError",
    "inspect",
    "losses",
    "parallelize",
    "predict",
    "search",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("meshwright.losses")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'meshwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
