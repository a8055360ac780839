"""`recompute`: activations of a block that the backward computes again, for every way in which this package runs a block.

A block's call goes through `Recompute.run`. Under `torch.utils.checkpoint` it keeps what enters it and the results that were chosen
(`plan/recompute.py`); in the backward the same function runs again, on the same random numbers and buffers, with the kept results
in the place of the ops that made them. A stage whose weight gradients are deferred runs by `_Again`, since its small graphs hold
on to their activations by themselves.

The choice is made from the block as it runs here: its first call on a kind of input is looked at op by op, without leaving a
trace (random numbers, buffers, inputs and attributes are as before). So it counts local shapes, casts and kernels as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy as shallow
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from meshwright import _torch
from meshwright.blueprint import costs
from meshwright.blueprint.walk import untouched
from meshwright.partition.deferred import Due, Queue
from meshwright.partition.program import Blocks
from meshwright.partition.trace import is_plain
from meshwright.plan.recompute import BlockCosts, Choice, Item, full, selective
from meshwright.plan.stages import CPU, GPU, Rates

Function = Callable[..., Any]


@dataclass
class _Facts:
    """What the first call of a block has shown, and what was chosen for it: `writes` are the places of tensors among its arguments
    that it writes to, `changes` the buffers that a call leaves changed.
    """

    costs: BlockCosts
    writes: frozenset[int]
    changes: list[tuple[nn.Module, str]]
    choice: Choice


class Recompute:
    """The blocks `names` of one module, recomputed as `mode` says."""

    def __init__(self, mode: str, names: Sequence[str], device: torch.device) -> None:
        self.mode, self.names, self.device = mode, frozenset(names), device
        self.rates = CPU if device.type == "cpu" else GPU
        self._facts: dict[tuple[str, bool], _Facts] = {}

    def wrap(self, module: nn.Module) -> None:
        """Send the calls of the blocks of `module` through here; the modules, their names and their hooks stay as they are."""
        for name in self.names:
            block = module.get_submodule(name)
            block.__dict__["forward"] = _Forward(self, name, block, block.forward)

    def run(self, name: str, module: nn.Module, function: Function, graded: list[bool], *tensors: Tensor) -> Any:
        """`call` as a program makes it."""
        return self.call(name, module, function, tensors, {})

    def apart(self, queue: Queue) -> Blocks:
        """What runs the same blocks where a function's backward leaves work in a queue."""
        return _Apart(self, queue)

    def call(self, name: str, module: nn.Module, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return `function(*args, **kwargs)`, which is a call of the block `module`, keeping only what was chosen."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        facts = self.known(name, module, function, args, kwargs)
        if facts.choice.kept is None:
            return function(*args, **kwargs)
        frozen = _copied((args, kwargs), {})
        tensors = _torch.tensors_of((args, kwargs))
        args, kwargs = _with_copies(facts.writes, args, kwargs)
        kept = _Kept(facts.choice.kept, self.device)
        before = _Before(module, facts.changes)

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return kept.forward(), before.again(kept.backward())

        def call(*again: Tensor) -> Any:
            if not before.repeating:
                return function(*args, **kwargs)
            filled = iter(again)
            inside, named = _torch.tree_map_tensors(lambda _: next(filled), frozen)
            return function(*inside, **named)

        return checkpoint(call, *tensors, use_reentrant=False, context_fn=contexts)

    def known(self, name: str, module: nn.Module, function: Function, args: Any, kwargs: Any) -> _Facts:
        """What is known of a block, by a first look if need be."""
        key = (name, module.training)
        if key not in self._facts:
            self._facts[key] = self._look(module, function, args, kwargs)
        return self._facts[key]

    def _look(self, module: nn.Module, function: Function, args: Any, kwargs: Any) -> _Facts:
        found = _look(module, function, args, kwargs, self.rates, self.device)
        found.choice = (selective if self.mode == "selective" else full)(found.costs)
        return found


class _Forward:
    """A block's forward that goes through a `Recompute`."""

    def __init__(self, recompute: Recompute, name: str, module: nn.Module, forward: Function) -> None:
        self.recompute, self.name, self.module, self.forward = recompute, name, module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.recompute.call(self.name, self.module, self.forward, args, kwargs)


class _Apart:
    """Runs blocks whose weight gradients wait in a queue: the repetition leaves them where the call would have."""

    def __init__(self, recompute: Recompute, queue: Queue) -> None:
        self.recompute, self.queue, self.names = recompute, queue, recompute.names

    def run(self, name: str, module: nn.Module, function: Function, graded: list[bool], *tensors: Tensor) -> Any:
        """Return `function(*tensors)`, keeping only what was chosen."""
        if not torch.is_grad_enabled():
            return function(*tensors)
        due = self.queue.current

        def call(*inside: Tensor) -> Any:
            self.queue.current = due
            return function(*inside)

        self.queue.current = Due()
        facts = self.recompute.known(name, module, function, tensors, {})
        if facts.choice.kept is None:
            return call(*tensors)
        copies, _ = _with_copies(facts.writes, tensors, {})
        device = self.recompute.device
        frame = _Frame(call, _Kept(facts.choice.kept, device), _Before(module, facts.changes), graded, device)
        anchor = torch.empty(0, device=device, requires_grad=True)
        return _Again.apply(anchor, frame, *copies)  # type: ignore[no-untyped-call]


# The first call


class _Ops(_torch.DispatchMode):
    """Prices every op, and sees which memory is written to."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.seconds: list[float] = []
        self.priced: list[tuple[int, int, float, list[int]]] = []  # place, bytes, seconds, storages
        self.written: set[int] = set()
        self.alive: list[Any] = []  # so that no storage's key comes again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op and price it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = _torch.tensors_of(result)
        self.alive.append(made)
        if _torch.is_in_place(func) and args and isinstance(args[0], Tensor):
            self.written.add(_torch.storage_key(args[0]))
        seconds = 0.0
        if costs.kind_of(func) != "view":
            flops = costs.flops_of(func, args, kwargs, result)
            moved = sum(costs.traffic(func, args, kwargs, result))
            seconds = max(flops / self.rates.flops_per_s, moved / self.rates.bytes_per_s)
        if costs.is_product(func):
            self.priced.append((len(self.seconds), sum(t.nbytes for t in made), seconds, [_torch.storage_key(t) for t in made]))
        self.seconds.append(seconds)
        return result


def _look(module: nn.Module, function: Function, args: Any, kwargs: Any, rates: Rates, device: torch.device) -> _Facts:
    """Run a block's call once for nothing, and say what it costs and what it touches."""
    given = _torch.tensors_of((args, kwargs))
    copies = [_like(tensor) for tensor in given]
    versions = [copy._version for copy in copies]
    replaced = {id(tensor): copy for tensor, copy in zip(given, copies, strict=True)}
    buffers = [(m, key, b, b.clone()) for m in module.modules() for key, b in m._buffers.items() if b is not None]
    states = {id(t) for t in (*module.parameters(), *module.buffers())}
    ignored = {_torch.storage_key(t) for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}
    last = 0
    ops = _Ops(rates)

    def pack(tensor: Tensor) -> Tensor:
        nonlocal last
        last = len(ops.seconds)
        if id(tensor) not in states:
            saved[_torch.storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    devices = [device] if device.type == "cuda" else []
    changes = []
    with untouched(module), torch.random.fork_rng(devices=devices):
        with saved_tensors_hooks(pack, lambda tensor: tensor), ops:
            inside, named = _copied((args, kwargs), replaced)
            output = function(*inside, **named)
        for home, key, buffer, value in buffers:
            if home._buffers.get(key) is not buffer or not torch.equal(buffer, value):
                changes.append((home, key))
                buffer.data.copy_(value)
    returned = {_torch.storage_key(tensor) for tensor in _torch.tensors_of(output)}
    entering = {_torch.storage_key(copy): copy.nbytes for copy in copies}
    items = tuple(
        Item(nbytes, 0.0 if place >= last or returned & {*homes} or ops.written & {*homes} else seconds)
        for place, nbytes, seconds, homes in ops.priced
    )
    kept = sum(nbytes for home, nbytes in saved.items() if home not in ignored | returned)
    found = BlockCosts(sum(entering.values()), kept, sum(ops.seconds[:last]), items)
    writes = frozenset(n for n, (copy, version) in enumerate(zip(copies, versions, strict=True)) if copy._version != version)
    return _Facts(found, writes, changes, Choice(frozenset(), found.entry, found.forward))


def _copied(value: Any, made: dict[int, Any]) -> Any:
    """`value` with its containers and objects copied, as a call may change them (a cache of keys); tensors and modules stay.

    `made` maps ids to what takes their place.
    """
    if id(value) in made or is_plain(value) or isinstance(value, Tensor | nn.Module | type) or callable(value):
        return made.get(id(value), value)
    if isinstance(value, tuple):
        items = [_copied(item, made) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    copy = made[id(value)] = shallow(value)
    if isinstance(value, list):
        copy[:] = [_copied(item, made) for item in value]
    elif isinstance(value, dict):
        for key, item in value.items():
            copy[key] = _copied(item, made)
    for key, item in getattr(copy, "__dict__", {}).items():
        copy.__dict__[key] = _copied(item, made)
    return copy


def _like(tensor: Tensor) -> Tensor:
    """A copy that a block may write to, with or without a gradient as the original."""
    copy = tensor.detach().clone()
    return copy.requires_grad_().clone() if tensor.requires_grad else copy


def _with_copies(writes: frozenset[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with those that the block writes to replaced by copies: the backward starts from what came in."""
    if not writes:
        return args, kwargs
    leaves, spec = _torch.tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for number in writes:
        leaves[places[number]] = leaves[places[number]].clone()
    again: tuple[tuple[Any, ...], dict[str, Any]] = _torch.tree_unflatten(leaves, spec)
    return again


# A call and its repetition


class _Kept:
    """The results of one call that are kept, by their place among the ops that have FLOPs."""

    def __init__(self, places: frozenset[int], device: torch.device) -> None:
        self.places, self.device = places, device
        self.results: dict[int, Any] = {}
        self.drawn: dict[int, list[Tensor]] = {}

    def forward(self) -> AbstractContextManager[Any]:
        return _Keeping(self) if self.places else nullcontext()

    def backward(self) -> AbstractContextManager[Any]:
        return _Replaying(self) if self.places else nullcontext()


class _Keeping(_torch.DispatchMode):
    """Keeps results as they are made, and where the generators stood after those that drew."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept, self.place = kept, -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op; keep its results if they were chosen."""
        result = func(*args, **(kwargs or {}))
        if costs.is_product(func):
            self.place += 1
            if self.place in self.kept.places:
                self.kept.results[self.place] = _torch.tree_map_tensors(Tensor.detach, result)
                if torch.Tag.nondeterministic_seeded in func.tags:
                    generators = _torch.seeded_default_generators(self.kept.device)
                    self.kept.drawn[self.place] = [generator.get_state() for generator in generators]
        return result


class _Replaying(_torch.DispatchMode):
    """Gives kept results in the place of the ops that made them."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept, self.place = kept, -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op, or give what it gave."""
        if costs.is_product(func):
            self.place += 1
            if self.place in self.kept.results:
                if self.place in self.kept.drawn:
                    generators = _torch.seeded_default_generators(self.kept.device)
                    for generator, state in zip(generators, self.kept.drawn[self.place], strict=True):
                        generator.set_state(state)
                return _torch.tree_map_tensors(Tensor.detach, self.kept.results[self.place])
        return func(*args, **(kwargs or {}))


class _Before:
    """The buffers that a call changes, as they were before it; in the repetition they, and attributes, are left as they are."""

    def __init__(self, module: nn.Module, changes: list[tuple[nn.Module, str]]) -> None:
        self.module, self.repeating = module, False
        self.values = [(home, key, home._buffers[key].clone()) for home, key in changes]  # type: ignore[union-attr]

    @contextmanager
    def again(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter `inner` with everything as it was before the call; afterwards all is as it was before the repetition."""
        with ExitStack() as stack:
            stack.enter_context(untouched(self.module))
            for home, key, value in self.values:
                home._buffers[key] = value.clone()  # another tensor: nothing that was saved is written to
            stack.enter_context(inner)
            self.repeating = True
            stack.callback(lambda: setattr(self, "repeating", False))
            yield


@dataclass
class _Frame:
    """A call that `_Again` repeats in the backward."""

    function: Function
    kept: _Kept
    before: _Before
    graded: Sequence[bool]
    device: torch.device
    states: list[Tensor] = field(default_factory=list)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, frame: _Frame, *tensors: Tensor) -> Any:
        """Run the call without a graph."""
        frame.states = [generator.get_state() for generator in _torch.seeded_default_generators(frame.device)]
        with torch.no_grad(), frame.kept.forward():
            outputs = tuple(frame.function(*tensors))
        ctx.frame = frame
        ctx.save_for_backward(*tensors)
        results = tuple(o.view_as(o) if any(o is t for t in tensors) else o for o in outputs)
        ctx.mark_non_differentiable(*(r for r, graded in zip(results, frame.graded, strict=True) if not graded))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Run it with a graph, and that graph's backward; weights' gradients go where that puts them."""
        frame: _Frame = ctx.frame
        inside = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        generators = _torch.seeded_default_generators(frame.device)
        now = [generator.get_state() for generator in generators]
        for generator, state in zip(generators, frame.states, strict=True):
            generator.set_state(state)
        try:
            with torch.enable_grad(), frame.before.again(frame.kept.backward()):
                outputs = frame.function(*inside)
        finally:
            for generator, state in zip(generators, now, strict=True):
                generator.set_state(state)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return (None, None, *(t.grad for t in inside))


def has_blocks(names: Sequence[str], plan_text: str, class_name: str) -> bool:
    """Whether there is anything to recompute block by block; warns in a sentence if there is not."""
    if not names:
        warnings.warn(f"{plan_text} changes nothing: {class_name} has no repeated blocks, the units of recompute", stacklevel=2)
    return bool(names)
