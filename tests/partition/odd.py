"""Runs one odd module under a plan and on one device, on every rank: loss, gradients, norm, buffers, or the refusal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright._torch import tree_map_tensors
from meshwright.errors import MeshwrightError


@dataclass(frozen=True)
class Odd:
    """`batches` are global ones; the first is the example. `loss(output, batch)` is their rows' mean."""

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    loss: Callable[[Any, Any], Tensor]


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch[0] if isinstance(batch, tuple) else batch)


def _model(case: Odd) -> nn.Module:
    torch.manual_seed(3)
    return case.build().double()


def _share(batch: Any, rank: int, of: int) -> Any:
    return tree_map_tensors(lambda t: t.tensor_split(of)[rank] if t.dim() else t, batch)


def expected(case: Odd) -> list[dict[str, Any]]:
    """What one device computes for each batch in turn, with SGD of rate 0.1 in between."""
    model, found = _model(case), []
    for batch in case.batches():
        model.zero_grad()
        loss = case.loss(_forward(model, tree_map_tensors(torch.clone, batch)), batch)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found.append({"loss": loss.item(), "gradients": gradients, "state": state})
    return found


def error(found: Tensor, wanted: Tensor, floor: float) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    worst = (found - wanted).abs().max().item() / max(wanted.abs().max().item(), floor)
    return worst if worst == worst else float("inf")


def compare(case: Odd, plan: str) -> dict[str, float] | str:
    """Relative errors above 1e-9 by what they are of, on rank 0; the sentence of a refusal. Every rank must call it."""
    torch.set_num_threads(1)
    wanted = expected(case)
    batches = case.batches()
    wrong: dict[str, float] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            keywords: dict[str, Any] = {"loss_fn": case.loss, "example_batch": batches[0]}
            rate = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
            engine = mw.parallelize(_model(case), plan, optimizer=rate, **keywords)
            by_hand = mw.parallelize(_model(case), plan, optimizer=rate, **keywords)
        share = [_share(batch, engine.data_rank, engine.data_ranks) for batch in batches]
        for step, (batch, want) in enumerate(zip(share, wanted, strict=True)):
            metrics = engine.step(tree_map_tensors(torch.clone, batch))
            after = engine.full_state_dict()
            loss = case.loss(by_hand(tree_map_tensors(torch.clone, batch)), batch)
            by_hand.backward(loss)
            gradients = by_hand.full_gradients()
            by_hand.optimizer_step()
            if engine.ranks.rank:
                continue
            largest = max(g.abs().max().item() for g in want["gradients"].values() if g.numel())
            norm = torch.stack([g.square().sum() for g in _unique(engine, want["gradients"])]).sum().sqrt().item()
            wrong[f"{step} loss"] = abs(metrics.loss - want["loss"]) / max(abs(want["loss"]), 1e-12)
            wrong[f"{step} norm"] = abs(metrics.grad_norm - norm) / norm
            for name, gradient in want["gradients"].items():
                wrong[f"{step} gradient {name}"] = error(gradients[name], gradient, 1e-3 * largest) if name in gradients else 9.9
            for name, value in want["state"].items():
                wrong[f"{step} after {name}"] = error(after[name].double(), value.double(), 1e-3)
    except MeshwrightError as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return {what: value for what, value in wrong.items() if not value < 1e-9}


def _unique(engine: Any, gradients: dict[str, Tensor]) -> list[Tensor]:
    return [gradients[entry.name] for entry in engine.table if entry.name in gradients]
