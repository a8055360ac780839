"""`Cluster.here()`: this machine as a Cluster, from its driver's names, its catalog entry, and what a probe measured."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from meshwright.cluster import catalog, probe
from meshwright.cluster.cluster import Cluster, Link


def this_machine(ranks: int | None = None) -> Cluster:
    """One node of `ranks` devices (default: its GPUs, or its cores); CPU ranks share memory and, beyond the cores, time."""
    import torch

    if torch.cuda.is_available():
        name = catalog.by_driver_name(torch.cuda.get_device_name(0))
        count = ranks or torch.cuda.device_count()
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        base = Cluster.parse(f"{count}x{name}" if name else f"{count}xA100-80GB")
        device = dataclasses.replace(base.device, memory_bytes=int(memory * 1e9), name=torch.cuda.get_device_name(0))
        return dataclasses.replace(base, device=device, text="here")
    cores = os.cpu_count() or 1
    count = ranks or cores
    base = Cluster.parse(f"{count}xCPU")
    device = dataclasses.replace(base.device, memory_bytes=_memory() // count, name=f"CPU core ({cores} here)")
    cluster = dataclasses.replace(base, device=device, text="here")
    measured = probe.load()
    return _measured(cluster, measured, cores) if measured and measured.get("device") == "cpu" else cluster


def _memory() -> int:
    """Bytes of memory of this machine."""
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))


def _measured(cluster: Cluster, measured: dict[str, Any], cores: int) -> Cluster:
    """The cluster with what a probe found. Ranks share cores and their threads: each gets the part of a core that was measured."""
    best = max(product["flops_per_s"] for product in measured["products"])
    sizes = {int(size): rate for size, rate in measured.get("collectives", {}).items()}
    together = sizes.get(cluster.per_node, {}).get("flops_per_s", best * cores / cluster.per_node)
    part = min(1.0, together / best)
    small = min(measured["products"], key=lambda product: product["m"] * product["n"] * product["k"])
    rates = {
        "kernel_s": measured["kernel_s"],
        "kernel_us": measured["kernel_s"] * 1e6 / part,
        "rate": 1.0,
        "m0": max(0.0, best / small["flops_per_s"] - 1) * small["m"] / 3,
        "n0": max(0.0, best / small["flops_per_s"] - 1) * small["n"] / 6,
        "k0": 0.0,
        "stream": measured["pointwise_bytes_per_s"] / measured["memory_bytes_per_s"],
        "conv": measured.get("conv_flops_per_s", best) / best,
        "plain": measured["memory_bytes_per_s"] * part,
        "attention": measured["attention_flops_per_s"] / best,
        "attention_s0": 0.0,
        "attention_head0": 0.0,
    }
    device = dataclasses.replace(
        cluster.device,
        peak=tuple((dtype, best * part * (1.0 if dtype == "float32" else 0.5)) for dtype, _ in cluster.device.peak),
        memory_bytes_per_s=measured["memory_bytes_per_s"] * part,
        rates=tuple(rates.items()),
    )
    near = min(sizes, key=lambda size: abs(size - cluster.per_node), default=None)
    if near is None:
        return dataclasses.replace(cluster, device=device)
    link = Link(sizes[near]["bytes_per_s"], sizes[near]["latency_s"], measured.get("backend", "gloo"))
    return dataclasses.replace(cluster, device=device, intra=link, inter=link)
