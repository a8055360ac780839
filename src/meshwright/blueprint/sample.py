"""A batch for the capture, at any micro-batch size, and how it is handed to the model.

Integers keep the values of the given batch (its rows repeat), since a model's Python may look at them; floats become
fake. The way a batch meets a model is the one of DESIGN section 4: a dict by the names that `forward` accepts, a list
or tuple by its first entry, a tensor as it is, or by a `forward_fn`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from meshwright.blueprint.execute import LARGEST_REAL, Execution
from meshwright.blueprint.trees import map_tensors, tensors_in
from meshwright.errors import ModelError


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


def call_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that hand `batch` to `model.forward`."""
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return (), dict(batch)
        return (), {key: value for key, value in batch.items() if key in parameters}
    if isinstance(batch, tuple | list):
        return (batch[0],), {}
    return (batch,), {}


ForwardFn = Callable[[nn.Module, Any], Any]
LossFn = Callable[[Any, Any], torch.Tensor]
