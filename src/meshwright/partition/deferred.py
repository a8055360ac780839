"""Weight gradients apart from input gradients, for schedules that fill the bubble with them (zero bubble, ZB-V, DualPipeV).

An op that works on a weight and an activation runs as a small graph of its own. The backward of the stage asks that graph for the
activation's gradient only, and leaves the weight's in a queue with what it takes: the op's operands and its output's gradient.
Everything else of the stage's graph is freed by then. The idea is arXiv:2401.10241's; any op can be deferred, and no op's
derivative is written here: both halves are autograd's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from meshwright.blueprint.tape import Ref
from meshwright.partition.arguments import writes
from meshwright.partition.collectives import Collective
from meshwright.partition.trace import Guard, Trace, TracedOp, is_opaque


@dataclass
class Due:
    """Weight gradients still to be computed: the outputs of ops in graphs of their own, and the outputs' gradients."""

    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


@dataclass
class Queue:
    """Where a forward's ops are to leave their weight gradients: `current` is that of the micro-batch that runs."""

    current: Due = field(default_factory=Due)


def settle(due: Due, weights: Sequence[Tensor]) -> None:
    """Add the weight gradients that a micro-batch left to those of the leaves `weights`, in one backward. Empties `due`."""
    outputs, gradients = due.outputs, due.gradients
    due.outputs, due.gradients = [], []
    if outputs:
        torch.autograd.backward(outputs, gradients, inputs=weights)


def defer(trace: Trace, queue: Queue) -> Trace:
    """Return the trace with every op that mixes weights and activations replaced by one that defers its weight gradients.

    In-place ops, opaque modules, collectives and ops on lists of tensors stay: their weights' gradients come with the input
    gradients.
    """
    graded = trace.graded()
    state = {*trace.parameters, *trace.buffers, *trace.constants}
    weights = {n for n in trace.parameters if n in graded}
    ops: list[TracedOp] = []
    for op in trace.ops:
        own = [n for n in op.inputs if n in weights]
        if own and op.grad and set(op.inputs) <= state | weights:
            weights.update(n for n in op.outputs if n in graded)
        elif own and op.grad and not (writes(op.func) or is_opaque(op) or isinstance(op.func, Collective | Guard)):
            places = [at for at, value in enumerate(op.args) if isinstance(value, Ref)]
            if len(places) == len(op.inputs):
                marks = [(at, number in weights) for at, number in zip(places, op.inputs, strict=True)]
                op = replace(op, func=_Deferring(op.func, marks, queue))
        ops.append(op)
    return replace(trace, ops=ops)


class _Deferring:
    """An op whose weight gradients wait in a queue: `marks` are the arguments that hold tensors, and whether they are weights."""

    tags: tuple[Any, ...] = ()

    def __init__(self, op: Callable[..., Any], marks: Sequence[tuple[int, bool]], queue: Queue) -> None:
        self.op, self.queue = op, queue
        self.weights = [at for at, is_weight in marks if is_weight]
        self.others = [at for at, is_weight in marks if not is_weight]
        self.__name__ = f"deferring_{getattr(op, '__name__', 'op').replace('.', '_')}"
        self.__module__ = "meshwright"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.op(*args, **kwargs)
        others = [args[at] for at in self.others]
        anchor = args[self.weights[0]].new_empty(0).requires_grad_()  # in the graph, though its activations may not be

        def run(operands: Sequence[Tensor]) -> Sequence[Tensor]:
            filled = list(args)
            for at, operand in zip(self.others, operands, strict=True):
                filled[at] = operand
            made = self.op(*filled, **kwargs)
            return (made,) if isinstance(made, Tensor) else [tensor for tensor in made if isinstance(tensor, Tensor)]

        outputs: tuple[Tensor, ...] = _Apart.apply(anchor, run, self.queue.current, *others)  # type: ignore[no-untyped-call]
        return outputs[0] if len(outputs) == 1 else outputs


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Any, due: Due, *others: Tensor) -> Any:
        """Run the op as a graph of its own, on the weights themselves; return its results without it."""
        with torch.enable_grad():
            inside = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in others]
            outputs = run(inside)
        ctx.due, ctx.inside, ctx.outputs = due, inside, outputs
        results = tuple(output.detach() for output in outputs)
        if not all(output.requires_grad for output in outputs):
            ctx.mark_non_differentiable(*(r for r, o in zip(results, outputs, strict=True) if not o.requires_grad))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the activations' gradients; leave what the weights' take in the queue."""
        pairs = [(o, g) for o, g in zip(ctx.outputs, gradients, strict=True) if o.requires_grad and g is not None]
        outputs, seeds = [o for o, _ in pairs], [g for _, g in pairs]
        wanted = [tensor for tensor in ctx.inside if tensor.requires_grad]
        found = iter(
            torch.autograd.grad(outputs, wanted, seeds, retain_graph=True, allow_unused=True) if wanted and outputs else ()
        )
        ctx.due.outputs += outputs
        ctx.due.gradients += seeds
        result = [next(found, None) if tensor.requires_grad else None for tensor in ctx.inside]
        del ctx.inside, ctx.outputs
        return (None, None, None, *result)
