"""Which collectives a program runs, over which axis, how many bytes each: read off the program itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from meshwright.partition.collectives import Collective
from meshwright.partition.program import Program


@dataclass(frozen=True)
class Transfer:
    """One collective of one rank. `bytes` is the whole tensor that is reduced or gathered, or what a rank gives to an all-to-all or
    sends on; `phase` is `forward` or `backward`, `module` where the op that needs it stands.
    """

    axis: str
    phase: str
    collective: str
    bytes: int
    module: str


def transfers(program: Program) -> list[Transfer]:
    """Every collective of one forward and (where the program is differentiated) one backward, in program order."""
    found = []
    values = program.trace.values
    for op in program.ops:
        if not isinstance(op.func, Collective):
            continue
        given = [_bytes(values[n].shape, values[n].dtype) for n in op.inputs]
        made = [_bytes(values[n].shape, values[n].dtype) for n in op.outputs]
        graded = program.recorded and any(n in program.graded for n in op.inputs)
        shape = values[op.inputs[0]].shape
        for phase, name, size in op.func.traffic(given, made, shape):
            if phase == "forward" or graded:
                found.append(Transfer(op.func.axis.name, phase, name, size, op.module))
    return found


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
