"""Measures what ranks do to each other: collectives as they occur between computations, and cores that ranks share.

A collective among ranks that have just computed takes longer than one in a tight loop: caches hold other data, threads sleep, and
ranks arrive one after the other. So each is timed as what it adds to a loop of computations, in groups of every size that divides
the ranks, all groups at once. Run as a rank of `meshwright doctor --probe`; rank 0 writes one line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from meshwright import _torch
from meshwright.cluster.probe import LARGE
from meshwright.parallel.ranks import connect

SIZES = (1 << 12, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Bytes that are reduced, gathered to, or reduced and scattered from."""
ROUNDS, REPEAT = 7, 3


def _operations(n: int, size: int, group: Any, device: str) -> dict[str, Callable[[], object]]:
    """Collectives over a group of `n` ranks that have `size` bytes on every rank when they are whole."""
    whole, part = torch.ones(size // 4, device=device), torch.ones(size // 4 // n, device=device)
    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: _torch.all_gather(whole, part, group).wait(),
        "reduce_scatter": lambda: _torch.reduce_scatter(part, whole, group).wait(),
    }


class Between:
    """Times what an operation adds to each turn of a loop that computes; all ranks together."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.a, self.b = (torch.randn(512, 512, device=device) for _ in range(2))
        self.other = torch.randn(1 << 20, device=device)

    def compute(self) -> None:
        """What an op of a model does between two collectives: a product, and a pass over memory."""
        torch.mm(self.a, self.b)
        torch.nn.functional.relu(self.other)

    def loop(self, operation: Callable[[], object] | None) -> float:
        """Seconds of a turn on the slowest rank."""
        dist.barrier()
        began = time.perf_counter()
        for _ in range(REPEAT):
            self.compute()
            if operation is not None:
                operation()
        if self.device == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor((time.perf_counter() - began) / REPEAT, dtype=torch.float64, device=self.device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)  # 8 bytes over all ranks
        return took.item()

    def added(self, operation: Callable[[], object]) -> float:
        """Seconds that the operation adds to a turn (median over rounds with and without it in turns)."""
        self.loop(operation)
        return max(1e-6, statistics.median(self.loop(operation) - self.loop(None) for _ in range(ROUNDS)))


def line(points: list[tuple[int, float]]) -> dict[str, float]:
    """Latency and bytes per second of a line through (bytes, seconds), each point weighted by its relative error."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    x = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    y = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    square = sum(w * (size - x) ** 2 for w, (size, _) in zip(weights, points, strict=True))
    slope = sum(w * (size - x) * (seconds - y) for w, (size, seconds) in zip(weights, points, strict=True)) / square
    slope = max(slope, 1e-12)
    return {"latency_s": max(0.0, y - slope * x), "bytes_per_s": 1 / slope}


def collectives(device: str) -> dict[str, Any]:
    """By group size: each collective's line, with the (bytes, seconds) that it goes through; all ranks together call it."""
    world = dist.get_world_size()
    between = Between(device)
    found: dict[str, Any] = {}
    for n in (n for n in range(2, world + 1) if world % n == 0):
        group = dist.new_subgroups(n)[0] if n < world else dist.group.WORLD
        timed: dict[str, list[tuple[int, float]]] = {}
        for size in SIZES:
            for name, operation in _operations(n, size, group, device).items():
                timed.setdefault(name, []).append((size, between.added(operation)))
        found[str(n)] = {name: line(points) | {"points": points} for name, points in timed.items()}
    return found


def together(device: str) -> dict[str, float]:
    """What each rank gets of cores and of memory while all ranks do the same: less than alone, where they share either."""
    a = torch.randn(512, 512, device=device)
    large, out = (torch.randn(LARGE // 4, device=device) for _ in range(2))
    return {
        "flops_per_s": busy(lambda: a @ a, 2 * 512**3, device),
        "memory_bytes_per_s": busy(lambda: torch.add(large, large, out=out), 2 * LARGE, device),
        "pointwise_bytes_per_s": busy(lambda: torch.ops.aten.gelu.out(large, out=out), 2 * LARGE, device),
    }


def busy(work: Callable[[], object], amount: float, device: str, seconds: float = 0.2, rounds: int = 5) -> float:
    """`amount` of work per second of each rank while all ranks do it. The best of some rounds: what else runs now may not later."""
    best = 0.0
    for _ in range(rounds):
        work()
        dist.barrier()
        began, times = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            work()
            times += 1
        if device == "cuda":
            torch.cuda.synchronize()
        rate = torch.tensor(amount * times / (time.perf_counter() - began), device=device)
        dist.all_reduce(rate)  # 4 bytes over all ranks
        best = max(best, rate.item() / dist.get_world_size())
    return best


def main() -> None:
    """Measure as the rank that the environment describes, and leave."""
    torch.set_num_threads(1)
    connect()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = together(device) | {"groups": collectives(device)}
    if dist.get_rank() == 0:
        text = json.dumps(found | {"ranks": dist.get_world_size(), "backend": dist.get_backend()})
        with open(os.environ["MESHWRIGHT_MEASURED"], "w") as file:
            file.write(text)
    dist.barrier()
    dist.destroy_process_group()
