"""`plan="auto"`: the best plan for this machine among those that `executable` lets pass.

What this version runs is asked of `apply.refuse_unavailable`, so the choice grows with it. Every rank gets rank 0's choice.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.record import Blueprint
from meshwright.blueprint.sample import batch_items
from meshwright.cluster import Cluster
from meshwright.errors import MeshwrightError, PlanError
from meshwright.parallel.apply import refuse_unavailable
from meshwright.plan.plan import Plan
from meshwright.plan.prediction import Prediction
from meshwright.plan.search import search

_LONGEST_TEXT = 512


def executable(plan: Plan) -> bool:
    """Whether this version runs the plan on any model that it can be predicted for.

    Plans that cut inside a model depend on more than a prediction sees (which optimizer, what Python looks at), so they are left
    to be asked for.
    """
    if plan.tp > 1 or plan.cp > 1 or plan.pp > 1:
        return False
    try:
        refuse_unavailable(plan)
    except PlanError:
        return False
    return True


def is_auto(plan: Plan | str) -> bool:
    """Whether the plan is left to the planner: the name `auto`, with or without fields beside it."""
    return isinstance(plan, str) and "auto" in plan.split()


def choose(blueprint: Blueprint, text: str, ranks: int, global_batch: int) -> tuple[Plan, Prediction | None]:
    """The plan for `ranks` ranks of this machine, and its prediction; fields beside `auto` are held.

    A model that can't be captured, or for which nothing fits, is sharded over all ranks.
    """
    beside = " ".join(word for word in text.split() if word != "auto")
    asked = Plan.parse(beside)
    names = [word.partition("=")[0] for word in beside.split()]
    fallback = dataclasses.replace(asked, dp_shard=ranks) if ranks > 1 and "dp_shard" not in names else asked
    if not blueprint.captured:
        return fallback, None
    fixed = {name: getattr(asked, name) for name in names if name not in ("precision", "compile")}
    fixed.setdefault("offload", "none")
    try:
        found = search(
            blueprint,
            Cluster.here(ranks),
            global_batch,
            asked.precision,
            top=1,
            compiled=asked.compile,
            fixed=fixed,
            accepts=executable,
        )
    except MeshwrightError as error:
        logging.getLogger("meshwright").info("auto falls back to sharding over all ranks: %s", error)
        return fallback, None
    return found.best, found.candidates[0]


def choose_here(
    model: nn.Module | Callable[[], nn.Module], text: str, batch: Any, loss_fn: Callable[[Any, Any], Any] | None
) -> Plan:
    """The plan for the ranks that are here, chosen by rank 0 for `batch` on each; every rank must call it."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    chosen = str(Plan.parse(text, ranks))
    if batch is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        blueprint = inspect(model, batch, loss_fn=loss_fn, device=device, strict=False)
        chosen = str(choose(blueprint, text, ranks, batch_items(batch) * ranks)[0])
    if ranks > 1:
        letters = torch.zeros(_LONGEST_TEXT, dtype=torch.uint8, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        letters[: len(chosen)] = torch.tensor(list(chosen.encode()), dtype=torch.uint8)
        dist.broadcast(letters, 0)  # 512 bytes over all ranks: the plan's text
        chosen = bytes(letters[letters > 0].tolist()).decode()
    return Plan.parse(chosen)
