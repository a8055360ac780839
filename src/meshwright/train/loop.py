"""The training loop of one rank: build, resume, step, validate, save, sample."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from meshwright import losses
from meshwright.blueprint.spec import parse_spec
from meshwright.checkpoint import latest, prune, step_folder
from meshwright.cluster.catalog import peak_flops
from meshwright.engine import Engine, parallelize
from meshwright.errors import ConfigError
from meshwright.plan import Plan
from meshwright.plan.memory import state_bytes
from meshwright.plan.prediction import Prediction
from meshwright.train.config import Config, OptimizerTable, ScheduleTable
from meshwright.train.data import Samples, open_samples, training_batches, validation_batches
from meshwright.train.metrics import MetricsFile, Terminal, peak_memory_bytes, trackers
from meshwright.train.predicted import compare, expected, tail


def make_optimizer(table: OptimizerTable) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Return the callable that builds the configured `torch.optim` optimizer; matrices decay, vectors and scalars don't.

    Raises `ConfigError` for an unknown class or an argument that it does not take.
    """
    kind = getattr(torch.optim, table.name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer.name={table.name!r} is no class of torch.optim: the usual ones are 'AdamW' and 'SGD'")
    arguments: dict[str, Any] = {"lr": table.lr, **table.extra}
    if "betas" in kind.__init__.__code__.co_varnames:
        arguments.setdefault("betas", tuple(table.betas))

    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": table.weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return kind([group for group in groups if group["params"]], **arguments)

    try:
        build([nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"[optimizer] does not fit torch.optim.{table.name}: {error}") from error
    return build


def rate_schedule(table: ScheduleTable, steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor as a function of the optimizer step alone."""

    def factor(step: int) -> float:
        if step < table.warmup:
            return (step + 1) / table.warmup
        progress = min(1.0, (step - table.warmup) / max(1, steps - table.warmup))
        if table.decay == "none":
            return 1.0
        down = (1 + math.cos(math.pi * progress)) / 2 if table.decay == "cosine" else 1 - progress
        return table.final + (1 - table.final) * down

    return factor


def train(config: Config, plan: Plan, folder: Path, resume: bool) -> None:
    """Run this rank's part of a training run whose folder and tokens are prepared; every rank calls it."""
    samples, validation = open_samples(folder / "data" / "tokens.bin", config.data)
    spec = parse_spec(config.model.spec, sequence=config.data.sequence_length)
    engine = parallelize(
        spec.build,
        plan,
        optimizer=make_optimizer(config.optimizer),
        loss_fn=losses.cross_entropy,
        example_batch=samples.batch([0, 0]),
        clip_grad_norm=config.train.clip_grad_norm,
        on_nonfinite=config.train.on_nonfinite,  # type: ignore[arg-type]
        lr_schedule=rate_schedule(config.schedule, config.train.steps),
        seed=config.train.seed,
    )
    done = latest(folder / "checkpoints") if resume else None
    first = int(engine.load(done)["position"]) // config.data.global_batch if done is not None else 0
    run = _Run(config, engine, samples, validation, folder, first)
    run.introduce(done)
    try:
        run.all_steps(first)
    finally:
        run.terminal.close()
    run.conclude()


class _Run:
    """One rank of a run in progress."""

    def __init__(self, config: Config, engine: Engine, samples: Samples, validation: Samples, folder: Path, first: int) -> None:
        self.config, self.engine, self.folder = config, engine, folder
        self.samples, self.validation = samples, validation
        self.leads = engine.ranks.rank == 0
        self.terminal = Terminal(config.train.steps, first, config.log.every, self.leads)
        self.file = MetricsFile(folder / "metrics.jsonl", first) if self.leads else None
        self.trackers = trackers(config.log, folder, asdict(config)) if self.leads else []
        device = engine.ranks.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak = peak_flops(name, engine.dtypes.compute)
        self.flops: int | None = None
        self.peaks = peak_memory_bytes(engine.ranks)
        self.started = time.perf_counter()
        self.first = first
        self.expected: Prediction | None = None
        self.seconds: list[float] = []

    def introduce(self, resumed: Path | None) -> None:
        """Print what is about to run, and write down what the plan promises."""
        engine = self.engine
        trainable = sum(entry.whole.numel() for entry in engine.table if entry.trainable)
        frozen = sum(entry.whole.numel() for entry in engine.table if not entry.trainable)
        here = [entry for entry in engine.table if entry.here]  # the parts of them that tp and pp leave to this rank
        numbers = [sum(entry.shape.numel() for entry in here if entry.trainable == kind) for kind in (True, False)]
        predicted = state_bytes(engine.plan, numbers[0], numbers[1], on_host=engine.ranks.device.type == "cpu")
        if self.leads:
            prediction = {"plan": str(engine.plan), "parameters": trainable + frozen, "memory_bytes": predicted.to_json()}
            self.expected = expected(self.config, engine.plan)
            if self.expected is not None:
                prediction["prediction"] = self.expected.to_json()
            (self.folder / "prediction.json").write_text(json.dumps(prediction, indent=1) + "\n")
        if self.expected is not None:
            self.terminal.say(f"predicted {self.expected.step_seconds:.4g} s a step, bound by {self.expected.bound}")
        ranks = engine.ranks.world_size
        self.terminal.say(f"model     {self.config.model.spec}: {trainable + frozen:,} parameters")
        self.terminal.say(f"plan      {engine.plan} ({ranks} rank{'s' if ranks > 1 else ''} on {engine.ranks.device.type})")
        self.terminal.say(f"dtypes    {engine.dtypes}")
        self.terminal.say(f"states    {predicted.peak / 2**20:,.1f} MiB on each rank at the peak of a step, by formula")
        size = self.samples.count * self.samples.length / 1e6
        self.terminal.say(f"data      {self.config.data.source}: {size:,.1f} MB of text to train on")
        if resumed is not None:
            self.terminal.say(f"resumed   from {resumed}, at step {self.first}")

    def all_steps(self, first: int) -> None:
        """Run the steps from `first` on, with validation and checkpoints in between."""
        engine, train, data = self.engine, self.config.train, self.config.data
        batches = training_batches(self.samples, data, train.seed, first, engine.data_rank, engine.data_ranks)
        for step in range(first, train.steps):
            began = time.perf_counter()
            metrics = self._counted(next(batches), step)
            seconds = time.perf_counter() - began
            self.seconds.append(seconds)
            if step % self.config.log.every == 0 or step + 1 == train.steps:
                self.peaks = peak_memory_bytes(engine.ranks)
            self._log(step, metrics.to_json(), seconds)
            last = step + 1 == train.steps
            if train.eval_every and (step + 1) % train.eval_every == 0 and not last:
                loss = self.validate()
                self.terminal.say(f"step {step + 1}/{train.steps} | validation loss {loss:.3f} nats per byte")
            every = self.config.checkpoint.every
            if last or (every and (step + 1) % every == 0):
                self.save(step + 1)

    def _counted(self, batch: Any, step: int) -> Any:
        """Run one step; the first one counts its FLOPs where they can be compared with a known peak."""
        if self.flops is not None or self.peak is None:
            return self.engine.step(batch)
        with FlopCounterMode(display=False) as counter:
            metrics = self.engine.step(batch)
        self.flops = counter.get_total_flops()
        return metrics

    def _log(self, step: int, metrics: dict[str, Any], seconds: float) -> None:
        if not self.leads:
            return
        tokens = metrics["items"]
        mfu = self.flops / seconds / self.peak if self.flops is not None and self.peak is not None else None
        line = {
            "step": step,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "lr": metrics["lr"],
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": mfu,
            "peak_memory_bytes": self.peaks,
        }
        assert self.file is not None
        self.file.write(line)
        for tracker in self.trackers:
            tracker(line)
        spent = time.perf_counter() - self.started
        left = spent / (step + 1 - self.first) * (self.config.train.steps - step - 1)
        self.terminal.step(line, left)

    def validate(self) -> float:
        """Return the mean loss over the validation samples, in nats per byte; every rank must call it."""
        total, items = 0.0, 0
        for batch in validation_batches(self.validation, self.config.data, self.engine.data_rank, self.engine.data_ranks):
            metrics = self.engine.evaluate(batch)
            total, items = total + metrics.loss * metrics.items, items + metrics.items
        return total / items

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` steps and delete the oldest beyond those to keep."""
        checkpoints = self.folder / "checkpoints"
        self.engine.save(step_folder(checkpoints, step), {"position": step * self.config.data.global_batch})
        if self.leads:
            prune(checkpoints, self.config.checkpoint.keep)

    def sample(self) -> str:
        """Return text that the model writes, byte by byte; every rank must call it, and all take part in each byte."""
        generator = torch.Generator().manual_seed(self.config.train.seed)
        tokens = list(b"def ")
        device = self.engine.ranks.device
        for _ in range(self.config.train.sample):
            window = torch.tensor([tokens[-self.config.data.sequence_length :]], device=device)
            output = self.engine.infer(window)
            logits = output if isinstance(output, torch.Tensor) else output.logits
            weights = (logits[0, -1, :256].float().cpu() / 0.7).softmax(-1)
            chosen = torch.multinomial(weights, 1, generator=generator).to(device)
            if self.engine.ranks.mesh is not None:
                dist.broadcast(chosen, 0)  # 8 bytes: every rank goes on from the same text
            tokens.append(int(chosen))
        text = bytes(tokens).decode("utf-8", errors="replace")
        return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)

    def conclude(self) -> None:
        """Print the final validation loss, a sample, and where everything is."""
        loss = self.validate()
        text = self.sample() if self.config.train.sample else ""
        if self.file is not None:
            self.file.close()
        say = self.terminal.say
        say(f"validation loss {loss:.3f} nats per byte")
        if self.peak is None:
            say(f"mfu unknown: no peak rate is known for this device in {self.engine.dtypes.compute}")
        usual = tail(self.seconds)
        if self.expected is not None and usual is not None:
            say(compare(self.expected, usual, max(self.peaks), self.engine.ranks.device.type, self.folder))
        if text:
            say("a sample of what it writes:")
            say("\n".join("  | " + line for line in text.splitlines()))
        say(f"everything is in {os.fspath(self.folder)}: plan.toml, metrics.jsonl, prediction.json, checkpoints/")
