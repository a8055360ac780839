"""One training step on any mesh."""

from meshwright.engine.engine import Engine
from meshwright.engine.entry import parallelize
from meshwright.engine.metrics import Metrics

__all__ = ["Engine", "Metrics", "parallelize"]
