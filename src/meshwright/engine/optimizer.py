"""Builds the user's torch optimizer, and points its parameter groups at what this rank updates.

The user's callable sees parameters of true shapes (or uses the model's own, which it may hold from before); afterwards each is
replaced, by identity, with this rank's master. Elementwise optimizers then work on plain local tensors, which saves DTensor's
dispatch on every operation; others (Adafactor, Muon) get DTensors, whose operations know the whole matrix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from meshwright.errors import ConfigError
from meshwright.parallel.parameters import Parameter
from meshwright.parallel.ranks import Ranks

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# Updates of these read nothing but the element itself, its gradient and its states, so rows can be updated apart.
_ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)


class BoundOptimizer:
    """A torch optimizer whose groups hold this rank's masters.

    `torch` is the optimizer itself (for torch's learning-rate schedulers and inspection), `of` gives the tensor that it updates
    for each entry of the parameter table.
    """

    def __init__(self, factory: OptimizerFactory, table: list[Parameter], ranks: Ranks) -> None:
        """Call `factory` and re-bind its groups. Raises `ConfigError` for an optimizer that can't be used."""
        trainable = [entry for entry in table if entry.trainable]
        self.torch = factory([entry.live for entry in trainable])
        if not isinstance(self.torch, torch.optim.Optimizer):
            raise ConfigError(f"optimizer= must return a torch.optim.Optimizer, not a {type(self.torch).__name__}")
        closure = inspect.signature(type(self.torch).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(f"{type(self.torch).__name__} needs to evaluate the loss again in its step: use AdamW, SGD or another")
        elementwise = type(self.torch) in _ELEMENTWISE
        self._updated = {id(entry): _updated(entry, ranks, elementwise) for entry in trainable}
        self._rebind(trainable)
        self.base_rates = [group["lr"] for group in self.torch.param_groups]

    def of(self, entry: Parameter) -> nn.Parameter | None:
        """Return the tensor that the optimizer updates for `entry`, None if it is in no group."""
        return self._updated.get(id(entry))

    def entries(self) -> list[Parameter]:
        """Return the table's entries that the optimizer updates, in the order of its groups."""
        return self._entries

    def _rebind(self, trainable: list[Parameter]) -> None:
        known = {id(tensor): entry for entry in trainable for tensor in (entry.original, entry.live, entry.master)}
        self._entries: list[Parameter] = []
        state, self.torch.state = self.torch.state, type(self.torch.state)(dict)
        for group in self.torch.param_groups:
            entries = []
            for parameter in group["params"]:
                if id(parameter) not in known:
                    shape = list(parameter.shape)
                    raise ConfigError(f"the optimizer was given a tensor of shape {shape} that is not a trainable parameter of the model")
                entry = known[id(parameter)]
                entries.append(entry)
                if parameter in state:  # some optimizers (Adagrad) make their states at once
                    self.torch.state[self._updated[id(entry)]] = _convert(state[parameter], entry, self._updated[id(entry)])
            group["params"] = [self._updated[id(entry)] for entry in entries]
            self._entries += entries
        inside = {id(entry) for entry in self._entries}
        self._updated = {key: value for key, value in self._updated.items() if key in inside}

    def step(self) -> None:
        """Update the masters from each entry's `gradient`; entries without one are left as they are."""
        for entry in self._entries:
            parameter = self._updated[id(entry)]
            gradient = entry.gradient
            if gradient is not None and isinstance(parameter, DTensor):
                gradient = _wrap(gradient, parameter)
            parameter.grad = gradient
        self.torch.step()
        for parameter in self._updated.values():
            parameter.grad = None

    def scale_rates(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times the rate it was built with."""
        for group, base in zip(self.torch.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor


def _updated(entry: Parameter, ranks: Ranks, elementwise: bool) -> nn.Parameter:
    if isinstance(entry.live, DTensor):  # FSDP2's shard: the local tensor shares its memory
        return nn.Parameter(entry.live.to_local().detach()) if elementwise else entry.live
    if elementwise or not entry.sharded:
        return entry.master
    assert ranks.mesh is not None
    return nn.Parameter(as_dtensor(entry.master.detach(), entry, ranks))


def as_dtensor(local: Tensor, entry: Parameter, ranks: Ranks) -> DTensor:
    """Return this rank's rows of a sharded entry as a DTensor of the entry's full shape over `dp_shard`."""
    assert ranks.mesh is not None
    stride = torch.empty(entry.shape, device="meta").stride()
    return DTensor.from_local(local, ranks.mesh["dp_shard"], [Shard(0)], run_check=False, shape=entry.shape, stride=stride)


def _wrap(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _convert(state: dict[str, Any], entry: Parameter, updated: nn.Parameter) -> dict[str, Any]:
    """Cut states that were made for the whole parameter down to what this rank updates."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != entry.shape or isinstance(updated, DTensor):
            return value
        local = value.to_local() if isinstance(value, DTensor) else entry.local(value)
        return local.to(device=updated.device, dtype=updated.dtype, copy=True)

    return {key: cut(value) for key, value in state.items()}
