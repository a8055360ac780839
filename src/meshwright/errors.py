"""The exceptions that meshwright raises.

Every message is one sentence with the value, the reason and the nearest value that works. A `MeshwrightError` is a user's
mistake unless its class says otherwise; the command line prints it without a traceback.
"""

from __future__ import annotations


class MeshwrightError(Exception):
    """Base of everything that meshwright raises on purpose; `exit_code` is what the command line exits with."""

    exit_code = 2


class PlanError(MeshwrightError):
    """A plan that can't be parsed, does not fit the ranks at hand, or asks for something that is not available."""


class ConfigError(MeshwrightError):
    """A wrong key or value in a configuration file, on the command line, or in a call."""


class DataError(MeshwrightError):
    """Data that is missing, too small, or of the wrong shape."""


class ModelError(MeshwrightError):
    """A model that can't be built, captured, initialised or sharded as asked."""


class CheckpointError(MeshwrightError):
    """A checkpoint that is missing, incomplete, or does not match the model."""


class SaveError(CheckpointError):
    """A checkpoint that can't be written, because of the disk."""

    exit_code = 1


class TrainingError(MeshwrightError):
    """A run that had to stop: a non-finite gradient, a rank that failed."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What somebody else's exception says, as part of one line of ours."""
    return next(iter(str(error).strip().splitlines()), "it gives no reason").strip()
