"""One training step on any mesh."""

from meshwright.engine.engine import Engine, Metrics, parallelize

__all__ = ["Engine", "Metrics", "parallelize"]
