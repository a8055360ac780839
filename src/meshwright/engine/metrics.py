"""What a step reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Metrics:
    """What one step (or evaluation) found; the same on every rank.

    `loss` is the mean over the global batch's `items`; `grad_norm` is taken before clipping. `skipped` says that the weights
    were left as they were, because a gradient was not finite. `loss_scale` is 1 except under fp16.
    """

    step: int
    loss: float
    items: int
    grad_norm: float = 0.0
    lr: float = 0.0
    skipped: bool = False
    loss_scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)
