"""A batch for the capture, at any micro-batch size, and how it is handed to the model.

Integers keep the values of the given batch (its rows repeat), since a model's Python may look at them; floats become
fake. `caller` is the one rule by which a batch meets a model, in captures and in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from meshwright.blueprint.execute import LARGEST_REAL, Execution
from meshwright.blueprint.trees import map_tensors, tensors_in
from meshwright.errors import DataError, ModelError

ForwardFn = Callable[[nn.Module, Any], Any]
LossFn = Callable[[Any, Any], torch.Tensor]


def batch_items(batch: Any) -> int:
    """The number of items in a batch: the size of dim 0 of its first tensor that has dims. Raises `ModelError` if none
    has.
    """
    for tensor in tensors_in(batch):
        if tensor.dim():
            return int(tensor.shape[0])
    raise ModelError("the batch holds no tensor with a batch dim: pass tensors with the batch on dim 0")


def resized(batch: Any, items: int, execution: Execution, dtype: torch.dtype | None) -> Any:
    """The batch with `items` items: integers by repeating rows, floats as fake tensors (of `dtype` if it is given)."""
    original = batch_items(batch)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        """One tensor with `items` rows."""
        if tensor.dim() and tensor.shape[0] == original:
            shape = (items, *tensor.shape[1:])
        else:
            shape = tuple(tensor.shape)
        if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > LARGEST_REAL:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            with execution.fake:
                return torch.empty(shape, dtype=wanted, device="cpu")
        if tensor.is_meta:
            return torch.zeros(shape, dtype=tensor.dtype, device="cpu")
        if not tensor.dim():
            return tensor.detach().clone().cpu()
        rows = torch.arange(shape[0], device="cpu") % tensor.shape[0]
        return tensor.detach().cpu()[rows]

    return map_tensors(batch, change)


def caller(
    model: nn.Module,
    forward_fn: ForwardFn | None = None,
    dtype: torch.dtype | None = None,
    forward: Callable[..., Any] | None = None,
) -> Callable[[Any], Any]:
    """Return the function from a batch to the model's output: `forward_fn(forward, batch)`, or by the batch's type.

    A dict calls `forward` (the model, or a wrapper of it) with the entries that the model's `forward` accepts by name, a tuple or
    list with its first element, a tensor with itself; floating-point inputs are cast to `dtype` where one is given. Raises
    `DataError` for a batch of another kind, or of which nothing is accepted.
    """
    run = model if forward is None else forward
    if forward_fn is not None:
        return lambda batch: forward_fn(run, batch)  # type: ignore[arg-type]
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def cast(value: Any) -> Any:
        return value if dtype is None else map_tensors(value, lambda t: t.to(dtype) if t.is_floating_point() else t)

    def call(batch: Any) -> Any:
        """Run it on one batch."""
        if isinstance(batch, torch.Tensor):
            return run(cast(batch))
        if isinstance(batch, Mapping):
            accepted = {key: value for key, value in batch.items() if everything or key in named}
            if not accepted:
                raise DataError(
                    f"no entry of the batch ({', '.join(map(str, batch))}) is an argument of forward ({', '.join(named)})"
                )
            return run(**cast(accepted))
        if isinstance(batch, (tuple, list)) and batch:
            return run(cast(batch[0]))
        raise DataError(
            f"a batch is a dict, a tuple, a list or a tensor, not a {type(batch).__name__}: pass forward_fn(model, batch)"
        )

    return call


def reading(forward_fn: ForwardFn | None, loss_fn: LossFn | None) -> Callable[[nn.Module], Callable[[Any], Any]]:
    """Return what gives, for a model, the function from a batch to its loss, or to its output where there is no `loss_fn`."""

    def of(model: nn.Module) -> Callable[[Any], Any]:
        call = caller(model, forward_fn)
        return call if loss_fn is None else lambda batch: loss_fn(call(batch), batch)

    return of
