"""Measures this machine, one process at a time: matrix products by shape, memory bandwidth, kernels' own time, attention, disk.

The result is one JSON file in the user's cache; `here.py` makes a Cluster of it. Collectives need ranks, so they are measured by
`meshwright doctor --probe`, which starts them, and are kept in the same file.
"""

from __future__ import annotations

import itertools
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
VERSION = 3
"""Of what is measured: an older file is measured anew."""
HEADS = ((128, 32), (256, 64), (1024, 64), (1024, 128))
"""Lengths and features of the attention heads that are timed, forward and backward, without a mask."""
CAUSAL = 2048
"""The length at which attention is timed with the causal mask: kernels skip whole blocks of keys only."""
LARGE = 1 << 26
"""Bytes of a tensor that no cache holds: a step of training finds its operands in memory, not where a tight loop keeps them."""


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
    return found if isinstance(found, dict) and found.get("version") == VERSION else None


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
        found = {"device": device, "cores": os.cpu_count() or 1, "version": VERSION}
        found |= _streams(device) | _products(device) | _attention(device) | _convolutions(device)
        return found | ({"fault_s_per_byte": _faults()} if device == "cpu" else {}) | {"disk_bytes_per_s": _disk()}
    finally:
        torch.set_num_threads(threads)


def _timed(device: str, work: Callable[[], object]) -> float:
    import torch

    def once() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return seconds(once)


def _streams(device: str) -> dict[str, Any]:
    """Bytes per second of ops that do next to nothing with an element and of those that compute, and a kernel's own time."""
    import torch

    large, other, out = (torch.randn(LARGE // 4, device=device) for _ in range(3))
    add = _timed(device, lambda: torch.add(large, other, out=out))
    gelu = _timed(device, lambda: torch.ops.aten.gelu.out(large, out=out))

    def chain() -> None:
        leaf = torch.ones(16, device=device, requires_grad=True)
        value = leaf
        for _ in range(100):
            value = value.sin()
        value.sum().backward()

    kernel = _timed(device, chain) / 300  # a sine, and in the backward a cosine and a product
    return {"kernel_s": kernel, "memory_bytes_per_s": 3 * LARGE / add, "pointwise_bytes_per_s": 2 * LARGE / gelu}


def _products(device: str) -> dict[str, Any]:
    """FLOP per second by shape, on operands that come from memory."""
    import torch

    found = []
    for m, n, k in SHAPES:
        many = max(1, LARGE // (4 * (m * k + k * n)))
        pairs = itertools.cycle([(torch.randn(m, k, device=device), torch.randn(k, n, device=device)) for _ in range(many)])
        took = _timed(device, lambda: torch.mm(*next(pairs)))  # noqa: B023 (called here and now)
        found.append({"m": m, "n": n, "k": k, "flops_per_s": 2 * m * n * k / took})
    return {"products": found}


def _attention(device: str) -> dict[str, Any]:
    """FLOP per second over the whole square by length and head, and the part of it that a causal mask leaves."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention

    def both(query: torch.Tensor, causal: bool) -> tuple[float, float]:
        forward = _timed(device, lambda: attend(query, query, query, is_causal=causal))
        query.requires_grad_()
        result = attend(query, query, query, is_causal=causal)
        seed = torch.ones_like(result)
        back = _timed(device, lambda: torch.autograd.grad(result, query, seed, retain_graph=True))
        return forward, back

    found = []
    for length, head in HEADS:
        flops = 4 * 4 * length**2 * head
        forward, back = both(torch.randn(1, 4, length, head, device=device), causal=False)
        found.append({"length": length, "head": head, "flops_per_s": flops / forward, "back_flops_per_s": 2.5 * flops / back})
    whole, masked = (both(torch.randn(1, 1, CAUSAL, 64, device=device), causal)[0] for causal in (False, True))
    return {"attention": found, "causal_part": min(1.0, masked / whole)}


def _convolutions(device: str) -> dict[str, Any]:
    """FLOP per second of a convolution's forward and of its backward (both gradients), with the gradients' own layouts."""
    import torch

    image, weight = torch.randn(16, 64, 32, 32, device=device), torch.randn(64, 64, 3, 3, device=device)
    sizes = ([64], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True])
    forward = _timed(device, lambda: torch.nn.functional.conv2d(image, weight, padding=1))
    back = _timed(device, lambda: torch.ops.aten.convolution_backward(image, image, weight, *sizes))
    flops = 2 * image.numel() * 64 * 9
    return {"conv_flops_per_s": flops / forward, "conv_back_flops_per_s": 2 * flops / back}


def _faults() -> float:
    """Seconds per byte that the first touch of new memory takes beyond writing it again."""
    import torch

    kept = torch.empty(LARGE // 4)
    fresh = seconds(lambda: torch.empty(LARGE // 4).fill_(1.0))
    return max(0.0, fresh - seconds(lambda: kept.fill_(1.0))) / LARGE


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
