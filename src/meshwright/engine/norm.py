"""The gradient norm over every axis: each logical element counted once, the same value on every rank."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from meshwright.parallel.parameters import Parameter
from meshwright.parallel.ranks import Ranks

CLIP_EPSILON = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm before dividing by it."""


def square_sum(table: list[Parameter], ranks: Ranks) -> Tensor:
    """Return this rank's share of the squared gradient norm: a scalar whose sum over all ranks is the whole.

    An element stands on every rank, less those axes that divide it: rows over `dp_shard`, a cut dim over `tp`, its place over
    `pp`, where the first rank that holds it counts it. A tied weight is one entry of the table and counts once. A float64 scalar on
    the gradients' device.
    """
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    replicas = ranks.world_size // ranks.size("pp")
    for sharded, cut in itertools.product((True, False), repeat=2):
        alike = [e for e in table if e.sharded == sharded and (e.cut is not None) == cut and e.homes[0] == ranks.pp_rank]
        gradients = [e.gradient for e in alike if e.gradient is not None and e.gradient.numel()]
        if not gradients:
            continue
        copies = replicas // ((ranks.size("dp_shard") if sharded else 1) * (ranks.size("tp") if cut else 1))
        norms = torch.stack(torch._foreach_norm(gradients))
        total += norms.double().square().sum() / copies
    return total


def clip_coefficient(norm: float, limit: float | None) -> float:
    """Return what gradients are multiplied by so that their norm is at most `limit` (torch's formula), 1 without a limit."""
    return 1.0 if limit is None else min(1.0, limit / (norm + CLIP_EPSILON))


def scale(table: list[Parameter], coefficient: float) -> None:
    """Multiply every gradient in place; free where the coefficient is 1."""
    gradients = [entry.gradient for entry in table if entry.gradient is not None]
    if coefficient != 1.0 and gradients:
        torch._foreach_mul_(gradients, coefficient)
