"""Weight gradients apart from input gradients, for schedules that fill the bubble with them (zero bubble, ZB-V, DualPipeV).

An op on a weight and an activation runs on the weight's values, so that the stage's graph leads to activations only. Behind it
stands a node that keeps what the weight's gradient will take; when the backward comes by, it leaves that in a queue, with the
gradients of the op's results. How the weight's gradient is made of it was read from autograd beforehand, on fake tensors of the
same shapes. So both halves are autograd's own, nothing is computed twice, and what the weights do not need is freed after the
input gradients. The idea is arXiv:2401.10241's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from meshwright import _torch
from meshwright.blueprint.execute import Execution
from meshwright.blueprint.tape import Ref, Value
from meshwright.partition.arguments import runnable, writes
from meshwright.partition.trace import Trace, TracedOp

_AT_ONCE = 1 << 22
"""Bytes of weight gradients that are computed before they are added up: more save calls, and take memory."""


@dataclass
class Due:
    """Weight gradients still to be computed: the weights of an op, what computes their gradients, and what that takes."""

    entries: list[tuple[Sequence[Tensor], Callable[..., Any], list[Tensor]]] = field(default_factory=list)


@dataclass
class Queue:
    """Where a forward's ops are to leave their weight gradients: `current` is that of the micro-batch that runs.

    `shared` says that something computed from weights alone is needed by ops of both kinds: the first backward must keep its graph.
    """

    current: Due = field(default_factory=Due)
    shared: bool = False


def settle(due: Due) -> None:
    """Add the weight gradients that a micro-batch left to those of the leaves. Empties `due`."""
    entries, due.entries = due.entries[::-1], []
    weights: list[Tensor] = []
    gradients: list[Tensor] = []
    with torch.no_grad():
        while entries:
            some, code, operands = entries.pop()
            for weight, gradient in zip(some, code(*operands), strict=True):
                if gradient is not None:
                    weights.append(weight)
                    gradients.append(gradient)
            if weights and (not entries or sum(gradient.nbytes for gradient in gradients) > _AT_ONCE):
                torch.autograd.backward(weights, gradients, retain_graph=True)  # two ops may have what made their weight in common
                weights, gradients = [], []


def defer(trace: Trace, queue: Queue, device: torch.device) -> Trace:
    """Return the trace with every op that mixes weights and activations replaced by one that defers its weight gradients.

    In-place ops, opaque modules, ops of this package and ops on lists of tensors stay: their weights' gradients come with the
    input gradients.
    """
    graded = trace.graded()
    state = {*trace.parameters, *trace.buffers, *trace.constants}
    weights = {n for n in trace.parameters if n in graded}
    made, mixed = set[int](), set(trace.output_numbers())  # of weights alone; read by what stays
    known: dict[str, _Derivative | None] = {}
    ops: list[TracedOp] = []
    for op in trace.ops:
        own = [n for n in op.inputs if n in weights]
        if own and op.grad and set(op.inputs) <= state | weights:
            made.update(n for n in op.outputs if n in graded)
            weights |= made
        elif own and op.grad:
            found = _derivative(op, trace, weights, device, known)
            if found is None:
                mixed.update(own)
            else:
                op = replace(op, func=_Deferring(op.func, found, queue, device))
        ops.append(op)
    queue.shared = bool(made & mixed)
    return replace(trace, ops=ops)


@dataclass(frozen=True)
class _Derivative:
    """`code` makes the gradients of the arguments `weights` of an op from its arguments `operands` and its results `results`, by
    their places, and from the gradients of the results `graded`.
    """

    code: Callable[..., Any]
    weights: tuple[int, ...]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    graded: tuple[int, ...]


class _Recorder(Execution):
    """Keeps the ops that run, with what they were given and what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op and keep it."""
        result = self.run(func, args, kwargs or {})
        self.ops.append((func, args, kwargs or {}, result))
        return result


def _derivative(
    op: TracedOp, trace: Trace, weights: set[int], device: torch.device, known: dict[str, _Derivative | None]
) -> _Derivative | None:
    """How an op's weight gradients are made, read once for all alike; None for an op that stays."""
    places = [at for at, value in enumerate(op.args) if isinstance(value, Ref)]
    if not isinstance(op.func, torch._ops.OpOverload) or writes(op.func) or len(places) != len(op.inputs):
        return None
    marks = tuple(at for at, number in zip(places, op.inputs, strict=True) if number in weights)
    values = [trace.values[number] for number in op.inputs]
    kinds = [(value.shape, value.strides, value.dtype) for value in values]
    plain = [None if isinstance(value, Ref) else value for value in op.args]
    key = f"{op.func} {marks} {kinds} {plain} {op.kwargs}"
    if key not in known:
        known[key] = _derive(op, values, marks, device)
    return known[key]


def _derive(op: TracedOp, values: Sequence[Value], marks: tuple[int, ...], device: torch.device) -> _Derivative | None:
    """Read from autograd how the gradients of an op's weights are made; None if not of what the op was given and gave."""
    recorder = _Recorder()
    with recorder.fake:
        made = iter([torch.empty_strided(v.shape, v.strides, dtype=v.dtype, device=device) for v in values])
    args = [next(made) if isinstance(value, Ref) else value for value in op.args]
    weights = [args[at].requires_grad_() for at in marks]
    with recorder, torch.enable_grad():
        results = _torch.tensors_of(op.func(*args, **op.kwargs))
    outputs = [at for at, tensor in enumerate(results) if tensor.requires_grad]
    with recorder.fake:
        seeds = [torch.empty_like(results[at]) for at in outputs]
    with recorder:
        found = torch.autograd.grad([results[at] for at in outputs], weights, seeds, allow_unused=True)
    graph, nodes = fx.Graph(), dict[int, fx.Node]()
    given: list[list[tuple[int, fx.Node]]] = [[], [], []]
    for kind, tensors in enumerate((enumerate(args), enumerate(results), zip(outputs, seeds, strict=True))):
        for at, tensor in tensors:
            if isinstance(tensor, Tensor):
                nodes[id(tensor)] = graph.placeholder(f"{('operand', 'result', 'gradient')[kind]}_{at}")
                given[kind].append((at, nodes[id(tensor)]))
    try:
        for func, arguments, named, result in recorder.ops:
            if func is not op.func or nodes.keys().isdisjoint(map(id, _torch.tensors_of(result))):
                _write(graph, nodes, func, (arguments, named), result)
        graph.output(tuple(None if gradient is None else nodes[id(gradient)] for gradient in found))
    except KeyError:
        return None
    graph.eliminate_dead_code()
    operands, others, graded = (tuple(at for at, node in kind if node.users) for kind in given)
    for node in [node for kind in given for _, node in kind if not node.users]:
        graph.erase_node(node)
    if not graded:
        return None
    return _Derivative(fx.GraphModule(nn.Module(), graph).forward, marks, operands, others, graded)


def _write(graph: fx.Graph, nodes: dict[int, fx.Node], func: Any, given: Any, result: Any) -> None:
    """Write a recorded op into the graph. Raises `KeyError` if it takes a tensor from elsewhere."""
    made = _torch.tensors_of(result)
    if not made:
        return
    args, kwargs = _torch.tree_map_tensors(lambda tensor: nodes[id(tensor)], given)
    node = graph.call_function(runnable(func), args, kwargs)
    if isinstance(result, Tensor):
        nodes[id(result)] = node
    else:
        for at, tensor in enumerate(result):
            nodes[id(tensor)] = graph.call_function(operator.getitem, (node, at))


class _Deferring:
    """An op on the values of its weights, whose gradients wait in a queue."""

    tags: tuple[Any, ...] = ()

    def __init__(self, op: Callable[..., Any], derivative: _Derivative, queue: Queue, device: torch.device) -> None:
        self.op, self.derivative, self.queue = op, derivative, queue
        self.anchor = torch.empty(0, device=device, requires_grad=True)
        self.__name__ = f"deferring_{getattr(op, '__name__', 'op').replace('.', '_')}"
        self.__module__ = "meshwright"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.op(*args, **kwargs)
        how, values = self.derivative, list(args)
        for at in how.weights:
            values[at] = args[at].detach()
        made = self.op(*values, **kwargs)
        results = [made] if isinstance(made, Tensor) else list(made)
        kept = [values[at].detach() for at in how.operands] + [results[at].detach() for at in how.results]
        hooks = _torch.saved_tensor_hooks()
        packed = kept if hooks is None else [hooks[0](tensor) for tensor in kept]
        if not results[how.graded[0]].requires_grad:  # it works on nothing with a gradient, so nothing would come by
            results = list(_Root.apply(self.anchor, *results))  # type: ignore[no-untyped-call]
            made = results[0] if isinstance(made, Tensor) else tuple(results)
        weights, due = [args[at] for at in how.weights], self.queue.current
        graded = [(results[at].output_nr, results[at].shape, results[at].dtype) for at in how.graded]

        def leave(gradients: Sequence[Tensor | None]) -> None:
            operands = packed if hooks is None else [hooks[1](kept) for kept in packed]
            for number, shape, dtype in graded:
                gradient = gradients[number]
                operands.append(torch.zeros(shape, dtype=dtype, device=self.anchor.device) if gradient is None else gradient)
            due.entries.append((weights, how.code, operands))

        node = results[how.graded[0]].grad_fn
        assert node is not None
        node.register_prehook(leave)
        return made


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *results: Tensor) -> Any:
        """Return the results as the first of the graph."""
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """There is nothing before it."""
        return (None,) * (1 + len(gradients))
