"""Seconds of a collective over a group of ranks: alpha-beta, with the topology of the cluster.

Ranks are numbered with `tp` innermost, then `cp`, the data axes, and `pp` outermost. A group of n ranks has g members in each
domain of the fast link; between domains each member uses its own share of the network cards, so a communicator with g members per
domain gets g shares, and all communicators of a host together get the host's. Volumes: ring all-reduce 2 S (n-1)/n, all-gather and
reduce-scatter S (n-1)/n, all-to-all S (n-1)/n. Latency: rings step over every rank, an all-reduce between hosts climbs a tree.
Source: NCCL's tuning model (tuning.cc) for the form; constants.toml for the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from meshwright.cluster import Cluster
from meshwright.plan.constants import constants


@dataclass(frozen=True)
class Group:
    """`n` ranks, `near` of them in one domain of the fast link; bytes per second of its ring, and the time of its steps."""

    n: int
    near: int
    ring: float
    intra: float
    inter: float
    step_s: float
    far_step_s: float
    base_s: float
    reduce: float = 1.0
    host_s: float = 0.0
    """What the host waits in each collective (see `Cluster.peer_s`)."""
    timed: tuple[tuple[str, tuple[tuple[float, float], ...]], ...] = ()
    """What was measured in groups of this size: (bytes, seconds) by collective."""
    whole_scatter: bool = False
    """Whether a reduce-scatter is made of an all-reduce, as gloo's is."""

    @property
    def crosses(self) -> bool:
        """Whether it leaves the fast link's domain."""
        return self.near < self.n


def group(cluster: Cluster, n: int, stride: int) -> Group:
    """The group of `n` ranks that lie `stride` apart."""
    near = max(1, min(n, cluster.domain // stride)) if stride <= cluster.domain else 1
    inter = cluster.inter.bytes_per_s
    ring = cluster.intra.bytes_per_s if near >= n else min(near * inter, cluster.intra.bytes_per_s if near > 1 else math.inf)
    base = constants()["collective"]["base_us"] * 1e-6 if cluster.device.kernels != "cpu" else 0.0
    reduce = (cluster.intra if near >= n else cluster.inter).reduce
    steps = cluster.intra.latency_s, cluster.inter.latency_s
    cpu, timed = cluster.device.kernels == "cpu", tuple((name, points) for name, ranks, points in cluster.timed if ranks == n)
    return Group(n, near, ring, cluster.intra.bytes_per_s, inter, *steps, base, reduce, n * cluster.peer_s, timed, cpu)


def _measured(g: Group, name: str, size: float) -> float | None:
    """Seconds on the line between the two nearest sizes that were measured; None if none were."""
    for known, points in g.timed:
        if known == name:
            before, after = next((pair for pair in pairwise(points) if size <= pair[1][0]), points[-2:])
            part = max(0.0, size - before[0]) / (after[0] - before[0])
            return before[1] + part * (after[1] - before[1])
    return None


def all_reduce(g: Group, size: float) -> float:
    """Seconds to sum `size` bytes over the group."""
    if g.n == 1 or size <= 0:
        return 0.0
    if (seconds := _measured(g, "all_reduce", size)) is not None:
        return seconds
    far = 2 * math.log2(max(2, g.n // g.near)) * g.far_step_s if g.crosses else 0.0
    return float(g.base_s + g.host_s + 2 * (g.near - 1) * g.step_s + far + 2 * size * (g.n - 1) / g.n / (g.ring * g.reduce))


def gather(g: Group, size: float) -> float:
    """Seconds of an all-gather to `size` bytes in all."""
    if g.n == 1 or size <= 0:
        return 0.0
    if (seconds := _measured(g, "all_gather", size)) is not None:
        return seconds
    # In every step of a ring all ranks send at once, so each takes as long as its slowest hop.
    steps = (g.n - 1) * (g.far_step_s if g.crosses else g.step_s)
    return g.base_s + g.host_s + steps + size * (g.n - 1) / g.n / g.ring


def scatter(g: Group, size: float) -> float:
    """Seconds of a reduce-scatter from `size` bytes in all: those of an all-gather, or of an all-reduce over gloo."""
    if (seconds := _measured(g, "reduce_scatter", size)) is not None and size > 0:
        return seconds
    return all_reduce(g, size) if g.whole_scatter else gather(g, size)


def all_to_all(g: Group, size: float) -> float:
    """Seconds for every rank to send its `size` bytes in equal parts to all."""
    if g.n == 1 or size <= 0:
        return 0.0
    far = size * (g.n - g.near) / g.n / g.inter
    near = size * (g.near - 1) / g.n / g.intra
    latency = (g.near - 1) * g.step_s + (g.n // g.near - 1) * g.far_step_s
    return g.base_s + g.host_s + latency + max(far, near)


def send(cluster: Cluster, stride: int, size: float) -> float:
    """Seconds to send `size` bytes to the rank `stride` further."""
    if size <= 0:
        return 0.0
    link = cluster.intra if stride < cluster.domain else cluster.inter
    return float(constants()["collective"]["base_us"]) * 1e-6 + link.latency_s + size / link.bytes_per_s
