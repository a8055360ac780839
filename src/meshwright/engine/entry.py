"""`parallelize`: from a model and a plan to an Engine, with everything checked that can be known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from meshwright.blueprint.inspection import inspect
from meshwright.engine.backward import check_clip
from meshwright.engine.batch import rows
from meshwright.engine.engine import Engine, Settings
from meshwright.engine.optimizer import OptimizerFactory
from meshwright.errors import ConfigError, ModelError
from meshwright.parallel.apply import COMPUTE_DTYPES, refuse_unavailable
from meshwright.parallel.auto import choose_here, is_auto
from meshwright.parallel.ranks import connect
from meshwright.parallel.weights import Weights
from meshwright.plan import Plan
from meshwright.plan.recompute import budget_bytes, check_budget


def parallelize(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan | str = "auto",
    *,
    optimizer: OptimizerFactory | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    count_fn: Callable[[Any], int] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    example_batch: Any = None,
    clip_grad_norm: float | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    lr_schedule: Callable[[int], float] | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Engine:
    """Make a model run under a plan, on the ranks that are here; every rank calls it with the same arguments.

    model: a module (changed in place; rank 0's values are the initial ones) or a zero-argument callable that builds one. The
        callable is run on the meta device and its values are drawn from `seed`: the same for every mesh.
    plan: a `Plan`, or its text; `AUTO` degrees take the ranks at hand. A process group that torchrun or Slurm announced is joined.
        `auto` takes the fastest predicted for `example_batch` on each rank.
    optimizer: takes the list of trainable parameters, returns any `torch.optim` optimizer.
    loss_fn: `loss_fn(output, batch)` returns the mean loss over the batch's items, a scalar.
    count_fn: how many items a batch holds; by default `loss_fn.count` if there is one, else its rows.
    forward_fn: `forward_fn(model, batch)` in place of the rule by the batch's type (a dict calls `model` with the entries that
        its forward accepts, a tuple or list with its first element, a tensor with itself).
    example_batch: a batch like those to come (any number of rows). Under tp and cp the model is read from it; under zero=3 a
        rank that has seen no batch yet computes on it, to keep its peers company.
    clip_grad_norm: the largest gradient norm that an update may use.
    on_nonfinite: `stop` raises `TrainingError` on every rank, `skip` leaves the weights as they were; both before the update.
    weights: initial values from a safetensors file, or from a directory with one or several (and their `*.index.json`): every
        parameter by one of its names, each rank reading its own rows.
    lr_schedule: `lr_schedule(step)` is what the learning rates are multiplied by in optimizer step 0, 1, ...

    Raises `PlanError`, `ModelError` or `ConfigError` in one sentence, before anything is allocated where it can be known.
    """
    if on_nonfinite not in ("stop", "skip"):
        raise ConfigError(f"on_nonfinite={on_nonfinite!r} is unknown: use 'stop' or 'skip'")
    _check_model(model)
    parsed = plan if isinstance(plan, Plan) else Plan.parse(plan)
    refuse_unavailable(parsed)
    check_clip(parsed, clip_grad_norm)
    connect()
    if isinstance(plan, str) and is_auto(plan):
        parsed = choose_here(model, plan, example_batch, forward_fn, loss_fn)
    parsed = parsed.resolve(dist.get_world_size() if dist.is_initialized() else 1)
    _check_budget(model, parsed, example_batch, forward_fn, loss_fn)
    settings = Settings(
        loss_fn=loss_fn,
        count_fn=count_fn or getattr(loss_fn, "count", None) or rows,
        forward_fn=forward_fn,
        clip_grad_norm=clip_grad_norm,
        on_nonfinite=on_nonfinite,
        lr_schedule=lr_schedule,
        seed=seed,
        weights=None if weights is None else Weights(weights),
    )
    return Engine(model, parsed, optimizer, settings, example_batch, device)


def _check_budget(model: Any, plan: Plan, example_batch: Any, forward_fn: Any, loss_fn: Any) -> None:
    """Raise `PlanError` for a `recompute=budget` that a micro-batch of one row can't be kept in."""
    if budget_bytes(plan.recompute) is not None and example_batch is not None:
        low = COMPUTE_DTYPES[plan.precision]
        check_budget(inspect(model, example_batch, forward_fn=forward_fn, loss_fn=loss_fn, dtype=low, strict=False), plan, 1)


def _check_model(model: object) -> None:
    """Raise for what is no model, or is one that another engine has divided."""
    if not callable(model):
        raise ConfigError(f"model must be an nn.Module or a function that builds one, not a {type(model).__name__}")
    if isinstance(model, nn.Module) and (
        any(isinstance(child, FSDPModule) for child in model.modules())
        or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    ):
        raise ModelError("this module is already sharded by an engine or by fully_shard: build a new one")
