"""What every benchmark shares: where it ran, local ranks, interleaved timing, medians of paired ratios, tables and JSON.

A measurement is never a time by itself: contenders take turns in the same processes (A B C, C B A, ...), each round gives one
ratio per pair, and the median over the rounds is reported. CPU seconds are those of all threads of all ranks together (so they
hold the transport's threads too) and are steadier than wall seconds on a machine that others use.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "lightning-fabric", "accelerate", "deepspeed", "numpy")


def record(device: str) -> dict[str, Any]:
    """Return what a figure needs to be believed later: machine, versions, commit, date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src")),
        "command": " ".join(sys.argv),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": os.getloadavg(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
        },
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# Local ranks


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, limit_s: float = 3600.0) -> Any:
    """Run a module-level function on `world_size` fresh local processes; return rank 0's result.

    The process group (gloo, loopback) is up when the function starts, and the environment is torchrun's, so that libraries
    that look for a launcher find one. The first rank that fails ends all and raises here.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, world_size, folder, theirs, function, arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _results(pipes, limit_s)[0]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: list[Connection], limit_s: float) -> list[Any]:
    deadline = time.monotonic() + limit_s
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], deadline - time.monotonic())
        if not ready:
            raise TimeoutError(f"the ranks did not answer within {limit_s:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                error, results[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                error = "the process died"
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
    return [results[rank] for rank in range(len(pipes))]


def _rank(rank: int, world_size: int, folder: str, pipe: Connection, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29400",  # read by launch detection only: the ranks meet at the file
        TORCHELASTIC_RUN_ID="benchmark",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peers and torch versions deprecate each other's options; the tables are what is read
    try:
        if world_size > 1:
            limit = datetime.timedelta(seconds=600)
            dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size, timeout=limit)
        pipe.send((None, function(*arguments)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    # The parent ends us: libraries' exit handlers would wait for peers that are gone.
    while True:
        time.sleep(60)


# Timing


@dataclass
class Times:
    """Seconds per step of one contender, one value a round: CPU summed over the ranks, wall of the slowest rank."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)


def interleave(
    contenders: dict[str, Callable[[], None]], rounds: int, steps: int, device: str, settle: int = 1
) -> dict[str, Times]:
    """Time `steps` calls of each contender in turn, `rounds` times over, the order reversed every other round.

    Before each turn `settle` calls run untimed, so that nobody pays for the caches that the one before has emptied. Every rank
    must call it; all ranks return the same.
    """
    # What building left behind is taken from the collector's sight: else its full passes hit contenders by chance.
    gc.collect()
    gc.freeze()
    times = {name: Times() for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            cpu_s, wall_s = _turn(contenders[name], steps, settle, device)
            times[name].cpu_s.append(cpu_s / steps)
            times[name].wall_s.append(wall_s / steps)
    return times


def _turn(step: Callable[[], None], steps: int, settle: int, device: str) -> tuple[float, float]:
    for _ in range(settle):
        step()
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if not dist.is_initialized():
        return cpu, wall
    spent, slowest = torch.tensor(cpu, dtype=torch.float64), torch.tensor(wall, dtype=torch.float64)
    dist.all_reduce(spent)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return spent.item(), slowest.item()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


@dataclass(frozen=True)
class Ratio:
    """One contender against another: a ratio per round, for CPU and for wall seconds."""

    cpu: list[float]
    wall: list[float]

    @classmethod
    def of(cls, one: Times, other: Times) -> Ratio:
        """Pair the rounds of two contenders."""
        return cls(
            [a / b for a, b in zip(one.cpu_s, other.cpu_s, strict=True)],
            [a / b for a, b in zip(one.wall_s, other.wall_s, strict=True)],
        )

    def to_json(self) -> dict[str, Any]:
        """Return the medians, their spread and every single ratio."""
        return {
            "cpu_median": statistics.median(self.cpu),
            "cpu_quartiles": quartiles(self.cpu),
            "wall_median": statistics.median(self.wall),
            "wall_quartiles": quartiles(self.wall),
            "cpu": self.cpu,
            "wall": self.wall,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile; of a single value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


# Output


def table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, columns aligned."""
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    print(f"\n{title}\n")
    for line in (header, ["-" * width for width in widths], *lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    sys.stdout.flush()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the results beside their final name and rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)
    print(f"\nwritten: {path}")
