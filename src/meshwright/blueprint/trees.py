"""Finding and replacing tensors in what a user's function takes or returns: dicts, tuples, dataclasses, outputs.

`torch.utils._pytree` does not look into unregistered dataclasses and is private, so this is a small own walk. Anything
else is a leaf that is passed on as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch


def map_tensors(value: Any, change: Callable[[Any], Any], leaf: type | tuple[type, ...] = torch.Tensor) -> Any:
    """A copy of `value` with every tensor (or `leaf`) in it replaced by `change(tensor)`; other leaves stay the same
    objects.
    """
    if isinstance(value, leaf):
        return change(value)
    if isinstance(value, tuple):
        items = [map_tensors(item, change, leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(item, change, leaf) for item in value]
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_tensors(item, change, leaf)
        return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                object.__setattr__(changed, field.name, map_tensors(getattr(value, field.name), change, leaf))
        return changed
    return value


def tensors_in(*values: Any, leaf: Any = torch.Tensor) -> list[Any]:
    """Every distinct tensor (or `leaf`) in `values`, in the order in which a walk meets them."""
    found: dict[int, Any] = {}

    def note(tensor: Any) -> Any:
        found.setdefault(id(tensor), tensor)
        return tensor

    for value in values:
        map_tensors(value, note, leaf)
    return list(found.values())


def signature(value: Any) -> Any:
    """A hashable description: tensors by dtype, shape, strides and whether they need a gradient, other leaves by value.

    Objects that don't compare by value (a cache, a module) are described by their identity.
    """
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape), tuple(value.stride()), value.requires_grad)
    if isinstance(value, tuple | list):
        return (type(value).__name__, tuple(signature(item) for item in value))
    if isinstance(value, Mapping):
        return (type(value).__name__, tuple((key, signature(item)) for key, item in value.items()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return (type(value).__name__, tuple((name, signature(getattr(value, name, None))) for name in names))
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return (type(value).__name__, str(value))
    return ("object", id(value))
