"""`Cluster.here()`: this machine as a Cluster, from its driver's names, its catalog entry, and what a probe measured."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import os
import statistics
from typing import Any

from meshwright.cluster import catalog, probe
from meshwright.cluster.cluster import Cluster, Link
from meshwright.errors import ConfigError


def this_machine(ranks: int | None = None) -> Cluster:
    """One node of `ranks` devices (default: its GPUs, or its cores); CPU ranks share memory and, beyond the cores, time.

    Raises `ConfigError` for a GPU that is not in the catalog: no other's rates stand in for its own.
    """
    import torch

    if torch.cuda.is_available():
        driver = torch.cuda.get_device_name(0)
        name = catalog.by_driver_name(driver)
        if name is None:
            raise ConfigError(_unknown(driver))
        base = Cluster.parse(f"{ranks or torch.cuda.device_count()}x{name}")
        device = dataclasses.replace(base.device, memory_bytes=torch.cuda.get_device_properties(0).total_memory, name=driver)
        return dataclasses.replace(base, device=device, text="here")
    cores = os.cpu_count() or 1
    count = ranks or cores
    base = Cluster.parse(f"{count}xCPU")
    device = dataclasses.replace(base.device, memory_bytes=_memory() // count, name=f"CPU core ({cores} here)")
    cluster = dataclasses.replace(base, device=device, text="here")
    measured = probe.load()
    return _measured(cluster, measured, cores) if measured and measured["device"] == "cpu" else cluster


def _unknown(driver: str) -> str:
    """What to do about a GPU that the catalog lacks: of its names those that share most with the driver's."""
    known = {driver_name: name for name, entry in catalog.devices().items() for driver_name in entry["driver_names"]}
    words = driver.removeprefix("NVIDIA ").removeprefix("AMD ").removeprefix("Instinct ")
    near = dict.fromkeys(known[match] for match in difflib.get_close_matches(words, known, n=3, cutoff=0.0))
    likes = " or ".join(f'like = "{name}"' for name in near if name != "CPU")
    return (
        f"this machine's GPU {driver!r} is not in the catalog: give its rates in a TOML file, with {likes} in [device] for the rest"
    )


def _memory() -> int:
    """Bytes of memory of this machine."""
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))


def _measured(cluster: Cluster, measured: dict[str, Any], cores: int) -> Cluster:
    """The cluster with what a probe found. Ranks share cores and their threads: each gets the part of a core that was measured."""
    best = max(product["flops_per_s"] for product in measured["products"])
    sizes = {int(size): found for size, found in measured.get("collectives", {}).items()}
    near = min(sizes, key=lambda size: abs(size - cluster.per_node), default=None)
    among = sizes[near] if near and cluster.per_node > 1 else None
    share = min(1.0, cores / cluster.per_node)  # a rank may have been lucky, but all together have no more than the cores
    part = min(share, among["flops_per_s"] / best) if among else share
    memory, pointwise = (
        min(measured[name] * part, among[name] if among else math.inf) for name in ("memory_bytes_per_s", "pointwise_bytes_per_s")
    )
    small = min(measured["products"], key=lambda product: product["m"] * product["n"] * product["k"])
    lost = max(0.0, best / small["flops_per_s"] - 1)
    rates = {
        "kernel_s": measured["kernel_s"],
        "kernel_us": measured["kernel_s"] * 1e6 / part,
        "rate": 1.0,
        "m0": lost * small["m"] / 3,
        "n0": lost * small["n"] / 6,
        "k0": 0.0,
        "stream": pointwise / memory,
        "conv": measured["conv_flops_per_s"] / best,
        "conv_back": measured["conv_back_flops_per_s"] / best,
        "plain": memory,
        "share": share,
        "causal_block": max(0.0, probe.CAUSAL * (2 * measured["causal_part"] - 1)),
        "fault_s_per_byte": measured["fault_s_per_byte"] / part,
    }
    device = dataclasses.replace(
        cluster.device,
        peak=tuple((dtype, best * part * (1.0 if dtype == "float32" else 0.5)) for dtype, _ in cluster.device.peak),
        memory_bytes_per_s=memory,
        rates=tuple((rates | _attention(measured["attention"], best)).items()),
    )
    cluster = dataclasses.replace(cluster, device=device)
    return cluster if near is None else _linked(cluster, sizes[near]["groups"], measured.get("backend", "gloo"))


def _attention(found: list[dict[str, float]], best: float) -> dict[str, float]:
    """Constants of `rate * s / (s + s0) * head / (head + head0)`: those of a grid that err least, in ratios. And the backward's."""

    def fit(s0: float, head0: float) -> tuple[float, float, float, float]:
        logs = []
        for at in found:
            shape = at["length"] / (at["length"] + s0) * at["head"] / (at["head"] + head0)
            logs.append(math.log(at["flops_per_s"] / best / shape))
        return statistics.pvariance(logs), math.exp(statistics.mean(logs)), s0, head0

    grid = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
    _, rate, s0, head0 = min(fit(*constants) for constants in itertools.product(grid, grid))
    back = statistics.median(at["back_flops_per_s"] / at["flops_per_s"] for at in found)
    return {"attention": rate, "attention_s0": s0, "attention_head0": head0, "attention_back": back}


def _linked(cluster: Cluster, groups: dict[str, Any], backend: str) -> Cluster:
    """The cluster with what was measured of collectives; as a link, what an all-gather over the largest group says."""
    timed = tuple(
        (name, int(n), tuple((float(size), float(seconds)) for size, seconds in found["points"]))
        for n, kinds in groups.items()
        for name, found in kinds.items()
    )
    n = max(map(int, groups))
    whole = groups[str(n)]["all_gather"]
    link = Link(whole["bytes_per_s"] * (n - 1) / n, whole["latency_s"] / (n - 1), backend)
    return dataclasses.replace(cluster, intra=link, inter=link, timed=timed)
