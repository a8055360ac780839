"""Memory on the CPU: a GPT that trains in a quarter of its states' bytes, from disk; what the disk and the host's memory allow.

    python benchmarks/memory.py --section train --directory /scratch     # a GPT of 0.5B on 2 ranks, in a cgroup
    python benchmarks/memory.py --section disk --directory /scratch      # the shelf against a plain loop of direct transfers
    python benchmarks/memory.py --section optimizer                      # the streamed update against memory bandwidth

`train`: optimizer states and parameters lie on disk (`zero=3`, `update=backward`), and a memory cgroup (or, where none can be made,
a limit on private memory for each rank) holds both ranks' resident memory under 16 / 4 bytes a parameter. The least that a step of
that plan moves is, per parameter, two reads of the weight (forward, backward), a read of each state and a write of all three.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import REPOSITORY, record, run_ranks, table, write_json

import meshwright as mw
from meshwright.models import decoder
from meshwright.parallel.disk import ALIGNMENT, BLOCK, aligned
from meshwright.parallel.shelf import Place, Shelf

STATES_BYTES = 16  # per parameter: fp32 weights and gradients, and Adam's two states
GROUPS = Path("/sys/fs/cgroup")


def main() -> None:
    """Run one section and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=("train", "disk", "optimizer"), required=True)
    parser.add_argument("--directory", default=".")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit-bytes", type=int, help="in place of a quarter of the states' bytes")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {"train": _train, "disk": _disk, "optimizer": _optimizer}[arguments.section](arguments)
    place = arguments.json or REPOSITORY / "benchmarks" / "results" / f"memory-cpu-{arguments.section}.json"
    write_json(place, record("cpu") | {"section": arguments.section} | found)


# A model in a quarter of its states


def _config(layers: int, hidden: int, sequence: int) -> decoder.DecoderConfig:
    return decoder.gpt(layers=layers, hidden=hidden, heads=hidden // 64, vocab=8192, sequence=sequence)


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    config = _config(arguments.layers, arguments.hidden, arguments.sequence)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in decoder.Decoder(config).parameters())
    limit = arguments.limit_bytes or STATES_BYTES * parameters // 4
    with _cgroup(limit) as group:
        found: dict[str, Any] = run_ranks(2, _steps, config, arguments.directory, arguments.steps, str(group or ""), limit)
        if group is not None:
            found["peak_bytes"] = int((group / "memory.max_usage_in_bytes").read_text())
            found["failures"] = int((group / "memory.failcnt").read_text())
    found |= {
        "parameters": parameters,
        "limit_bytes": limit,
        "enforced_by": "memory cgroup" if group else "RLIMIT_DATA on each rank",
    }
    table(
        f"{parameters:,} parameters on 2 ranks in {limit / 1e9:.2f} GB ({found['enforced_by']})",
        ("plan", "loss, first to last", "s a step", "GB moved a step", "of the least", "peak GB"),
        [
            (
                found["plan"].replace(arguments.directory, "DIR"),
                f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}",
                f"{found['seconds']:.1f}",
                f"{found['moved'] / 1e9:.2f}",
                f"{found['moved'] / found['least']:.3f}",
                f"{found.get('peak_bytes', 0) / 1e9:.2f}",
            )
        ],
    )
    return found


@contextlib.contextmanager
def _cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup of `limit` bytes (version 1, whose counter has the peak), None where none can be made."""
    group = GROUPS / "memory" / f"meshwright-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def _steps(config: decoder.DecoderConfig, directory: str, steps: int, group: str, limit: int) -> dict[str, Any]:
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit // 2, limit // 2))
    plan = f"dp_shard=2 zero=3 update=backward offload=optimizer:nvme={directory},params:nvme={directory}"
    engine = mw.parallelize(
        lambda: decoder.Decoder(config),
        plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-5),
        loss_fn=mw.losses.cross_entropy,
    )
    draw = torch.Generator().manual_seed(engine.data_rank)
    tokens = torch.randint(0, 64, (1, config.sequence), generator=draw)
    losses, seconds, moved = [], [], []
    for _ in range(steps):
        before, start = _moved(engine), time.perf_counter()
        losses.append(engine.step((tokens, tokens.roll(-1, 1))).loss)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        moved.append(_moved(engine) - before)
    counted = torch.tensor([float(moved[-1])], dtype=torch.float64)
    dist.all_reduce(counted)
    elements = sum(entry.shape.numel() for entry in engine.table)
    return {
        "plan": str(engine.plan),
        "losses": losses,
        "seconds": statistics.median(seconds[1:]),
        "moved": counted.item(),
        "least": elements * 4.0 * (2 + 2 + 3),
        "bytes_per_second": counted.item() / statistics.median(seconds[1:]),
    }


def _moved(engine: mw.Engine) -> int:
    """Bytes that this rank's disks have moved."""
    parked = engine._applied.parked
    shelves = [engine.bound.shelf, *([parked.shelf] if parked is not None else [])]  # type: ignore[union-attr]
    return sum(sum(shelf.moved) for shelf in shelves)


# The disk


def _disk(arguments: argparse.Namespace) -> dict[str, Any]:
    """Stream items (a read and a write of each) through a shelf, in turn with a plain loop of direct reads and writes."""
    size = 16 << 20
    count = max(4, int(arguments.gigabytes * 1e9) // size)
    shelf = Shelf([size] * count, [Place(torch.device("cpu"), arguments.directory)] * count)
    for number in range(count):
        shelf.take(number, fresh=True, learn=False).fill_(number % 251)
        shelf.give(number)
    shelf.settle()

    def streamed() -> float:
        start = time.perf_counter()
        for number in range(count):
            shelf.take(number)
            shelf.give(number)
        shelf.settle()
        return time.perf_counter() - start

    plain = _Plain(arguments.directory, size, count)
    streamed()  # learns the order
    rounds = [(streamed(), plain.run(), plain.run(), streamed()) for _ in range(3)]
    shelf.close()
    plain.close()
    ratios = [(b + c) / (a + d) for a, b, c, d in rounds]
    moved = 2 * size * count
    best = {"shelf": moved / min(min(r[0], r[3]) for r in rounds), "plain": moved / min(min(r[1], r[2]) for r in rounds)}
    found = {"bytes": moved, "ratios": ratios, "ratio": statistics.median(ratios), "bytes_per_second": best}
    table(
        f"{moved / 1e9:.1f} GB read and written in items of {size >> 20} MiB",
        ("shelf GB/s", "plain loop GB/s", "ratio (median)"),
        [(f"{best['shelf'] / 1e9:.2f}", f"{best['plain'] / 1e9:.2f}", f"{found['ratio']:.2f}")],
    )
    return found


class _Plain:
    """One thread: read a block, write it back, the next."""

    def __init__(self, directory: str, size: int, count: int) -> None:
        self.path, self.count, self.memory = Path(directory) / f"plain-{os.getpid()}", size * count // BLOCK, aligned(BLOCK)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0))
        assert self.memory.data_ptr() % ALIGNMENT == 0
        self.view = (ctypes.c_char * BLOCK).from_address(self.memory.data_ptr())
        for block in range(self.count):
            os.pwritev(self.file, [self.view], block * BLOCK)

    def run(self) -> float:
        start = time.perf_counter()
        for block in range(self.count):
            os.preadv(self.file, [self.view], block * BLOCK)
            os.pwritev(self.file, [self.view], block * BLOCK)
        return time.perf_counter() - start

    def close(self) -> None:
        os.close(self.file)
        self.path.unlink()


# The host's update


def _optimizer(arguments: argparse.Namespace) -> dict[str, Any]:
    """The streamed AdamW step in bytes per second (it reads four tensors and writes three) against a copy's, in turns."""
    torch.set_num_threads(os.cpu_count() or 1)
    elements = max(1 << 20, int(arguments.gigabytes * 1e9) // 16)
    width = 1 << int(math.log2(elements) / 2)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(4)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = mw.parallelize(
        model, "update=backward", optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), loss_fn=lambda o, _: o.mean()
    )
    for entry in engine.table:
        entry.gradient = torch.randn_like(entry.master)
    bound = engine.bound
    assert bound is not None
    source, target = torch.randn(parameters), torch.empty(parameters)
    plain = [torch.nn.Parameter(torch.randn(width, width)) for _ in range(4)]
    contenders = {"meshwright": bound.step, "copy": lambda: target.copy_(source)}
    whole = torch.optim.AdamW(plain, lr=1e-3, fused=True)
    for parameter in plain:
        parameter.grad = torch.randn_like(parameter)
    contenders["torch fused, whole tensors"] = whole.step
    contenders["its kernel, on meshwright's tensors"] = _kernel(engine)
    other = _deepspeed(plain)
    if other is not None:
        contenders["DeepSpeed CPUAdam"] = other
    moved = dict.fromkeys(contenders, 28.0 * parameters) | {"copy": 8.0 * parameters}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step()
    for number in range(7):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            contenders[name]()
            start = time.perf_counter()
            contenders[name]()
            rates[name].append(moved[name] / (time.perf_counter() - start))
    ratios = {name: statistics.median(a / b for a, b in zip(rates[name], rates["copy"], strict=True)) for name in rates}
    table(
        f"AdamW on {parameters:,} fp32 parameters, {torch.get_num_threads()} threads",
        ("", "GB/s (median)", "of a copy's"),
        [(name, f"{statistics.median(rates[name]) / 1e9:.2f}", f"{ratios[name]:.2f}") for name in rates],
    )
    return {"parameters": parameters, "bytes_per_second": rates, "of_copy": ratios}


def _kernel(engine: mw.Engine) -> Any:
    """One call of torch's fused AdamW on the very tensors that the engine updates: where they lie in memory makes a difference."""
    found: list[list[torch.Tensor]] = [[], [], [], []]
    bound: Any = engine.bound
    for piece, memory in ((piece, bound.shelf.take(one.number)) for one in bound._slices for piece in one.pieces):
        master, gradient = (tensor.detach().view(-1) for tensor in (piece.entry.master, piece.entry.gradient))
        states = [memory[piece.places[key]].view(torch.float32) for key in ("exp_avg", "exp_avg_sq")]
        part = slice(piece.start, piece.start + piece.count)
        for tensors, tensor in zip(found, (master[part], gradient[part], *states), strict=True):
            tensors.append(tensor)
    steps = [torch.tensor(5.0) for _ in found[0]]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8, "amsgrad": False, "maximize": False}
    return lambda: torch._fused_adamw_(*found, [], steps, **options)


def _deepspeed(parameters: list[torch.nn.Parameter]) -> Any:
    """DeepSpeed's CPU Adam over the same tensors, None where it is not installed or does not build."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, lr=1e-3).step
    except Exception as error:
        print(f"DeepSpeed's CPU Adam is left out: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
        return None


if __name__ == "__main__":
    main()
