"""A step's micro-batches through a pipeline: what the engine does in place of one forward and backward after another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meshwright.engine.batch import to_device
from meshwright.engine.randomness import seeded

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine


def flow(engine: Engine, parts: list[Any], counts: list[int], share: Callable[[int], float]) -> list[tuple[Tensor, int]]:
    """Take the micro-batches that have items through the pipeline; gradients are left in the parameters.

    Returns (loss, items) of each on the rank of the last stage, nothing elsewhere. `share(items)` is what a loss is multiplied by.
    """
    pipeline = engine.pipeline
    assert pipeline is not None
    device = engine.ranks.device
    there = [(to_device(part, device), int(count)) for part, count in zip(parts, counts, strict=True) if count]
    batches, weights = [part for part, _ in there], [share(count) for _, count in there]
    losses = pipeline.run("loss", engine.compute_loss, batches, weights, _place(engine), backward=True)
    return [(loss, count) for loss, (_, count) in zip(losses, there, strict=False)]


def loss_without_backward(engine: Engine, batch: Any) -> Tensor:
    """Return the loss of a batch on the rank of the last stage, and zero elsewhere."""
    assert engine.pipeline is not None
    losses = engine.pipeline.run("loss", engine.compute_loss, [batch], [1.0], _place(engine), backward=False)
    found: Tensor = losses[0] if losses else torch.zeros((), device=engine.ranks.device)
    return found


def output_without_backward(engine: Engine, batch: Any) -> Any:
    """Return the model's output for a batch on every rank of the pipeline, all of which must give the same batch."""
    assert engine.pipeline is not None
    return engine.pipeline.output(engine.call_model, batch, _place(engine))


def _place(engine: Engine) -> Callable[[int, int], AbstractContextManager[None]]:
    """Each stage of each micro-batch draws its own random numbers."""
    return lambda stage, m: seeded(engine.ranks.device, engine.seed, engine.steps, m, engine.data_rank, stage)
