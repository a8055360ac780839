"""Measures collectives among the ranks that are here: latency of a small all-reduce, bandwidth of a large one.

Run as a rank of `meshwright doctor --probe`; rank 0 prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import time

import torch
import torch.distributed as dist

from meshwright.parallel.ranks import connect

LARGE = 1 << 24
"""Bytes of the all-reduce that tells the bandwidth."""


def ring(repeat: int = 5) -> dict[str, float]:
    """Seconds of one step of a ring and its bytes per second (all ranks together call it)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = dist.get_world_size()
    times = []
    for size in (64, LARGE):
        tensor = torch.ones(size // 4, device=device)
        dist.all_reduce(tensor)  # `size` bytes over all ranks, to warm up
        best = float("inf")
        for _ in range(repeat):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        times.append(best)
    return {"latency_s": times[0] / (2 * (n - 1)), "bytes_per_s": 2 * LARGE * (n - 1) / n / max(1e-9, times[1] - times[0])}


def busy(seconds: float = 0.5) -> float:
    """FLOP/s of each rank's matrix products while all ranks compute: on shared or hyper-threaded cores less than alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(512, 512, device=device)
    a @ a
    dist.barrier()
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        times += 1
    if device == "cuda":
        torch.cuda.synchronize()
    rate = torch.tensor(2 * 512**3 * times / (time.perf_counter() - began), device=device)
    dist.all_reduce(rate)  # 4 bytes over all ranks
    return rate.item() / dist.get_world_size()


def main() -> None:
    """Measure as the rank that the environment describes, and leave."""
    torch.set_num_threads(1)
    connect()
    found = ring() | {"flops_per_s": busy()}
    if dist.get_rank() == 0:
        line = json.dumps(found | {"ranks": dist.get_world_size(), "backend": dist.get_backend()})
        with open(os.environ["MESHWRIGHT_MEASURED"], "w") as file:
            file.write(line)
    dist.barrier()
    dist.destroy_process_group()
