"""`plan="auto"`: the best plan for this machine among those that `executable` lets pass.

What this version runs is asked of `apply.refuse_unavailable`, so the choice grows with it, and whether a model can be cut over tp,
cp or pp of the passes that would cut it. Every rank gets rank 0's choice.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshwright.blueprint.execute import build_on_meta
from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.record import Blueprint
from meshwright.blueprint.sample import ForwardFn, LossFn, batch_items, reading
from meshwright.cluster import Cluster
from meshwright.errors import ConfigError, MeshwrightError, PlanError
from meshwright.parallel.apply import refuse_unavailable
from meshwright.parallel.parameters import collect
from meshwright.parallel.partitioned import Partition
from meshwright.parallel.preview import preview
from meshwright.parallel.ranks import from_rank_zero
from meshwright.partition.stages import cut
from meshwright.plan.plan import Plan
from meshwright.plan.prediction import Prediction
from meshwright.plan.search import search
from meshwright.plan.stages import place

_TRIED = 8  # candidates that are asked whether the model can be cut so

Function = Callable[[nn.Module], Callable[[Any], Any]]


def executable(plan: Plan) -> bool:
    """Whether this version runs the plan on some model."""
    try:
        refuse_unavailable(plan)
    except PlanError:
        return False
    return True


def divides(model: nn.Module | Callable[[], nn.Module], batch: Any, function: Function) -> Callable[[Plan], bool]:
    """Return what tells whether the model can be cut as a plan asks, without ranks; `function(module)` computes a batch's loss."""
    module = model if isinstance(model, nn.Module) else build_on_meta(model)

    def works(plan: Plan) -> bool:
        """Try the passes that would cut the model."""
        try:
            if plan.tp > 1 or plan.cp > 1:
                preview(module, plan, function(module), batch)
            if plan.pp > 1:
                partition = Partition(module, collect(module), plan, None)
                partition.choose(function(module), batch)
                trace = partition.traced(function(module), batch)
                names = [call.name for call in trace.calls]
                cut(partition.passed(trace, "loss"), place(plan, names, [1.0] * len(names), [0.0] * len(names)))
        except MeshwrightError:
            return False
        return True

    return works


def is_auto(plan: Plan | str) -> bool:
    """Whether the plan is left to the planner: the name `auto`, with or without fields beside it."""
    return isinstance(plan, str) and "auto" in plan.split()


def choose(
    blueprint: Blueprint, text: str, ranks: int, global_batch: int, works: Callable[[Plan], bool] | None = None
) -> tuple[Plan, Prediction | None]:
    """The plan for `ranks` ranks of this machine, and its prediction; fields beside `auto` are held.

    Plans that cut inside the model (tp, cp, pp) are taken only if `works` says that it can be cut so. A model that can't be
    captured, or for which nothing fits, is sharded over all ranks.
    """
    beside = " ".join(word for word in text.split() if word != "auto")
    asked = Plan.parse(beside)
    names = [word.partition("=")[0] for word in beside.split()]
    fallback = dataclasses.replace(asked, dp_shard=ranks) if ranks > 1 and "dp_shard" not in names else asked
    if not blueprint.captured:
        return fallback, None
    try:
        cluster = Cluster.here(ranks)
    except ConfigError as error:
        logging.getLogger("meshwright").warning("auto can't compare plans, so it takes %s: %s", fallback, error)
        return fallback, None
    fixed = {name: getattr(asked, name) for name in names if name not in ("precision", "compile")}
    fixed.setdefault("offload", "none")
    whole = {"tp": 1, "cp": 1, "pp": 1}
    for held in (fixed, whole | fixed) if works else (whole | fixed,):
        try:
            found = search(
                blueprint,
                cluster,
                global_batch,
                asked.precision,
                top=_TRIED,
                compiled=asked.compile,
                fixed=held,
                accepts=executable,
            )
        except MeshwrightError as error:
            logging.getLogger("meshwright").info("auto finds nothing with %s: %s", held, error)
            continue
        for candidate in found.candidates:
            plan = Plan.parse(candidate.plan)
            if plan.tp == plan.cp == plan.pp == 1 or works is None or works(plan):
                return plan, candidate
    return fallback, None


def choose_here(
    model: nn.Module | Callable[[], nn.Module],
    text: str,
    batch: Any,
    forward_fn: ForwardFn | None,
    loss_fn: LossFn | None,
) -> Plan:
    """The plan for the ranks that are here, chosen by rank 0 for `batch` on each; every rank must call it."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    chosen = str(Plan.parse(text, ranks))
    if batch is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        blueprint = inspect(model, batch, forward_fn=forward_fn, loss_fn=loss_fn, device=device, strict=False)
        works = divides(model, batch, reading(forward_fn, loss_fn))
        chosen = str(choose(blueprint, text, ranks, batch_items(batch) * ranks, works)[0])
    return Plan.parse(from_rank_zero(chosen))
