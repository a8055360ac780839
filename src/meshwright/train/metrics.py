"""What a run says of itself: `metrics.jsonl`, the terminal, and the trackers that the user asks for."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meshwright.errors import ConfigError
from meshwright.parallel.ranks import Ranks
from meshwright.train.config import LogTable


def peak_memory_bytes(ranks: Ranks) -> list[int]:
    """Return each rank's peak memory in bytes: the allocator's on CUDA, the process's resident set on the CPU.

    Every rank must call it; an all-reduce of 8 bytes per rank.
    """
    if ranks.device.type == "cuda":
        own = torch.cuda.max_memory_allocated(ranks.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = torch.zeros(ranks.world_size, dtype=torch.float64, device=ranks.device)
    peaks[ranks.rank] = own
    if ranks.mesh is not None:
        dist.all_reduce(peaks)
    return [int(peak) for peak in peaks.tolist()]


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, flushed at once. A resumed run drops the lines of steps that it runs again."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open `path` for the steps from `first_step` on."""
        kept = []
        if first_step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < first_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    break  # a line that was cut short when the run died
        path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        """Append one step."""
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def refuse_missing(table: LogTable) -> None:
    """Raise `ConfigError` for a tracker whose package is not installed; nothing is imported."""
    for name, asked in (("tensorboard", table.tensorboard), ("wandb", table.wandb)):
        if asked and importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.{name}=true needs a package that is not installed: pip install {name}")


def trackers(table: LogTable, folder: Path, settings: dict[str, Any]) -> list[Callable[[dict[str, Any]], None]]:
    """Return the trackers that the configuration asks for. Raises `ConfigError` for one whose package is missing."""
    refuse_missing(table)
    found: list[Callable[[dict[str, Any]], None]] = []
    if table.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(line: dict[str, Any]) -> None:
            for key, value in line.items():
                if isinstance(value, (int, float)) and key != "step":
                    writer.add_scalar(key, value, line["step"])

        found.append(to_tensorboard)
    if table.wandb:
        import wandb

        run = wandb.init(project="meshwright", dir=str(folder), config=settings)
        found.append(lambda line: run.log(line, step=line["step"]))
    return found


class Terminal:
    """The progress of a run on rank 0: a bar on a terminal, plain lines elsewhere; other ranks print nothing."""

    def __init__(self, total: int, first_step: int, every: int, active: bool) -> None:
        """Start at `first_step` of `total`; `active` on the one rank that prints."""
        self.active = active
        self.every = every
        self.total = total
        self.console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if active and self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=total, completed=first_step)
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line."""
        if self.active:
            self.console.print(text, markup=False)

    def step(self, line: dict[str, Any], seconds_left: float) -> None:
        """Show one step's metrics."""
        if not self.active:
            return
        text = f"loss {line['loss']:.3f} | {line['tokens_per_second']:,.0f} tokens/s"
        done = line["step"] + 1
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif done % self.every == 0 or done == self.total:
            minutes, seconds = divmod(round(seconds_left), 60)
            self.say(f"step {done}/{self.total} | {text} | grad norm {line['grad_norm']:.2f} | {minutes}:{seconds:02d} left")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
