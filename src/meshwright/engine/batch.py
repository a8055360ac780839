"""How a batch is cut into micro-batches, and what counts as its loss.

A batch is any nested container of tensors with the batch on dim 0 (0-dim tensors and other values belong to every row).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meshwright._torch import tensors_of, tree_map_tensors
from meshwright.errors import ConfigError, DataError


def rows(batch: Any) -> int:
    """Return the size of dim 0 of the batch's tensors, 0 for None.

    Raises `DataError` if there is no tensor with a batch dimension, or if two disagree.
    """
    if batch is None:
        return 0
    sizes = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim()}
    if len(sizes) != 1:
        what = f"tensors with {sorted(sizes)} rows on dim 0" if sizes else "no tensor with a batch dimension"
        raise DataError(f"a batch must hold tensors with one common size on dim 0, and this one holds {what}")
    return sizes.pop()


def split(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into `parts` micro-batches of nearly equal rows, in order; None where the rows run out."""
    if parts == 1 or batch is None:
        return [batch] + [None] * (parts - 1)
    total = rows(batch)
    bounds = [total * part // parts for part in range(parts + 1)]

    def cut(first: int, last: int) -> Any:
        if first == last:
            return None
        return tree_map_tensors(lambda t: t[first:last] if t.dim() else t, batch)

    return [cut(first, last) for first, last in itertools.pairwise(bounds)]


def plain(batch: Any) -> Any:
    """Return a mapping of any class (a Hugging Face `BatchEncoding`, say) as a dict, and anything else as it is."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`; host-to-device copies don't block where the memory is pinned."""
    if all(tensor.device == device for tensor in tensors_of(batch)):
        return batch
    return tree_map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def scalar(loss: Any, what: str) -> Tensor:
    """Return a loss that can be differentiated. Raises `ConfigError` for anything else; `what` begins the sentence."""
    if not isinstance(loss, Tensor) or loss.dim():
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"{what} {found}, not a scalar: return the mean over the batch's items")
    if not loss.requires_grad and torch.is_grad_enabled():
        raise ConfigError(f"{what} a scalar that does not depend on any trainable parameter: nothing would be trained")
    return loss
