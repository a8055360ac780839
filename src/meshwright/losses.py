"""Loss functions that know how many items they average over, so that any split of a batch gives the single-device mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from meshwright.errors import DataError

IGNORED = -100
"""Labels of this value are not counted (the default of `torch.nn.functional.cross_entropy`)."""


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, Mapping) and "labels" in batch:
        found = batch["labels"]
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    else:
        raise DataError("mw.losses.cross_entropy finds labels in batch['labels'] or batch[1], and this batch has neither")
    assert isinstance(found, Tensor)
    return found


def cross_entropy(output: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy over the labels that are not `IGNORED`, in nats; a scalar.

    `output` is logits `[..., V]` or an object with `.logits`; labels `[...]` are `batch["labels"]` or `batch[1]`, and each is
    the target of the output at its own position (shift before, not here). `cross_entropy.count(batch)` counts them.
    """
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, -2), _labels(batch).flatten(), ignore_index=IGNORED)


def _count(batch: Any) -> int:
    return int((_labels(batch) != IGNORED).sum())


cross_entropy.count = _count  # type: ignore[attr-defined]
