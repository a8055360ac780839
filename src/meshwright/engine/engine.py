"""One training step on any mesh: the Engine. `entry.py` makes one.

The engine owns the arithmetic of a step: micro-batches, the weighting of losses by item count, accumulation, the norm and its
clipping, non-finite values, the loss scale, the update. How gradients travel between ranks is left to `parallel/`.

Weighting: a micro-batch's mean loss l over c items adds c * l / E to what is differentiated, where E is the number of items in
the step's global batch. Gradients are then summed, over micro-batches and ranks, never averaged, so every item weighs the
same however the batch is split. E is known only once every rank's count is; counts travel with the gradients, E is taken to be
the last step's, and if it turns out otherwise the gradients are multiplied by the ratio before they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright import _torch
from meshwright.blueprint.running import unchanged
from meshwright.blueprint.sample import caller
from meshwright.engine import norm, state
from meshwright.engine.backward import InBackward, refuse_by_hand
from meshwright.engine.batch import plain, rows, scalar, split, to_device
from meshwright.engine.flow import flow, loss_without_backward, output_without_backward
from meshwright.engine.ledger import Ledger
from meshwright.engine.metrics import Metrics
from meshwright.engine.optimizer import BoundOptimizer, OptimizerFactory
from meshwright.engine.precision import LossScale, autocast, dtype_contract, match_norm_inputs
from meshwright.engine.randomness import seeded
from meshwright.engine.stored import StoredOptimizer
from meshwright.errors import ConfigError, DataError, TrainingError
from meshwright.parallel import fsdp
from meshwright.parallel.apply import COMPUTE_DTYPES, Reading, apply, average_batch_norms
from meshwright.parallel.parameters import idle
from meshwright.parallel.partitioned import needs_example, sum_parts
from meshwright.parallel.pipelined import refuse_output, refuse_short, sum_shared
from meshwright.parallel.ranks import build_ranks
from meshwright.parallel.shelf import stores
from meshwright.parallel.weights import Weights
from meshwright.plan import Plan


@dataclass(frozen=True)
class Settings:
    """What a user says of a run beside the model, the plan and the optimizer; see `parallelize`."""

    loss_fn: Callable[[Any, Any], Tensor] | None
    count_fn: Callable[[Any], int]
    forward_fn: Callable[[nn.Module, Any], Any] | None
    clip_grad_norm: float | None
    on_nonfinite: str
    lr_schedule: Callable[[int], float] | None
    seed: int
    weights: Weights | None = None


class Engine:
    """A model under a plan. Made by `parallelize`; see DESIGN.md for the two ways to drive it.

    `module` is the model (its parameters under their own names), `optimizer` the torch optimizer over this rank's share,
    `data_rank` of `data_ranks` the share of each global batch that this process feeds, `steps` the optimizer steps done.
    """

    _opened = 0

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        plan: Plan,
        optimizer: OptimizerFactory | None,
        settings: Settings,
        example_batch: Any,
        device: torch.device | None,
    ) -> None:
        """Apply `plan`, then build the optimizer over what is this rank's to update."""
        self.plan = plan
        self.ranks = build_ranks(plan, device)
        self._settings = settings
        needs_example(plan, example_batch)
        self._applied = apply(
            model, plan, self.ranks, settings.seed, Reading(self._function, plain(example_batch)), settings.weights
        )
        self.module = self._applied.module
        self.pipeline = self._applied.pipeline
        self.seed = settings.seed
        self.table = self._applied.table
        self.bound = self._bind(optimizer) if optimizer else None
        self.dtypes = dtype_contract(plan, self.table)
        self.data_rank, self.data_ranks = self.ranks.data_rank, self.ranks.data_ranks
        self.steps = 0
        self.loss_scale = LossScale.of(plan.precision)
        match_norm_inputs(self.module, plan.precision, self.ranks.device, traced=self._applied.partition is not None)
        self.call_model = self._caller(self.module, self._applied.forward)
        Engine._opened += 1  # engines are made in the same order on every rank, so the count names this one on all of them
        self._ledger = Ledger(self.ranks.rank, self.ranks.world_size, f"engine-{Engine._opened}", timeout_s=1800.0)
        self._spare = example_batch
        self._expected: float | None = None
        self._micro_batches = 0
        self._by_hand = False  # whether a hand-written step is under way
        self._uncounted: int | None = None  # by hand: the items of the calls that no backward has followed yet
        self._without_items: list[Tensor] = []
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        self.in_backward: InBackward | None = None
        if plan.update == "backward" and isinstance(self.bound, StoredOptimizer):
            self.in_backward = InBackward(self, self.bound)

    def _bind(self, optimizer: OptimizerFactory) -> BoundOptimizer:
        if not stores(self.plan, self.ranks.device):
            return BoundOptimizer(optimizer, self.table, self.ranks)
        return StoredOptimizer(
            optimizer, self.table, self.ranks, self.plan, self._applied.groups(), self._applied.parked, self.seed
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return the torch optimizer; its groups hold this rank's share of the parameters."""
        return self._optimizer().torch

    def _optimizer(self) -> BoundOptimizer:
        if self.bound is None:
            raise ConfigError(
                "this engine was made without optimizer=: pass optimizer=lambda params: torch.optim.AdamW(params, lr=...)"
            )
        return self.bound

    # One call does it all

    def step(self, batch: Any) -> Metrics:
        """Run one optimizer step on this data rank's share of the global batch; every data rank must call it.

        Cuts the share into `plan.microbatches` parts, and weights by item counts. A rank that is out of data passes None (or a
        batch without rows) until its peers are done; a rank that has left its loop for another call of this engine takes part
        by itself. Raises `TrainingError` on every rank for a non-finite gradient (unless it is to be skipped), `DataError`
        for a batch of no rank.
        """
        self._ledger.enter_step()
        return self._step(batch)

    def _step(self, batch: Any) -> Metrics:
        optimizer = self._optimizer()
        try:
            self._clear()  # whatever somebody else's backward left
            parts = split(plain(batch), self.plan.microbatches)
            counts = [self._settings.count_fn(part) if part is not None else 0 for part in parts]
            self._expect(sum(counts), rows(plain(batch)) if self.pipeline is not None else 0)
            optimizer.now = self.steps
            if self.in_backward is not None:
                return self.in_backward.step(parts, counts)
            if self.pipeline is not None:
                self._flow(parts, counts, last=True)
                return self._update(optimizer)
            for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
                self._micro_step(part, int(count), last=index == len(parts) - 1)
            return self._update(optimizer)
        except BaseException:
            self._abandon()
            raise

    def _micro_step(self, part: Any, count: int, last: bool) -> None:
        with self._randomness():
            if count == 0 or part is None:
                self._begin(last)
                if self._applied.sharded:
                    self._keep_company(part)
            else:
                part = to_device(part, self.ranks.device)
                loss = self._loss_of(part)
                self._add(loss, count)
                self._begin(last)
                self._differentiate(loss, count)
                if self._applied.sharded:
                    self._spare = part
            if self._applied.buckets is not None:
                self._applied.buckets.finish()

    def _flow(self, parts: list[Any], counts: list[int], last: bool) -> None:
        assert self._expected is not None
        expected, buckets = self._expected, self._applied.buckets
        self._wake()
        if buckets is not None:
            buckets.begin(last, self._sums, held=True)
        found = self._run(lambda: flow(self, parts, counts, lambda count: self.loss_scale.value * count / expected))
        for loss, count in found:
            self._add(loss, count)
        if buckets is not None:
            buckets.finish()

    @torch.no_grad()
    def _wake(self) -> None:
        if self._applied.buckets is not None:
            self._applied.buckets.wake()

    def _caller(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[[Any], Any]:
        return caller(module, self._settings.forward_fn, COMPUTE_DTYPES[self.plan.precision], forward)

    def _function(self, module: nn.Module) -> Callable[[Any], Any]:
        """Return what is traced before there is anything to run: from a batch to its loss, or to the output without a loss_fn."""
        call = self._caller(module, module)
        return call if self._settings.loss_fn is None else lambda batch: self._loss(call(batch), batch)

    def _output_of(self, batch: Any) -> Any:
        """Return the model's output, by this rank's program where the plan partitions the model."""
        if self.pipeline is not None:
            return self._run(lambda: output_without_backward(self, batch))
        partition = self._applied.partition
        return self._run(lambda: self.call_model(batch) if partition is None else partition.run("output", self.call_model, batch))

    def _loss_of(self, batch: Any) -> Tensor:
        """Return the loss of the model's output, computed in one go (with cut logits, say)."""
        partition, compute = self._applied.partition, self.compute_loss
        if self.pipeline is not None:
            return self._run(lambda: loss_without_backward(self, batch))  # type: ignore[no-any-return]
        loss: Tensor = self._run(lambda: compute(batch) if partition is None else partition.run("loss", compute, batch))
        return loss

    def compute_loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch by the model's own code, as it is traced."""
        return self._loss(self.call_model(batch), batch)

    def _loss(self, output: Any, batch: Any) -> Tensor:
        if self._settings.loss_fn is None:
            raise ConfigError("this engine was made without loss_fn=: pass loss_fn=, or use engine(batch), engine.backward(loss)")
        return scalar(self._settings.loss_fn(output, batch), "loss_fn returned")

    def _run(self, function: Callable[[], Any]) -> Any:
        """Run the model (and its loss) in the plan's precision, and under zero=3 inside the FSDP2 root."""
        recompute = self._applied.recompute
        with autocast(self.plan.precision, self.ranks.device), recompute.watching() if recompute is not None else nullcontext():
            return function() if self._applied.root is None else self._applied.root(function)

    # The parts, for a hand-written loop

    def __call__(self, batch: Any) -> Any:
        """Return the model's output for this rank's batch; with gradients enabled, `backward` takes a loss of it next.

        In a hand-written loop all ranks must make the same number of calls. Accumulation is calling `backward` more than once.
        """
        batch = plain(batch)
        if not torch.is_grad_enabled():
            return self._without_backward(self._output_of, batch)
        refuse_output(self.plan)
        refuse_by_hand(self.plan)
        buckets = self._applied.buckets
        if (buckets is not None and buckets.reduced) or any(entry.summed is not None for entry in self.table):
            raise ConfigError("full_gradients() has summed this step's gradients over the ranks: call optimizer_step() before more")
        if not self._by_hand:
            self._clear()
            self._by_hand = True
        count = int(self._settings.count_fn(batch))
        self._expect(count)
        self._uncounted = count + (self._uncounted or 0)
        with self._shared_randomness():
            output = self._output_of(to_device(batch, self.ranks.device))
        if count == 0:
            self._without_items += [tensor for tensor in _torch.tensors_of(output) if tensor.requires_grad]
        return output

    def accumulate(self, batch: Any) -> None:
        """Add the gradients of this data rank's share of a batch, for `full_gradients` and `optimizer_step`.

        What `engine(batch)` and `backward` do together, for a plan with `pp` too; every rank must call it.
        """
        if self.pipeline is None:
            self.backward(self._loss(self(batch), plain(batch)))
            return
        if not self._by_hand:
            self._clear()
            self._by_hand = True
        parts = split(plain(batch), self.plan.microbatches)
        counts = [int(self._settings.count_fn(part)) if part is not None else 0 for part in parts]
        self._expect(sum(counts), rows(plain(batch)))
        self._flow(parts, counts, last=False)

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss that is the mean over the items of the batches the engine was called with since the last backward.

        A batch without items adds nothing, whatever its loss is.
        """
        if self._uncounted is None:
            raise ConfigError("backward(loss) follows engine(batch), one after the other: no batch has been counted for this loss")
        count, self._uncounted = self._uncounted, None
        self._begin(last=False, by_hand=True)
        if count:
            self._add(scalar(loss, "the loss is"), count)
            self._differentiate(loss, count)
        elif self._applied.sharded:
            self._differentiate_nothing(self._without_items)
        self._without_items = []
        if self._applied.buckets is not None:
            self._applied.buckets.finish()

    def optimizer_step(self) -> Metrics:
        """Reduce what is left to reduce, clip, update, and free the gradients; every rank must call it."""
        refuse_by_hand(self.plan)
        try:
            self._reduce_rest()
            optimizer = self._optimizer()
            optimizer.now = self.steps
            return self._update(optimizer)
        except BaseException:
            self._abandon()
            raise

    def zero_grad(self) -> None:
        """Drop the gradients of backwards that no update is to follow."""
        self._clear()

    def full_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the backwards since the last update, by name, whole, on the CPU of rank 0 (elsewhere empty).

        They are those of the global mean loss, before clipping. For a hand-written loop, before `optimizer_step`; every rank
        must call it.
        """
        refuse_by_hand(self.plan)
        self._reduce_rest()
        _, items, _ = self._collect()
        return state.full_gradients(self, (self._expected or 1.0) / (max(1.0, items) * self.loss_scale.value))

    def _reduce_rest(self) -> None:
        if self._applied.buckets is not None and not self._applied.buckets.reduced:
            self._begin(last=True)
            self._applied.buckets.finish()

    # Inside a step

    def _begin(self, last: bool, by_hand: bool = False) -> None:
        if self._applied.buckets is not None:
            self._applied.buckets.begin(last, self._sums)
        if self._applied.sharded and self.ranks.group("dp_replicate") is not None:
            assert self._applied.root is not None
            fsdp.reduce_on_last(self._applied.root, last or by_hand)

    def _add(self, loss: Tensor, count: int) -> None:
        if count and self.ranks.cp_rank == 0:  # its peers have the same loss of the same rows
            self._sums[0] += loss.detach().double() * count
            self._sums[1] += count

    def _differentiate(self, loss: Tensor, count: int) -> None:
        assert self._expected is not None
        (loss * (self.loss_scale.value * count / self._expected)).backward()

    def _expect(self, count: int, rows_here: int = 0) -> None:
        """Before the first step agree on the number of items that losses are divided by: two numbers, all-reduced once.

        A pipeline also refuses a first batch that fills its micro-batches on no rank; later ones (an epoch's last) may be short.
        """
        if self._expected is None:
            counted = self.ranks.speaks and self.ranks.pp_rank == 0
            fills = self.pipeline is None or rows_here >= self.plan.microbatches
            total = torch.tensor([float(count) * counted, float(fills)], dtype=torch.float64, device=self.ranks.device)
            if self.ranks.mesh is not None:
                dist.all_reduce(total)
            if not total[1]:
                refuse_short(self.plan, rows_here, self.ranks)
            self._expected = max(1.0, total[0].item())

    def _keep_company(self, part: Any) -> None:
        """Send the collectives of a forward and backward under zero=3, and leave no trace of it."""
        batch = to_device(self._stand_in(part), self.ranks.device)
        with unchanged(self.module):
            output = self._output_of(batch)
            self._differentiate_nothing([tensor for tensor in _torch.tensors_of(output) if tensor.requires_grad])

    def _differentiate_nothing(self, tensors: list[Tensor]) -> None:
        with idle(self.table):
            torch.autograd.backward(tensors, [torch.zeros_like(tensor) for tensor in tensors])

    def _stand_in(self, part: Any) -> Any:
        """Return a batch that this rank can compute on when it has no items: one that it has seen, or the example."""
        batch = self._spare if self._spare is not None else part
        if batch is None:
            raise TrainingError(f"rank {self.ranks.rank} has no batch and never had one: pass example_batch= to parallelize")
        return batch

    def _collect(self) -> tuple[float, float, float]:
        """Give every entry its reduced gradient; return the sums (loss, items) over all ranks, and the gradients' norm.

        The same values on every rank. Where all ranks hold the whole gradient the sums came with it and the norm is local;
        else one more all-reduce carries both, and which parameters of FSDP2 were used.
        """
        applied = self._applied
        sums = self._sums
        if applied.buckets is not None:
            summed = applied.buckets.attach()
            sums = summed if applied.root is None else sums  # beside FSDP2 they come below, or are those of the only rank
        elif not applied.sharded:
            for entry in self.table:
                gradient = entry.live.grad
                entry.gradient = gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
        fsdp.attach(applied.sharded)
        sum_parts(self.table, self.ranks)
        sum_shared(self.table, self.ranks)
        share = norm.square_sum(self.table, self.ranks)
        if applied.pipeline is None and not any(entry.sharded or entry.cut for entry in self.table):
            for entry in applied.sharded:  # of one rank: what it did not use, nobody did
                entry.gradient = entry.gradient if entry.used else None
            loss_sum, items = sums.tolist()
            return loss_sum, items, math.sqrt(share.item() * self.ranks.world_size)
        flags = [*fsdp.trail(applied.root), *(float(entry.used) for entry in applied.sharded)]
        flags_there = torch.tensor(flags, dtype=torch.float64, device=share.device)
        mine = torch.cat([self._sums * self.ranks.speaks, share[None], flags_there])
        dist.all_reduce(mine)  # 8 * (5 + parameters) bytes over every rank
        loss_sum, items, square, total, squares, *users = mine.tolist()
        fsdp.refuse_other_trails(total, squares, self.ranks.world_size)
        for entry, count in zip(applied.sharded, users, strict=True):
            entry.gradient = entry.gradient if count else None
        return loss_sum, items, math.sqrt(square)

    def _update(self, optimizer: BoundOptimizer) -> Metrics:
        self._applied.agree(self.ranks)
        loss_sum, items, raw_norm = self._collect()
        if items == 0:
            raise DataError(f"step {self.steps}: no rank has an item to train on")
        assert self._expected is not None
        scale = self.loss_scale.value
        ratio = self._expected / (items * scale)
        grad_norm = raw_norm * ratio
        finite = math.isfinite(grad_norm)
        overflow = self.loss_scale.dynamic and scale > 1.0  # fp16 finds its scale by overflowing: no news
        if not finite and not overflow and self._settings.on_nonfinite == "stop":
            raise TrainingError(
                f"step {self.steps}: the gradient norm is {grad_norm} (loss {loss_sum / items:.4g}); the weights are as before "
                "the step: lower the learning rate, look at the batch, or set on_nonfinite=skip"
            )
        if self._settings.lr_schedule is not None:
            optimizer.scale_rates(self._settings.lr_schedule(self.steps))
        if finite:
            norm.scale(self.table, ratio * norm.clip_coefficient(grad_norm, self._settings.clip_grad_norm))
            optimizer.step()
        self._clear()  # gradients make room for the gathered rows
        if self._applied.buckets is not None and (finite or self._applied.buckets.sleeps):
            with torch.no_grad():
                self._applied.buckets.publish()
        self.loss_scale.update(finite)
        average_batch_norms(self._applied.batch_norms, self.ranks)
        self._expected = items
        rate = optimizer.torch.param_groups[0]["lr"]
        metrics = Metrics(self.steps, loss_sum / items, round(items), grad_norm, rate, not finite, scale)
        self.steps += finite
        return metrics

    def _clear(self) -> None:
        if self._applied.buckets is not None:
            self._applied.buckets.clear()
        if self._applied.root is not None:
            self._applied.root.trail = 0
        for entry in self.table:
            entry.live.grad = entry.gradient = entry.summed = None
            entry.used = False
            if entry.gathered is not None:
                entry.gathered.grad = None
        self._sums = torch.zeros_like(self._sums)
        self._micro_batches = 0
        self._by_hand = False
        self._uncounted, self._without_items = None, []

    def _abandon(self) -> None:
        """After an exception in mid-step: drop what it left, so that the weights stand as before the step."""
        if self.in_backward is not None:
            self.in_backward.abandon()
        if self._applied.root is not None:
            _torch.fsdp_reset(self._applied.root)  # type: ignore[arg-type]
        if self._applied.parked is not None:
            self._applied.parked.release()
        self._clear()

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """Draw dropout from (seed, step, micro-batch, data rank) inside, and leave the caller's generators as they were.

        So a run that was resumed draws the masks of one that was not, and no two data ranks draw the same.
        """
        place = (self.seed, self.steps, self._micro_batches, self.data_rank)
        self._micro_batches += 1
        with seeded(self.ranks.device, *place):
            yield

    def _shared_randomness(self) -> Any:
        """Ranks of tp and cp compute one run together: they must draw the same. Others draw from the caller's generators."""
        return nullcontext() if self._applied.partition is None else self._randomness()

    # Without gradients

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Metrics:
        """Return the global mean loss over every rank's batch, in evaluation mode; every rank must call it (None: no data)."""
        self._enter_call()
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        part = plain(batch)
        count = int(self._settings.count_fn(part)) if part is not None else 0
        self._wake()
        if count or self._applied.sharded:
            loss = self._evaluating(
                lambda batch: self._loss_of(batch) if count else self._output_of(batch), part if count else self._stand_in(part)
            )
            if count and self.ranks.speaks and (self.pipeline is None or self.pipeline.last):
                sums[0], sums[1] = loss.double() * count, count
        if self.ranks.mesh is not None:
            dist.all_reduce(sums)  # (loss, items) over every rank
        loss_sum, items = sums.tolist()
        if items == 0:
            raise DataError("no rank has an item to evaluate")
        return Metrics(self.steps, loss_sum / items, round(items))

    @torch.no_grad()
    def infer(self, batch: Any) -> Any:
        """Return the model's output for a batch, in evaluation mode; every rank must call it, with its own or the same batch."""
        self._enter_call()
        self._wake()
        return self._evaluating(self._output_of, plain(batch))

    def _evaluating(self, function: Callable[[Any], Any], batch: Any) -> Any:
        """Return a function of a batch in evaluation mode."""
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            return self._without_backward(function, batch)
        finally:
            for module, training in modes:
                module.training = training

    def _without_backward(self, function: Callable[[Any], Any], batch: Any) -> Any:
        """Return a function of a batch, on the device."""
        with self._shared_randomness():
            result = function(to_device(batch, self.ranks.device))
        if self._applied.root is not None:
            # FSDP2 would keep the root gathered for a backward that never comes, and not notice an update or load in between.
            fsdp.reshard(self._applied.root)
        return result

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterate a loader whose length may differ between ranks: yields None on a rank that is done until all are."""
        iterator = iter(loader)
        while True:
            batch = next(iterator, None)
            left = torch.tensor(float(batch is not None), device=self.ranks.device)
            if self.ranks.mesh is not None:
                dist.all_reduce(left, op=dist.ReduceOp.MAX)  # 4 bytes: does any rank have a batch?
            if not left.item():
                return
            yield batch

    # State

    def _enter_call(self) -> None:
        def join() -> None:
            self._ledger.steps += 1
            with torch.enable_grad():
                self._step(None)

        self._ledger.enter_call(join)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return every parameter and buffer under its original name, whole, on the CPU of rank 0; elsewhere an empty dict.

        Every rank must call it. Parameters come from the full-precision masters. Tied names share one tensor.
        """
        self._enter_call()
        return state.full_state_dict(self)

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Save parameters, buffers, optimizer states and position as a checkpoint directory; every rank must call it.

        The directory appears complete or not at all. `extra` holds JSON values of the caller's, given back by `load`.
        """
        from meshwright.checkpoint.save import save

        self._enter_call()
        save(self, Path(path), extra or {})

    def adopt(self, steps: int, loss_scale: dict[str, float], last_norm: float | None) -> None:
        """Go on from another run's position: what a checkpoint holds beside tensors."""
        self.steps = steps
        if self.in_backward is not None:
            self.in_backward.last_norm = last_norm
        if self.loss_scale.dynamic and loss_scale["dynamic"]:  # another precision's scale says nothing about this one's
            self.loss_scale.value, self.loss_scale.good_steps = loss_scale["value"], int(loss_scale["good_steps"])
        if self._applied.buckets is not None:
            with torch.no_grad():
                self._applied.buckets.publish()  # the masters have changed; the live parameters follow

    def load(self, path: str | Path) -> dict[str, Any]:
        """Load a checkpoint that was saved under any plan; return its `extra`. Every rank must call it."""
        from meshwright.checkpoint.load import load

        self._enter_call()
        return load(self, Path(path))
