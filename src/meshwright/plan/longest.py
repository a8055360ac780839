"""`objective="longest"`: the longest sequence that some plan trains on a cluster, by doubling and then halving the step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.record import Blueprint
from meshwright.cluster import Cluster
from meshwright.errors import ConfigError, PlanError
from meshwright.plan.plan import Plan
from meshwright.plan.search import Search, search
from meshwright.plan.suited import spec_of
from meshwright.plan.time import COMPUTE

STEP = 1024
"""Sequences are multiples of this many tokens, so that every common context-parallel degree divides them."""


def longest(
    blueprint: Blueprint,
    cluster: Cluster,
    global_batch: int,
    precision: str,
    top: int,
    compiled: bool,
    fixed: dict[str, Any] | None,
    accepts: Callable[[Plan], bool] | None,
) -> Search:
    """The fastest plans for the longest sequence that fits. Raises `ConfigError` for a model that was not made from a spec."""
    began = time.perf_counter()
    spec = spec_of(blueprint)
    if spec is None or spec.config is None:
        raise ConfigError(
            f"objective='longest' captures the model anew for each length, so it needs a model spec, not {blueprint.model}"
        )
    device = "cpu" if cluster.device.kernels == "cpu" else "cuda"

    def attempt(length: int) -> Search | None:
        """The best plans for `length` tokens; None if none fits."""
        config = dataclasses.replace(spec.config, sequence=length)  # type: ignore[type-var]
        sized = dataclasses.replace(spec, config=config, build=_builder(config))
        captured = inspect(sized, seq=length, dtype=getattr(torch, COMPUTE[precision]), device=device)
        try:
            return search(
                captured, cluster, global_batch, precision, top=top, compiled=compiled, fixed=fixed, accepts=accepts, advise=False
            )
        except PlanError:
            return None

    length, best = STEP, attempt(STEP)
    if best is None:
        raise PlanError(
            f"{blueprint.model} does not fit on {cluster.text or cluster.device.name} even with {STEP} tokens: use more devices"
        )
    while length < STEP * 2**14 and (found := attempt(2 * length)) is not None:
        length, best = 2 * length, found
    step = length // 2
    while step >= max(STEP, length // 16):
        if (found := attempt(length + step)) is not None:
            length, best = length + step, found
        step //= 2
    return dataclasses.replace(
        best, objective="longest", seconds=time.perf_counter() - began, model=best.model | {"sequence": length}
    )


def _builder(config: Any) -> Callable[[], Any]:
    from meshwright.models.decoder import Decoder

    return lambda: Decoder(config)
