"""Which dtype holds, computes, reduces and updates what; and the dynamic loss scale of fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meshwright.parallel.apply import COMPUTE_DTYPES
from meshwright.parallel.parameters import Parameter
from meshwright.plan import Plan

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


@dataclass(frozen=True)
class DtypeContract:
    """The dtypes of a run, as text (`float32`): printed at its start, and true of every trainable parameter.

    `storage` is what the optimizer updates and checkpoints hold, `compute` what matmuls run in, `reduce` what gradients are
    accumulated and summed over ranks in, `optimizer` what the optimizer's states are in.
    """

    storage: str
    compute: str
    reduce: str
    optimizer: str

    def __str__(self) -> str:
        """Return the one-line form."""
        return f"storage {self.storage}, compute {self.compute}, reduce {self.reduce}, optimizer {self.optimizer}"


def dtype_contract(plan: Plan, table: list[Parameter]) -> DtypeContract:
    """Return the contract of a plan for this model; several dtypes in a model are listed with `+`."""
    trainable = [entry for entry in table if entry.trainable]
    compute = COMPUTE_DTYPES[plan.precision]

    kept = {"fp32": None, "bf16": "bfloat16", "int8": "int8 by blocks"}[plan.optimizer_state]

    def names(dtypes: list[torch.dtype]) -> str:
        return "+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))

    return DtypeContract(
        storage=names([entry.master.dtype for entry in trainable]),
        compute=names([compute if compute and e.dtype.is_floating_point else e.dtype for e in trainable]),
        reduce=names([torch.promote_types(entry.dtype, torch.float32) for entry in trainable]),
        optimizer=names([entry.dtype for entry in trainable]) if kept is None else kept,
    )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the model and the loss run: autocast for 16-bit plans, nothing for fp32.

    Parameters are in the 16-bit dtype already; autocast makes mixed operands (a float32 rotary table against bfloat16 queries)
    meet in it too, and keeps losses (on CUDA also norms) in float32.
    """
    dtype = COMPUTE_DTYPES[precision]
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def match_norm_inputs(module: nn.Module, precision: str, device: torch.device, traced: bool) -> None:
    """Let norm layers take inputs of another dtype than their weights under a 16-bit plan on the CPU.

    There autocast leaves norms alone, and they refuse mixed dtypes; on CUDA it runs them in float32 itself. Programs are `traced`
    on the CPU for any device.
    """
    if COMPUTE_DTYPES[precision] is None or (device.type != "cpu" and not traced):
        return

    def match(norm: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        weight = getattr(norm, "weight", None)
        if weight is None or not arguments or not isinstance(arguments[0], torch.Tensor):
            return arguments
        return (arguments[0].to(weight.dtype), *arguments[1:])

    for child in module.modules():
        if isinstance(child, _NORMS):
            child.register_forward_pre_hook(match)


@dataclass
class LossScale:
    """The dynamic loss scale of fp16 (as `torch.amp.GradScaler`): halved on overflow, doubled after `interval` good steps."""

    value: float = 1.0
    dynamic: bool = False
    interval: int = 2000
    good_steps: int = 0

    @classmethod
    def of(cls, precision: str) -> LossScale:
        """Return the scale that a plan's precision starts with: 65536 for fp16, a constant 1 otherwise."""
        return cls(65536.0, dynamic=True) if precision == "fp16" else cls()

    def update(self, finite: bool) -> None:
        """Adapt to whether the step's gradients were finite (the same answer on every rank)."""
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == self.interval:
            self.value, self.good_steps = self.value * 2, 0
