"""`assert_same_as_single_device`: the judge of every plan.

The reference is plain torch in this process: one forward and backward over the whole global batch, `clip_grad_norm_`, AdamW.
The run under test sees only its ranks' shares. Compared: losses, every gradient, the norm before clipping, the weights after k
steps, in float64 to a relative 1e-9.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import meshwright as mw
import ranks
import zoo
from meshwright._torch import tree_map_tensors

STEPS = 3
CLIP = 0.5
ROWS = 7  # no number of ranks divides it


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def share(batch: Any, rank: int, of: int) -> Any:
    """Rows of the global batch that a data rank feeds: uneven, and the first rank gets the most."""
    total = zoo_rows(batch)
    size = -(-total // of)
    first, last = min(rank * size, total), min((rank + 1) * size, total)
    return tree_map_tensors(lambda t: t[first:last] if t.dim() else t, batch)


def zoo_rows(batch: Any) -> int:
    from meshwright._torch import tensors_of

    return tensors_of(batch)[0].shape[0]


def _forward(model: torch.nn.Module, batch: Any, name: str) -> Any:
    if isinstance(batch, dict):
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "extra")}
        return model(**inputs)
    return model(batch[0] if isinstance(batch, tuple) else batch)


@lru_cache(maxsize=4)
def reference(name: str, dtype: torch.dtype = torch.float64, rows: int = ROWS, steps: int = STEPS) -> dict[str, Any]:
    case = zoo.find(name)
    model = zoo.build(name, dtype)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(steps):
        batch = _to(case.batch(step, rows), dtype)
        loss = case.loss(_forward(model, batch, name), batch)
        loss.backward()
        if step == 0:
            named = dict(model.named_parameters(remove_duplicate=False))
            result["gradients"] = {n: p.grad.clone() for n, p in named.items() if p.grad is not None and p.numel()}
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        result["norms"].append(torch.stack(squares).sum().sqrt().item())
        coefficient = min(1.0, CLIP / (result["norms"][-1] + 1e-6))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= coefficient
        optimizer.step()
        optimizer.zero_grad()
        result["losses"].append(loss.item())
    result["weights"] = {name: value.clone() for name, value in model.state_dict().items()}
    return result


def _to(batch: Any, dtype: torch.dtype) -> Any:
    return tree_map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def under_plan(
    name: str, plan: str, dtype: torch.dtype = torch.float64, rows: int = ROWS, steps: int = STEPS
) -> dict[str, Any] | None:
    """What each rank runs: one engine through `step`, another by hand for the gradients."""
    case = zoo.find(name)
    keywords: dict[str, Any] = {"optimizer": adamw, "loss_fn": case.loss, "count_fn": case.count, "clip_grad_norm": CLIP}
    example = _to(case.batch(0, rows), dtype)
    engine = mw.parallelize(zoo.build(name, dtype), plan, example_batch=example, **keywords)
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(steps):
        batch = share(_to(case.batch(step, rows), dtype), engine.data_rank, engine.data_ranks)
        metrics = engine.step(batch)
        result["losses"].append(metrics.loss)
        result["norms"].append(metrics.grad_norm)
    result["weights"] = engine.full_state_dict()
    if engine.plan.update == "backward":  # its gradients are gone when a step is over
        return result if engine.ranks.rank == 0 else {"losses": result["losses"], "norms": result["norms"]}
    by_hand = mw.parallelize(zoo.build(name, dtype), plan, example_batch=example, **keywords)
    batch = share(example, by_hand.data_rank, by_hand.data_ranks)
    if by_hand.pipeline is not None:
        by_hand.accumulate(batch)
    elif zoo_rows(batch):
        loss = case.loss(by_hand(batch), batch)
        if (case.count or getattr(case.loss, "count", zoo_rows))(batch) == 0:
            loss = loss.nan_to_num()
        by_hand.backward(loss)
    result["gradients"] = by_hand.full_gradients()
    by_hand.optimizer_step()
    names = list(engine.module.state_dict())
    assert names == list(zoo.build(name, dtype).state_dict())
    return result if engine.ranks.rank == 0 else {"losses": result["losses"], "norms": result["norms"]}


def _error(found: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """Largest difference relative to the largest expected value (at least `floor`)."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / max(floor, expected.abs().max().item())).item() if expected.numel() else 0.0


def _tolerance(expected: Tensor, tolerance: float) -> float:
    return max(tolerance, 2e-5) if expected.dtype == torch.float32 else tolerance


def errors(
    name: str, plan: str, world_size: int, dtype: torch.dtype = torch.float64, rows: int = ROWS
) -> dict[str, dict[str, float]]:
    """Largest relative errors of losses, norms, each gradient and each weight, those above their tolerance by name in `wrong`.

    Fails if ranks disagree, or if tensors are missing.
    """
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5}[dtype]
    expected = reference(name, dtype, rows)
    found = ranks.run(world_size, under_plan, name, plan, dtype, rows)
    for rank in found[1:]:
        assert rank["losses"] == found[0]["losses"], "ranks disagree on the loss"
        assert rank["norms"] == found[0]["norms"], "ranks disagree on the norm"
    result: dict[str, dict[str, float]] = {"wrong": {}}
    for key in ("losses", "norms", "gradients", "weights") if "gradients" in found[0] else ("losses", "norms", "weights"):
        one, other = found[0][key], expected[key]
        if isinstance(other, list):  # one number of every parameter: as exact as the least exact of them
            kind = torch.float32 if any(v.dtype == torch.float32 for v in expected["weights"].values()) else torch.float64
            one, other = ({"": torch.tensor(values, dtype=kind)} for values in (one, other))
        assert set(one) == set(other), set(one) ^ set(other)
        # A gradient that is zero but for rounding (a key's bias under softmax) is measured against the model's largest.
        floor = 1e-12 if key in ("losses", "norms") else 1e-3 * max(v.abs().max().item() for v in other.values() if v.numel())
        result[key] = {n: _error(one[n], v, floor) for n, v in other.items()}
        too_far = {n: error for n, error in result[key].items() if not error <= _tolerance(other[n], tolerance)}
        result["wrong"] |= {f"{key} {n}": error for n, error in too_far.items()}
    return result


def assert_same_as_single_device(
    name: str, plan: str, world_size: int, dtype: torch.dtype = torch.float64, rows: int = ROWS
) -> None:
    assert not (wrong := errors(name, plan, world_size, dtype, rows)["wrong"]), wrong
