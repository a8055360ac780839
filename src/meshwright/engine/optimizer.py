"""Builds the user's torch optimizer, and points its parameter groups at what this rank updates.

The user's callable sees parameters of true shapes (or uses the model's own, which it may hold from before); afterwards each is
replaced, by identity, with what this rank updates. An elementwise optimizer (AdamW, SGD, ...) works on this rank's rows as plain
tensors, which also saves DTensor's dispatch. Any other (Adafactor, Muon, a user's own) may read a whole matrix, so each
sharded parameter is given whole to one rank of `dp_shard`: the owner gathers its value and gradient for the update, keeps its
states, and scatters the new rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from meshwright.errors import ConfigError
from meshwright.parallel.parameters import Parameter, Stored
from meshwright.parallel.ranks import Ranks
from meshwright.plan import Plan

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# Updates of these read nothing but the element itself, its gradient and its states, so rows can be updated apart.
ELEMENTWISE = (
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


def refuse_whole_matrices(optimizer: torch.optim.Optimizer, plan: Plan) -> None:
    """Raise `ConfigError` for an optimizer that a plan which updates slices can't have."""
    if type(optimizer) not in ELEMENTWISE:
        raise ConfigError(
            f"{type(optimizer).__name__} may read a whole matrix, and this plan ({plan}) updates slices: use an elementwise "
            "optimizer such as AdamW or SGD, or leave offload, optimizer_state, master and update out"
        )


class BoundOptimizer:
    """A torch optimizer whose groups hold what this rank updates.

    `torch` is the optimizer itself (for torch's learning-rate schedulers and inspection), `entries` are those of the parameter
    table that it updates on any rank, in the order of its groups. `of` gives the tensor that this rank's optimizer holds for an
    entry, None where another rank owns it. `now` is the number of the step that the next update belongs to.
    """

    now = 0

    def __init__(self, factory: OptimizerFactory, table: list[Parameter], ranks: Ranks) -> None:
        """Call `factory` and re-bind its groups. Raises `ConfigError` for an optimizer that can't be used."""
        trainable = [entry for entry in table if entry.trainable]
        self.torch = factory([entry.live for entry in trainable])
        if not isinstance(self.torch, torch.optim.Optimizer):
            raise ConfigError(f"optimizer= must return a torch.optim.Optimizer, not a {type(self.torch).__name__}")
        closure = inspect.signature(type(self.torch).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{type(self.torch).__name__} needs to evaluate the loss again in its step: use AdamW, SGD or another"
            )
        elementwise = type(self.torch) in ELEMENTWISE
        cut = next((entry.name for entry in trainable if entry.cut is not None), None)
        if not elementwise and cut is not None:
            raise ConfigError(
                f"{type(self.torch).__name__} may read a whole matrix, and tp={ranks.size('tp')} divides {cut}: use an "
                "elementwise optimizer such as AdamW or SGD, or tp=1"
            )
        self._group = ranks.group("dp_shard")
        self._owners: dict[int, int] = {}
        if not elementwise and self._group is not None:
            self._owners = _assign([entry for entry in trainable if entry.sharded and entry.here], self._group.size())
        self.entries: list[Parameter] = []
        self._updated: dict[int, nn.Parameter] = {}
        self._rebind(trainable, [entry for entry in table if not entry.trainable])
        self.base_rates = [group["lr"] for group in self.torch.param_groups]

    def of(self, entry: Parameter) -> nn.Parameter | None:
        """Return the tensor that this rank's optimizer updates for `entry`, None if it updates none."""
        return self._updated.get(id(entry))

    def states(self, entry: Parameter) -> dict[str, Any]:
        """Return what this rank keeps of an entry between updates, by torch's names: tensors (perhaps `Stored`) and numbers."""
        parameter = self.of(entry)
        return {} if parameter is None else dict(self.torch.state.get(parameter, {}))

    def of_its_shape(self, entry: Parameter, key: str, shape: torch.Size) -> bool:
        """Return whether a saved state of this (whole) shape is laid out as the entry is."""
        return bool(shape) and shape == entry.whole and not self.whole(entry)

    def empty_state(self, entry: Parameter, key: str, dtype: torch.dtype) -> Tensor | Stored:
        """Return a state of an entry's shape, for values to be put into before `begin` is given it."""
        return torch.zeros_like(entry.master.detach(), dtype=dtype)

    def begin(self, entry: Parameter, state: dict[str, Any]) -> None:
        """Give an entry states that it is to go on from (all that are not `Stored`)."""
        self.torch.state[self._updated[id(entry)]] = state

    def forget(self, entry: Parameter) -> None:
        """Drop an entry's states."""
        self.torch.state.pop(self._updated[id(entry)], None)

    def whole(self, entry: Parameter) -> bool:
        """Return whether one rank updates the whole of a sharded entry."""
        return id(entry) in self._owners

    def _rebind(self, trainable: list[Parameter], frozen: list[Parameter]) -> None:
        never = {id(tensor) for entry in frozen for tensor in (entry.original(), entry.live)}
        known: dict[int, Parameter] = {}
        for entry in trainable:
            for tensor in (entry.original(), entry.live, entry.master):
                if tensor is not None:
                    known[id(tensor)] = entry
        state, self.torch.state = self.torch.state, type(self.torch.state)(dict)
        for group in self.torch.param_groups:
            entries = []
            for parameter in group["params"]:
                if id(parameter) in never:
                    continue  # AdamW(model.parameters()) of a model that is partly frozen
                if id(parameter) not in known:
                    shape = list(parameter.shape)
                    raise ConfigError(
                        f"the optimizer was given a tensor of shape {shape} that is no trainable parameter of the model"
                    )
                entry = known[id(parameter)]
                if not entry.here:
                    continue  # another pipeline rank updates it
                entries.append(entry)
                self._adopt(entry, state.get(parameter, {}))
            group["params"] = [self._updated[id(entry)] for entry in entries if id(entry) in self._updated]
            self.entries += entries

    def _adopt(self, entry: Parameter, state: dict[str, Any]) -> None:
        """Choose what this rank updates for `entry`, and cut down the states that some optimizers (Adagrad) make at once."""
        whole = self.whole(entry)
        if whole:
            full = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
            if self._owners[id(entry)] != dist.get_rank(self._group):
                return
            parameter = nn.Parameter(entry.master.new_empty(0))
        else:
            parameter = entry.master
        self._updated[id(entry)] = parameter
        if state:
            self.torch.state[parameter] = full if whole else {key: _cut(value, entry, parameter) for key, value in state.items()}

    def step(self) -> None:
        """Update the masters from each entry's `gradient`; entries without one are left as they are.

        Every rank must call it: where parameters are owned whole, their rows travel over `dp_shard`, 2 Psi elements there and
        Psi back.
        """
        for entry in self.entries:
            if self.whole(entry):
                self._gather(entry)
            else:
                self._updated[id(entry)].grad = entry.gradient
        self.torch.step()
        for entry in self.entries:
            if self.whole(entry) and entry.gradient is not None:
                self._scatter(entry)
        for parameter in self._updated.values():
            parameter.grad = None

    def _gather(self, entry: Parameter) -> None:
        if entry.gradient is None:  # of all ranks: they have agreed on it
            return
        owner = self._owners[id(entry)]
        parameter = self._updated.get(id(entry))
        for local in (entry.master.detach(), entry.gradient):
            padded = _pad(local, entry, self._size())
            parts = [torch.empty_like(padded) for _ in range(self._size())] if parameter is not None else None
            dist.gather(padded, parts, group=self._group, group_dst=owner)  # the rows of one parameter to its owner
            if parameter is not None and parts is not None:
                full = torch.cat(parts)[: entry.shape[0]]
                if local is entry.gradient:
                    parameter.grad = full
                else:
                    parameter.data = full

    def _scatter(self, entry: Parameter) -> None:
        parameter = self._updated.get(id(entry))
        mine = entry.master.detach()
        padded = torch.empty_like(_pad(mine, entry, self._size()))
        parts = None
        if parameter is not None:
            rows = padded.shape[0]
            full = torch.cat([parameter.detach(), parameter.new_zeros((rows * self._size() - entry.shape[0], *entry.shape[1:]))])
            parts = list(full.split(rows))
            parameter.grad = None
            parameter.data = parameter.new_empty(0)
        dist.scatter(padded, parts, group=self._group, group_src=self._owners[id(entry)])  # the new rows to their ranks
        mine.copy_(padded[: mine.shape[0]])

    def _size(self) -> int:
        return 1 if self._group is None else self._group.size()

    def scale_rates(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times the rate it was built with."""
        for group, base in zip(self.torch.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor


def _assign(entries: list[Parameter], ranks: int) -> dict[int, int]:
    """Give each parameter to the rank with the fewest elements so far, the largest parameters first."""
    loads = [0] * ranks
    owners = {}
    for entry in sorted(entries, key=lambda entry: entry.shape.numel(), reverse=True):
        owner = loads.index(min(loads))
        owners[id(entry)] = owner
        loads[owner] += entry.shape.numel()
    return owners


def _pad(local: Tensor, entry: Parameter, ranks: int) -> Tensor:
    rows = -(-entry.shape[0] // ranks)
    if local.shape[0] == rows:
        return local.contiguous()
    return torch.cat([local, local.new_zeros((rows - local.shape[0], *entry.shape[1:]))])


def _cut(value: Any, entry: Parameter, parameter: Tensor) -> Any:
    """Return this rank's rows of a state that was made for the whole parameter."""
    if not isinstance(value, Tensor) or value.shape not in (entry.shape, entry.whole):
        return value
    if isinstance(value, DTensor):
        local = value.to_local()
    else:
        local = entry.local(value) if value.shape == entry.whole else entry.own_rows(value)
    return local.to(device=parameter.device, dtype=parameter.dtype, copy=True)


def as_dtensor(local: Tensor, entry: Parameter, ranks: Ranks) -> DTensor:
    """Return this rank's rows of a sharded entry as a DTensor of the entry's full shape over `dp_shard`."""
    assert ranks.mesh is not None
    stride = torch.empty(entry.shape, device="meta").stride()
    return DTensor.from_local(local, ranks.mesh["dp_shard"], [Shard(0)], run_check=False, shape=entry.shape, stride=stride)
