"""What the planner says about a run before it starts, and how right it was in the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from meshwright import losses
from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.record import Blueprint
from meshwright.blueprint.sample import reading
from meshwright.blueprint.spec import ModelSpec, parse_spec
from meshwright.cluster import Cluster
from meshwright.cluster.history import remember
from meshwright.errors import MeshwrightError
from meshwright.parallel.auto import choose, divides
from meshwright.plan import Plan
from meshwright.plan.predict import predict
from meshwright.plan.prediction import Prediction
from meshwright.plan.time import COMPUTE
from meshwright.train.config import Config


def blueprint(config: Config, precision: str) -> Blueprint:
    """The run's model with its loss, as this machine's devices run it. Raises `MeshwrightError` if it can't be captured."""
    spec, batch, device = _sample(config)
    dtype = None if precision == "fp32" else getattr(torch, COMPUTE[precision])
    return inspect(spec.build, batch, loss_fn=losses.cross_entropy, device=device, dtype=dtype)


def _sample(config: Config) -> tuple[ModelSpec, Any, str]:
    """The run's model spec, a batch of two rows for it, and the kind of device that is here."""
    length = config.data.sequence_length
    spec = parse_spec(config.model.spec, sequence=length)
    tokens = torch.zeros(2, length, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens} if spec.library_config is not None else (tokens, tokens)
    return spec, batch, "cuda" if torch.cuda.is_available() else "cpu"


def chosen(config: Config, ranks: int) -> Plan:
    """The plan that `auto` stands for in this run."""
    plan = Plan.parse(config.plan.text, ranks)
    try:
        spec, batch, _ = _sample(config)
        works = divides(spec.build, batch, reading(None, losses.cross_entropy))
        return choose(blueprint(config, plan.precision), config.plan.text, ranks, config.data.global_batch, works)[0]
    except MeshwrightError:
        return plan


def expected(config: Config, plan: Plan) -> Prediction | None:
    """The prediction for a resolved plan on this machine; None for a model that can't be captured."""
    try:
        return predict(blueprint(config, plan.precision), Cluster.here(plan.degree_product()), plan, config.data.global_batch)
    except MeshwrightError as error:
        logging.getLogger("meshwright").info("nothing is predicted for this run: %s", error)
        return None


def compare(prediction: Prediction, seconds: float, peak_bytes: int, device: str, folder: Path) -> str:
    """Remember predicted against measured, and say both in one line. Peak memory is compared on GPUs only: a CPU process holds more
    than its tensors.
    """
    line = {
        "folder": str(folder),
        "plan": prediction.plan,
        "predicted_seconds": prediction.step_seconds,
        "measured_seconds": seconds,
    }
    text = (
        f"predicted {prediction.step_seconds:.4g} s a step, measured {seconds:.4g} ({prediction.step_seconds / seconds - 1:+.0%})"
    )
    if device == "cuda":
        line |= {"predicted_bytes": prediction.memory_bytes["peak"], "measured_bytes": float(peak_bytes)}
        text += f"; predicted {prediction.memory_bytes['peak'] / 1e9:.2f} GB at the peak, measured {peak_bytes / 1e9:.2f}"
    else:
        text += f"; predicted {prediction.memory_bytes['peak'] / 1e6:,.1f} MB of tensors, the process held {peak_bytes / 1e6:,.1f}"
    remember(line)
    return text


def tail(seconds: list[float]) -> float | None:
    """The median time of the steps after the first three, which warm up; None for a run that is too short."""
    kept = sorted(seconds[3:])
    return kept[len(kept) // 2] if kept else None
