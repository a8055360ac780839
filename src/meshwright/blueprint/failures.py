"""Why a model can't be captured, in one sentence: which module, which line of the user's code, and what to do about it."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

import torch

from meshwright._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from meshwright.errors import ModelError


class ReadsComputed(Exception):
    """Python reads, or a size depends on, a value that was chosen among computed ones."""


class OwnBackward(Exception):
    """A tensor's backward is an autograd function of the user's, which only its module knows; named by its node."""


def capture_error(error: BaseException, module: str) -> ModelError:
    """The `ModelError` for an exception raised while `module` (a path, empty for the root) ran on fake tensors."""
    place = f"module {module!r}" if module else "the model's root module"
    return ModelError(f"{place} can't be captured: {_line(error)} {_reason(error)}")


def _reason(error: BaseException) -> str:
    if isinstance(error, OwnBackward):
        name = str(error).removesuffix("Backward")
        return (
            f"uses the autograd function {name}, whose backward is no op: call it inside a submodule, which then runs as it is, "
            "or (for checkpoint) pass use_reentrant=False"
        )
    if isinstance(error, DataDependentOutputException | ReadsComputed):
        return (
            "reads the value of a computed tensor, which has none during a capture; "
            "compute it from shapes or integer inputs, or use torch.where in place of the branch"
        )
    if isinstance(error, DynamicOutputShapeException):
        return (
            f"makes a tensor whose size depends on computed values ({error.func}); "
            "use a mask or torch.where with a fixed size in its place"
        )
    if isinstance(error, UnsupportedOperatorException):
        return (
            f"calls {error.func}, which has no fake kernel; register one with torch.library.register_fake, "
            "or plan with data parallelism and ZeRO only, which need no capture"
        )
    text = " ".join(str(error).split())
    if "fake" in text.lower() and "kernel" in text.lower():
        return "calls a custom op that has no fake kernel; register one with torch.library.register_fake"
    return f"raised {type(error).__name__} ({text[:200]}); check that the batch is what the model's forward expects"


def _line(error: BaseException) -> str:
    """The innermost line that is the user's own, else the innermost that is not torch's or meshwright's."""
    frames = traceback.extract_tb(error.__traceback__)
    torch_home, own_home = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
    # What comes before the walk is the caller of `inspect`, not the model.
    began = next((place for place, frame in enumerate(frames) if frame.filename.startswith(own_home)), 0)
    inside = [frame for frame in frames[began:] if not frame.filename.startswith((torch_home, own_home, "<"))]
    users = [frame for frame in inside if "site-packages" not in frame.filename] or inside
    if not users:
        return "it"
    frame = users[-1]
    source = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno} `{source}`"
