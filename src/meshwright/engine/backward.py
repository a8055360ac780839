"""`update=backward`: each weight is updated as soon as its reduced gradient is whole, and the gradient freed.

The number of items of the global batch is agreed on before the forward (8 bytes over every rank), so gradients have their final
scale as they come. What an update needs to know of all gradients (the norm, whether they are finite) comes, by the plan's `clip`:

- `exact`: not at all; only without `clip_grad_norm`.
- `delayed`: from the step before. The first step of an engine that was not resumed is made in two passes.
- `two_pass`: from a first forward and backward whose gradients are dropped; the model is put back, and the second draws the same
  random numbers, so the numbers are those of `update=step`, for twice the compute.

Non-finite gradients: in two passes they are seen before anything is updated, and `on_nonfinite` means what it always does. In
one pass the first group of parameters whose gradient is not finite and all that come after it in the backward stay as they were;
those before have been updated. `stop` then raises and asks for the last checkpoint, `skip` counts the step as skipped and goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from meshwright.blueprint.running import unchanged
from meshwright.engine import norm
from meshwright.engine.metrics import Metrics
from meshwright.errors import ConfigError, DataError, MeshwrightError, PlanError, TrainingError
from meshwright.parallel import fsdp
from meshwright.parallel.apply import average_batch_norms
from meshwright.parallel.parameters import Parameter
from meshwright.parallel.partitioned import sum_parts

if TYPE_CHECKING:
    from meshwright.engine.engine import Engine
    from meshwright.engine.stored import StoredOptimizer
    from meshwright.plan import Plan


def check_clip(plan: Plan, clip_grad_norm: float | None) -> None:
    """Raise `ConfigError` for a norm that is none, `PlanError` for one that is not known when weights are updated."""
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ConfigError(f"clip_grad_norm={clip_grad_norm} must be greater than 0, or None for no clipping")
    if plan.update == "backward" and plan.clip == "exact" and clip_grad_norm is not None:
        raise PlanError(
            "update=backward has updated most weights before the norm of all gradients is known: add clip=two_pass (the same "
            "numbers for twice the compute) or clip=delayed (the last step's norm), or leave clip_grad_norm out"
        )


class InBackward:
    """The steps of an engine under `update=backward`. `last_norm` is the gradient norm of the latest one, None before."""

    def __init__(self, engine: Engine, optimizer: StoredOptimizer) -> None:
        """Have the buckets and FSDP2's units report to this."""
        self._engine, self._optimizer = engine, optimizer
        self.last_norm: float | None = None
        self._measuring = self._stopped = False
        self._coefficient = 1.0
        self._used: frozenset[int] | None = None  # by any rank, of FSDP2's; None until a first pass has said so
        self._square = torch.zeros((), dtype=torch.float64, device=engine.ranks.device)
        applied = engine._applied
        if applied.buckets is not None:
            applied.buckets.ready = self._ready
        self.units = None if applied.root is None else fsdp.Reduced(applied.root, applied.sharded, self._ready)

    def step(self, parts: list[Any], counts: list[int]) -> Metrics:
        """Run one step on this rank's micro-batches; every rank must call it."""
        engine = self._engine
        self._agree_on_items(sum(counts))
        limit, clip = engine._settings.clip_grad_norm, engine.plan.clip
        self._used, self._coefficient = None, 1.0
        scale = engine.loss_scale.value
        if clip == "two_pass" or (clip == "delayed" and self.last_norm is None):
            _, raw_norm = self._measure(parts, counts)
            found = raw_norm / scale
            if not math.isfinite(found):
                return self._not_finite(parts, counts, found)
            self._coefficient = norm.clip_coefficient(found, limit) / scale
        elif clip == "delayed" and self.last_norm is not None:
            self._coefficient = norm.clip_coefficient(self.last_norm, limit)
        if engine._settings.lr_schedule is not None:
            self._optimizer.scale_rates(engine._settings.lr_schedule(engine.steps))
        loss, raw_norm = self._pass(parts, counts)
        found = raw_norm / scale
        if self._stopped and engine._settings.on_nonfinite == "stop":
            raise TrainingError(
                f"step {engine.steps}: the gradient norm is {found} (loss {loss:.4g}), and with update=backward the weights whose "
                "gradients came first are updated: resume from the last checkpoint with a lower learning rate, or use clip=two_pass"
            )
        return self._finish(loss, found, skipped=self._stopped)

    def abandon(self) -> None:
        """After an exception in mid-step: have nothing under way."""
        with suppress(MeshwrightError):
            self._optimizer.settle()

    def _not_finite(self, parts: list[Any], counts: list[int], found: float) -> Metrics:
        """Nothing has been updated: stop, or leave the step out."""
        engine = self._engine
        overflow = engine.loss_scale.dynamic and engine.loss_scale.value > 1.0
        if engine._settings.on_nonfinite == "stop" and not overflow:
            raise TrainingError(
                f"step {engine.steps}: the gradient norm is {found}; the weights are as before the step: lower the learning rate, "
                "look at the batch, or set on_nonfinite=skip"
            )
        return self._finish(self._loss, found, skipped=True)

    def _finish(self, loss: float, found: float, skipped: bool) -> Metrics:
        engine = self._engine
        engine.loss_scale.update(not skipped)
        average_batch_norms(engine._applied.batch_norms, engine.ranks)
        if not skipped:
            self.last_norm = found
        rate = self._optimizer.torch.param_groups[0]["lr"]
        metrics = Metrics(engine.steps, loss, round(self._items), found, rate, skipped, engine.loss_scale.value)
        engine.steps += not skipped
        return metrics

    def _agree_on_items(self, count: int) -> None:
        engine = self._engine
        total = torch.tensor(float(count) * engine.ranks.speaks, dtype=torch.float64, device=engine.ranks.device)
        if engine.ranks.mesh is not None:
            dist.all_reduce(total)  # 8 bytes over every rank
        self._items = total.item()
        if self._items == 0:
            raise DataError(f"step {engine.steps}: no rank has an item to train on")
        engine._expected = self._items

    def _measure(self, parts: list[Any], counts: list[int]) -> tuple[float, float]:
        """Make a pass whose gradients are dropped; return the loss and the norm, and leave the model as it was."""
        engine = self._engine
        self._measuring = True
        try:
            with unchanged(engine.module):
                self._loss, found = self._pass(parts, counts)
        finally:
            self._measuring = False
        self._used = frozenset(id(entry) for entry in engine._applied.sharded if entry.used)
        return self._loss, found

    def _pass(self, parts: list[Any], counts: list[int]) -> tuple[float, float]:
        """Run every micro-batch forward and backward; return the loss of the global batch and the norm of what was reduced."""
        engine = self._engine
        engine._clear()
        self._stopped = False
        self._square.zero_()
        for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
            last = index == len(parts) - 1
            if self.units is not None:
                self.units.begin(last)
            if engine._applied.parked is not None:
                engine._applied.parked.keep = last and not self._measuring
            engine._micro_step(part, int(count), last)
            if self.units is not None:
                self.units.flush()
        self._optimizer.settle()
        engine._applied.agree(engine.ranks)
        sums = engine._sums * engine.ranks.speaks
        found = [*fsdp.trail(engine._applied.root), *(float(entry.used) for entry in engine._applied.sharded)]
        mine = torch.cat([sums, self._square[None], torch.tensor(found, dtype=torch.float64, device=sums.device)])
        if engine.ranks.mesh is not None:
            dist.all_reduce(mine)  # 8 * (5 + parameters) bytes over every rank
        loss, _, square, total, squares, *users = mine.tolist()
        fsdp.refuse_other_trails(total, squares, engine.ranks.world_size)
        for entry, users_of_it in zip(engine._applied.sharded, users, strict=True):
            entry.used = users_of_it > 0
        used = {id(entry): entry.used for entry in engine._applied.sharded}
        engine._clear()
        for entry in engine._applied.sharded:
            entry.used = used[id(entry)]
        return loss / self._items, math.sqrt(square) if not math.isnan(square) else math.nan

    def _ready(self, entries: list[Parameter]) -> Callable[[], None] | None:
        """Use up the gradients of entries that are whole; every rank reports the same entries in the same order.

        Returns None once their weights are new, else what waits for that.
        """
        ranks = self._engine.ranks
        sum_parts(entries, ranks)
        if self._measuring:
            self._square += norm.square_sum(entries, ranks)
            return None
        share = self._agree_on_use(entries)
        self._square += share
        if self._stopped:
            return None
        norm.scale(entries, self._coefficient)
        return self._optimizer.start(entries)

    def _agree_on_use(self, entries: list[Parameter]) -> torch.Tensor:
        """Drop gradients that no rank made, and stop all ranks at the first that is not finite; return this rank's squares."""
        ranks = self._engine.ranks
        divided = any(entry.sharded or entry.cut is not None for entry in entries)
        unsure = [entry for entry in entries if entry.gathered is not None]
        if self._used is not None:
            for entry in unsure:
                entry.gradient = entry.gradient if id(entry) in self._used else None
            return norm.square_sum(entries, ranks)
        share = norm.square_sum(entries, ranks)
        if not divided:
            self._stopped |= not math.isfinite(share.item())
            for entry in unsure:  # of one rank: what it did not use, nobody did
                entry.gradient = entry.gradient if entry.used else None
            return share
        flags = [float(entry.used) for entry in unsure]
        mine = torch.tensor([float(not math.isfinite(share.item())), *flags], dtype=torch.float64, device=ranks.device)
        dist.all_reduce(mine)  # 8 bytes a parameter of one unit, over every rank
        broken, *users = mine.tolist()
        self._stopped |= broken > 0
        for entry, users_of_it in zip(unsure, users, strict=True):
            entry.gradient = entry.gradient if users_of_it else None
        return share


def refuse_by_hand(plan: Plan) -> None:
    """Raise `ConfigError` where a hand-written loop would not say which of its backwards is the last."""
    if plan.update == "backward":
        raise ConfigError("update=backward updates weights inside engine.step(batch): use that, or leave update out of the plan")
