"""A local trace as plain generated Python (torch.fx): what a rank runs for one kind of batch, under autograd.

The ops are those that the model's own run dispatches, on local tensors, without modules and without DTensor. Where units must be
entered as modules (FSDP2 gathers a block's parameters when the block is called), the program is cut at the units' calls and each
piece runs inside the call of its unit.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from meshwright import _torch
from meshwright.blueprint.tape import Ref
from meshwright.blueprint.trees import map_tensors
from meshwright.errors import PlanError
from meshwright.partition.arguments import is_random, writes
from meshwright.partition.local import KeepSlice
from meshwright.partition.trace import Guard, Stale, Trace, TracedOp, is_opaque, set_attribute


class Blocks(Protocol):
    """What runs the calls of some modules in its own way (recompute, offload)."""

    names: frozenset[str]

    def run(self, name: str, module: nn.Module, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Return `function(*tensors)`."""


@dataclass
class _Segment:
    """A stretch of ops within one call of a unit, or between calls: values that it takes and gives, the state that it reads."""

    call: int
    ops: list[TracedOp]
    takes: list[int] = field(default_factory=list)
    gives: list[int] = field(default_factory=list)
    state: list[Callable[[], Tensor]] = field(default_factory=list)
    code: Callable[..., tuple[Any, ...]] | None = None


class Program:
    """Runs a local trace on the module's buffers and parameters as they are when it is called."""

    def __init__(
        self,
        trace: Trace,
        model: nn.Module,
        units: frozenset[str],
        device: torch.device,
        bound: dict[str, Tensor] | None = None,
        blocks: Blocks | None = None,
    ) -> None:
        """Generate the code; `units` are the modules inside whose calls their ops must run. `bound` gives the tensors to compute
        with for parameters by name; the module is asked for those that it does not hold. `blocks` runs the calls of blocks.
        """
        self.trace, self.model, self.units, self.device, self.bound = trace, model, units, device, bound or {}
        self.recorded = any(op.grad for op in trace.ops)
        self.graded = trace.graded()
        outputs = trace.output_numbers()
        self._rewritten = _rewritten(trace, model)
        guards = _reached(trace, [], lambda op: isinstance(op.func, Guard) and not set(op.inputs) & self.graded)
        checked = {id(op) for op in guards if isinstance(op.func, Guard)}
        kept = _reached(trace, outputs, lambda op: id(op) not in checked and _has_effect(op))
        self.checks = self._segments(guards, frozenset(), [])
        self._checks_write = any(writes(op.func) for op in guards)
        self._checks_draw = any(is_random(op) for op in guards)
        self.ops = kept
        self.blocks = blocks
        self.segments = self._segments(kept, units | (blocks.names if blocks is not None else frozenset()), outputs)

    def __call__(self, leaves: list[Tensor]) -> Any:
        """Return what the traced function returns for a batch's tensors. Raises `Stale` if its values lead another way."""
        self.check(leaves)
        values = self._inputs(leaves)
        for segment in self.segments:
            self._run(segment, values)
        for home, name, value in self.trace.changes:
            set_attribute(home, name, value)
        return map_tensors(self.trace.outputs, lambda ref: values[ref.number], Ref)

    def check(self, leaves: list[Tensor]) -> None:
        """Look again at what Python saw, and raise `Stale` if it differs.

        Nothing is changed by it: writes go to copies, and a draw that led elsewhere is undone.
        """
        values = self._inputs(leaves)
        if self._checks_write:
            values = {number: tensor.clone() for number, tensor in values.items()}
        generators = _torch.seeded_default_generators(self.device) if self._checks_draw else []
        before = [generator.get_state() for generator in generators]
        try:
            for segment in self.checks:
                self._run(segment, values, copied=self._checks_write)
        except Stale:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
            raise

    def code(self) -> str:
        """The generated Python, a function per segment."""
        return "\n".join(segment.code.code for segment in self.segments if segment.code is not None)  # type: ignore[attr-defined]

    def _inputs(self, leaves: list[Tensor]) -> dict[int, Tensor]:
        return {number: leaves[place] for number, place in self.trace.inputs.items()}

    def _run(self, segment: _Segment, values: dict[int, Tensor], copied: bool = False) -> None:
        code = segment.code
        assert code is not None
        taken = [values[number] for number in segment.takes]

        def run(*tensors: Tensor) -> tuple[Any, ...]:
            state = [source() for source in segment.state]
            return code(*tensors, *(tensor.clone() for tensor in state)) if copied else code(*tensors, *state)

        if segment.call < 0:
            made = run(*taken)
        else:
            name = self.trace.calls[segment.call].name
            unit, call = self.model.get_submodule(name), run
            if self.blocks is not None and name in self.blocks.names:
                call = partial(self.blocks.run, f"{name}#{segment.call}", unit, run)
            if name in self.units:
                with _torch.only_fsdp_hooks(unit):  # the others are in the trace
                    made = _in_place_of_forward(unit, call, taken)
            else:
                made = call(*taken)
        values.update(zip(segment.gives, made, strict=True))

    def _segments(self, ops: list[TracedOp], units: frozenset[str], outputs: list[int]) -> list[_Segment]:
        segments: list[_Segment] = []
        for op in ops:
            call = op.call if op.call >= 0 and self.trace.calls[op.call].name in units else -1
            if not segments or segments[-1].call != call:
                segments.append(_Segment(call, []))
            segments[-1].ops.append(op)
        later: Counter[int] = Counter(outputs)
        for segment in reversed(segments):
            made = {n for op in segment.ops for n in op.outputs}
            segment.gives = sorted(made & set(later))
            read = {n for op in segment.ops for n in op.inputs} - made
            later.update(read)
            state = sorted(n for n in read if self._name(n) or n in self.trace.constants)
            segment.takes = sorted(read - set(state))
            self._generate(segment, state)
        return segments

    def _generate(self, segment: _Segment, state: list[int]) -> None:
        graph = fx.Graph()
        nodes: dict[int, fx.Node] = {n: graph.placeholder(f"v{n}") for n in segment.takes}
        for number in state:
            name = self._name(number)
            segment.state.append(self._source(number, name, segment.call))
            nodes[number] = graph.placeholder("p_" + name.replace(".", "_") if name else f"c{number}")
        for op in segment.ops:
            self._write(graph, op, nodes)
        graph.output(tuple(nodes[number] for number in segment.gives))
        segment.code = fx.GraphModule(nn.Module(), graph)

    def _name(self, number: int) -> str:
        return self.trace.parameters.get(number, self.trace.buffers.get(number, ""))

    def _source(self, number: int, name: str, call: int) -> Callable[[], Tensor]:
        """Where a constant (without a name), parameter or buffer is found when the program runs."""
        if not name:
            kept = self.trace.constants[number].to(self.device)
            return kept.clone if number in self._rewritten else lambda: kept
        if name in self.bound:
            bound = self.bound[name]
            return lambda: bound
        owner, _, attribute = name.rpartition(".")
        self._refuse_elsewhere(name, call)
        return partial(_lookup, self.model.get_submodule(owner), attribute)

    def _refuse_elsewhere(self, name: str, call: int) -> None:
        """Refuse the use of a parameter while the unit that gathers it is not running."""
        unit = self.trace.calls[call].name if call >= 0 else ""
        owner, _, attribute = name.rpartition(".")
        tensor = self.model.get_submodule(owner)._parameters.get(attribute)
        if isinstance(tensor, DTensor) and any(name.startswith(f"{u}.") and u != unit for u in self.units):
            raise PlanError(f"{name} is used outside of its block, and zero=3 gathers it only while the block runs: use zero=2")

    def _write(self, graph: fx.Graph, op: TracedOp, nodes: dict[int, fx.Node]) -> None:
        def local(value: Any) -> Any:
            if isinstance(value, Ref):
                return nodes[value.number]
            if isinstance(value, list | tuple):
                return type(value)(local(item) for item in value)
            return self.device if isinstance(value, torch.device) else value

        func: Any = op.func
        if self.recorded and not op.grad and any(n in self.graded for n in op.inputs):
            func = _Unrecorded(func)
        node = graph.call_function(func, local(op.args), {key: local(value) for key, value in op.kwargs.items()})
        if _returns_one(op):
            nodes.update(dict.fromkeys(op.outputs, node))
        else:
            for place, number in enumerate(op.outputs):
                nodes[number] = graph.call_function(operator.getitem, (node, place))


def _in_place_of_forward(unit: nn.Module, run: Callable[..., Any], taken: list[Tensor]) -> Any:
    """Call a unit with another forward; once that runs the unit has its own again, for it may be called as it is inside."""
    before = unit.__dict__.get("forward")

    def restore() -> None:
        if before is None:
            unit.__dict__.pop("forward", None)
        else:
            unit.__dict__["forward"] = before

    def forward(*tensors: Tensor) -> Any:
        restore()
        return run(*tensors)

    unit.__dict__["forward"] = forward
    try:
        return unit(*taken)
    finally:
        restore()


class _Unrecorded:
    """An op that autograd is not to record."""

    def __init__(self, op: Any) -> None:
        self.op = op
        self.__name__ = getattr(op, "__name__", "op")
        self.__module__ = "meshwright"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            result = self.op(*args, **kwargs)
        # A view of a leaf says that it requires a gradient even so, and ops with out= would refuse it.
        return _torch.tree_map_tensors(lambda t: t.detach() if t.requires_grad and all(t is not x for x in args) else t, result)


def _returns_one(op: TracedOp) -> bool:
    if isinstance(op.func, torch._ops.OpOverload):
        returns = op.func._schema.returns
        return len(returns) == 1 and str(returns[0].type) == "Tensor"
    return not is_opaque(op) and len(op.outputs) <= 1


def _lookup(owner: nn.Module, name: str) -> Tensor:
    found = owner._parameters.get(name)
    tensor = owner._buffers[name] if found is None else found
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rewritten(trace: Trace, model: nn.Module) -> set[int]:
    """Constants that are made anew in every run of the model's Python, and written to."""
    written = {trace.values[op.inputs[0]].storage for op in trace.ops if op.inputs and writes(op.func)}
    kept = {id(value) for module in model.modules() for value in vars(module).values()}
    return {n for n, tensor in trace.constants.items() if trace.values[n].storage in written and id(tensor) not in kept}


def _has_effect(op: TracedOp) -> bool:
    return isinstance(op.func, Guard | KeepSlice) or writes(op.func)


def _reached(trace: Trace, outputs: list[int], also: Callable[[TracedOp], bool]) -> list[TracedOp]:
    """The ops, in order, that the outputs and the ops with an effect need."""
    needed = set(outputs)
    kept = []
    for op in reversed(trace.ops):
        if also(op) or any(number in needed for number in op.outputs):
            kept.append(op)
            needed.update(op.inputs)
    return kept[::-1]
