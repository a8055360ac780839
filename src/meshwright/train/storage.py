"""What can be known of a plan's storage before any rank is started: whether the optimizer suits it, and whether there is room.

Sums of formulas (`plan/memory.py`), so a lower bound: what is left, a rank says when it claims its room (`parallel/disk.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from meshwright.engine.optimizer import OptimizerFactory, refuse_whole_matrices
from meshwright.parallel.disk import check_directory
from meshwright.parallel.shelf import stores
from meshwright.plan import Plan
from meshwright.plan.memory import state_bytes
from meshwright.plan.plan import Offload, offloads


def check_storage(plan: Plan, model: nn.Module, optimizer: OptimizerFactory, ranks_here: int) -> None:
    """Raise for an optimizer that a resolved plan can't update in slices, or a directory that is short of model states.

    `model` may be on the meta device; `ranks_here` are the ranks that share this machine's disks.
    """
    on_cpu = not torch.cuda.is_available()
    made = optimizer([nn.Parameter(torch.zeros(2, 2))])
    if stores(plan, torch.device("cpu" if on_cpu else "cuda")):
        refuse_whole_matrices(made, plan)
    items = offloads(plan.offload)
    directories = dict.fromkeys(item.directory for item in items if item.directory is not None and item.what != "activations")
    if not directories:
        return
    numbers = [sum(p.numel() for p in model.parameters() if p.requires_grad == kind) for kind in (True, False)]
    trainable, frozen = (number // (plan.tp * plan.pp) for number in numbers)
    for directory in directories:
        there = replace(plan, offload=",".join(_text(item) for item in items if item.directory == directory))
        needed = state_bytes(there, trainable, frozen, optimizer_states=_states(made), on_host=on_cpu).disk
        check_directory(directory, int(needed * ranks_here))


def _text(item: Offload) -> str:
    return f"{item.what}:nvme={item.directory}@{item.fraction:.12f}"


def _states(optimizer: torch.optim.Optimizer) -> int:
    """The number of values that an optimizer keeps of each element of a parameter, learned from an update of zeros."""
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = optimizer.state[parameter].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in found)
