"""Measures this machine, one process at a time: matrix products by shape, memory bandwidth, kernels' own time, attention, disk.

The result is one JSON file in the user's cache; `here.py` makes a Cluster of it. Collectives need ranks, so they are measured by
`meshwright doctor --probe`, which starts them, and are kept in the same file.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshwright.errors import ConfigError

SHAPES = ((64, 256, 256), (256, 256, 1024), (512, 512, 512), (1024, 1024, 1024))
"""Rows, columns and inner sizes of the products that are timed."""


def cache_file() -> Path:
    """Where the measurements of this machine lie: `$MESHWRIGHT_CACHE`, else the user's cache folder."""
    folder = os.environ.get("MESHWRIGHT_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "meshwright"
    )
    return Path(folder) / "probe.json"


def load() -> dict[str, Any] | None:
    """What was measured before; None if nothing was. Raises `ConfigError` for a file that is something else."""
    path = cache_file()
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not a probe's result: delete it and run meshwright doctor --probe") from error
    return found


def save(measured: dict[str, Any]) -> Path:
    """Write the measurements, whole or not at all; returns the file."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(measured, indent=1) + "\n")
    beside.replace(path)
    return path


def seconds(work: Callable[[], object], least: float = 0.05) -> float:
    """The best seconds of one call, of as many as fit into `least` seconds three times."""
    work()
    best, spent = float("inf"), 0.0
    while spent < 3 * least:
        began = time.perf_counter()
        work()
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
    return best


def measure() -> dict[str, Any]:
    """Rates of one device or, on CPU, of one process with one thread. Units: seconds, bytes and FLOP per second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"device": device, "cores": os.cpu_count() or 1} | _kernels(device) | {"disk_bytes_per_s": _disk()}
    finally:
        torch.set_num_threads(threads)


def _kernels(device: str) -> dict[str, Any]:
    import torch

    def timed(work: Callable[[], object]) -> float:
        def once() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return seconds(once)

    products = []
    for m, n, k in SHAPES:
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        products.append({"m": m, "n": n, "k": k, "flops_per_s": 2 * m * n * k / timed(lambda a=a, b=b: a @ b)})  # type: ignore[misc]
    small, large = torch.randn(16, device=device), torch.randn(1 << 22, device=device)
    out = torch.empty_like(large)
    query = torch.randn(1, 4, 256, 64, device=device)
    image, weight = torch.randn(8, 64, 32, 32, device=device), torch.randn(64, 64, 3, 3, device=device)
    convolve = timed(lambda: torch.nn.functional.conv2d(image, weight, padding=1))
    attend = timed(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True))
    gelu = timed(lambda: torch.nn.functional.gelu(large))
    return {
        "products": products,
        "kernel_s": timed(lambda: small + small),
        "memory_bytes_per_s": 3 * large.numel() * 4 / timed(lambda: torch.add(large, large, out=out)),
        "pointwise_bytes_per_s": 2 * large.numel() * 4 / gelu,
        "conv_flops_per_s": 2 * image.numel() * 64 * 9 / convolve,
        "attention_flops_per_s": 4 * 4 * 256 * 256 * 64 / 2 / attend,
    }


def _disk() -> float:
    """Bytes per second of a synchronised write of 16 MiB to the temporary folder."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile() as file:
        began = time.perf_counter()
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return 16 * len(block) / (time.perf_counter() - began)
