"""`precision=fp8`: linear layers whose matmuls run in 8-bit floats, by torchao, with everything else as under `bf16`.

torchao scales each operand by its own maximum when it is cast (dynamic, per tensor) and keeps weights, gradients and sums in
bfloat16 or wider. Layers whose dims are no multiples of 16 stay as they are: the hardware can't take them.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import nn

from meshwright.errors import PlanError
from meshwright.plan import Plan

_MULTIPLE = 16
_CAPABILITY = (8, 9)


def check(plan: Plan) -> None:
    """Raise `PlanError` where fp8 can't run: no device that has it, no torchao, or a plan whose programs have no linear layers."""
    if not torch.cuda.is_available():
        raise PlanError(
            "precision=fp8 needs a CUDA device of compute capability 8.9 or newer, and there is none: use precision=bf16"
        )
    found = torch.cuda.get_device_capability()
    if found < _CAPABILITY:
        raise PlanError(
            f"precision=fp8 needs a CUDA device of compute capability 8.9 or newer, and {torch.cuda.get_device_name()} has "
            f"{found[0]}.{found[1]}: use precision=bf16"
        )
    if importlib.util.find_spec("torchao") is None:
        raise PlanError("precision=fp8 runs through torchao, which is not installed: pip install torchao, or use precision=bf16")
    if plan.tp != 1 or plan.cp != 1 or plan.pp != 1:
        raise PlanError("precision=fp8 takes whole linear layers, and tp, cp and pp cut the model into ops: use bf16 with those")


def convert(module: nn.Module) -> nn.Module:
    """Replace the linear layers of `module` by torchao's; parameters keep their names and are the same objects."""
    training = importlib.import_module("torchao.float8")

    def takes(child: nn.Module, _: str) -> bool:
        return isinstance(child, nn.Linear) and child.in_features % _MULTIPLE == 0 and child.out_features % _MULTIPLE == 0

    converted = training.convert_to_float8_training(module, module_filter_fn=takes)
    assert isinstance(converted, nn.Module)
    return converted
