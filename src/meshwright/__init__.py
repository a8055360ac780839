"""meshwright: any PyTorch module under any mix of parallelism, with the same numbers as on one device."""

from meshwright import losses
from meshwright.engine import Engine, Metrics, parallelize
from meshwright.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MeshwrightError,
    ModelError,
    PlanError,
    TrainingError,
)
from meshwright.plan import Plan

__all__ = [
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
    "losses",
    "parallelize",
]
