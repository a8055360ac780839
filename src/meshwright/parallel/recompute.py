"""`recompute`: activations of a block that the backward computes again, for every way in which this package runs a block.

A block's call goes through `Recompute.run`. Under `torch.utils.checkpoint` it keeps what enters it and the results that were chosen
(`plan/recompute.py`); in the backward the same function runs again, on the same random numbers and buffers, with the kept results
in the place of the ops that made them.

The choice is made from the block as it runs here: its first call on a kind of input is looked at op by op, without leaving a
trace (random numbers, buffers, inputs and attributes are as before). So it counts local shapes, casts and kernels as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy as shallow
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from meshwright import _torch
from meshwright.blueprint import costs
from meshwright.blueprint.running import untouched
from meshwright.parallel.activations import Activations, View
from meshwright.parallel.ranks import Ranks
from meshwright.partition.trace import is_plain
from meshwright.plan.recompute import BlockCosts, Choice, Item, budget_bytes, fit, full, minimum, refuse, selective
from meshwright.plan.stages import CPU, GPU, Rates

Function = Callable[..., Any]


@dataclass
class _Facts:
    """What the first call of a block has shown, and what was chosen for it: `writes` are the places of tensors among its arguments
    that it writes to, `changes` the entries of modules' dicts (buffers, attributes) that a call leaves changed, or may.
    """

    costs: BlockCosts
    writes: frozenset[int]
    changes: list[tuple[dict[str, Any], str]]
    choice: Choice
    calls: int = 0


class Recompute:
    """The blocks `names` of one module, recomputed as `mode` says.

    A budget is spent before the first repetition: up to then everything is recomputed, and from then on what was chosen by the
    bytes and costs of the forwards so far, of every block and micro-batch in flight on this rank.
    """

    def __init__(self, mode: str, names: Sequence[str], device: torch.device, offload: Activations | None = None) -> None:
        self.mode, self.names, self.device, self.offload = mode, frozenset(names), device, offload
        self.rates = CPU if device.type == "cpu" else GPU
        self.budget = budget_bytes(mode)
        self._facts: dict[tuple[Any, ...], _Facts] = {}
        self._entered: set[int] = set()
        self._outside: dict[int, int] = {}
        self._spent = self._agreed = False
        self._least = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Entered around forwards; until a budget is spent, what they save outside of the blocks is counted."""
        if self.budget is None or self._spent or not torch.is_grad_enabled():
            yield
            return

        def pack(tensor: Tensor) -> Tensor:
            """Count a storage that is saved, once."""
            base = tensor if tensor._base is None else tensor._base
            # Fake tensors are those of a model that is being read: nothing of that lives on.
            if not isinstance(tensor, _torch.FakeTensor) and not (base.is_leaf and base.requires_grad):
                key, nbytes = _torch.storage_key(tensor), tensor.untyped_storage().nbytes()
                if base.is_leaf:  # rows of a batch that is there anyway: what is saved is the view
                    nbytes = min(nbytes, max(tensor.nbytes, self._outside.get(key, 0)))
                self._outside[key] = nbytes
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def spend(self) -> None:
        """Before the first repetition: every block has been looked at by now, once for each micro-batch in flight at most."""
        if self.budget is None or self._spent:
            return
        outside = sum(nbytes for key, nbytes in self._outside.items() if key not in self._entered)
        blocks = list(self._facts.values())
        costs = [(block.costs, block.calls) for block in blocks]
        self._least = minimum(costs, outside)
        if self._least <= self.budget:
            for block, choice in zip(blocks, fit(costs, outside, self.budget), strict=True):
                block.choice = choice
        self._spent = True
        self._outside.clear()

    def agree(self, ranks: Ranks) -> None:
        """Raise `PlanError` on every rank if the activations of one don't fit in the budget; each must call it once a step."""
        if self.budget is None or self._agreed:
            return
        found = torch.tensor([float(not self._spent), float(self._least)], dtype=torch.float64, device=self.device)
        if ranks.mesh is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)  # 16 bytes over every rank, until each has had a batch
        unspent, least = found.tolist()
        self._agreed = not unspent
        refuse(self.budget, int(least))

    def wrap(self, module: nn.Module) -> None:
        """Send the calls of the blocks of `module` through here; the modules, their names and their hooks stay as they are."""
        for name in self.names:
            block = module.get_submodule(name)
            forward = block.forward
            if isinstance(forward, _Forward):  # of an engine that had the module before
                forward = forward.forward
            block.__dict__["forward"] = _Forward(self, name, block, forward)

    def run(self, name: str, module: nn.Module, function: Function, *tensors: Tensor) -> Any:
        """`call` as a program makes it."""
        return self.call(name, module, function, tensors, {})

    def call(self, name: str, module: nn.Module, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return `function(*args, **kwargs)`, which is a call of the block `module`, keeping only what was chosen."""
        tensors = _torch.tensors_of((args, kwargs))
        if not torch.is_grad_enabled() or any(isinstance(tensor, _torch.FakeTensor) for tensor in tensors):
            return function(*args, **kwargs)
        if self.offload is None:
            return self._call(name, module, function, args, kwargs)
        with self.offload.block(name, module, tensors):
            return self._call(name, module, function, args, kwargs)

    def _call(self, name: str, module: nn.Module, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.mode == "none":
            return function(*args, **kwargs)
        facts = self.known(name, module, function, args, kwargs)
        if facts.choice.kept is None:
            return function(*args, **kwargs)
        leaves, spec = _torch.tree_flatten((args, kwargs))
        memo: dict[int, Any] = {}
        frozen = [None if isinstance(leaf, Tensor) else _copied(leaf, memo) for leaf in leaves]
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = _unwritten(facts.writes, [leaves[place] for place in places])  # the caller's own may be written to
        first = [(args, kwargs)]  # taken by the call: what is kept is autograd's to hold
        kept = _Kept(facts.choice.kept, self.device, self.offload)
        before = _Before(module, facts.changes)

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return kept.forward(), _Anew(lambda: before.again(kept.backward()))

        def call(*again: Tensor) -> Any:
            """The call itself, then its repetitions."""
            if not before.repeating:
                given, named = first.pop()
                return function(*given, **named)
            self.spend()
            filled, memo = dict(zip(places, _unwritten(facts.writes, again), strict=True)), dict[int, Any]()
            values = [filled[place] if place in filled else _copied(leaf, memo) for place, leaf in enumerate(frozen)]
            given, named = _torch.tree_unflatten(values, spec)
            return function(*given, **named)

        return checkpoint(call, *tensors, use_reentrant=False, context_fn=contexts)

    def known(self, name: str, module: nn.Module, function: Function, args: Any, kwargs: Any) -> _Facts:
        """What is known of a block's calls with such arguments, by a first look if need be."""
        leaves = _torch.tree_flatten((args, kwargs))[0]
        flags = (leaf if isinstance(leaf, bool | str | NoneType) else type(leaf) for leaf in leaves)
        key = (name, module.training, *flags)
        if key not in self._facts:
            found = self._facts[key] = _look(module, function, args, kwargs, self.rates, self.device)
            found.choice = (selective if self.mode == "selective" else full)(found.costs)
        facts = self._facts[key]
        if self.budget is not None and not self._spent:
            facts.calls += 1
            given = [tensor for tensor in _torch.tensors_of((args, kwargs)) if tensor.requires_grad]
            entering = {_torch.storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in given}
            if facts.calls == 1:  # a mask that every block gets is kept once
                entry = sum(nbytes for home, nbytes in entering.items() if home not in self._entered)
                facts.costs = replace(facts.costs, entry=entry)
            self._entered |= entering.keys()
        return facts


class _Forward:
    """A block's forward that goes through a `Recompute`."""

    def __init__(self, recompute: Recompute, name: str, module: nn.Module, forward: Function) -> None:
        self.recompute, self.name, self.module, self.forward = recompute, name, module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.recompute.call(self.name, self.module, self.forward, args, kwargs)


# The first call


class _Ops(_torch.DispatchMode):
    """Prices every op, and sees which memory is written to. Storages are told apart by numbers: their keys come again."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.seconds: list[float] = []
        self.priced: list[tuple[int, int, float, list[int]]] = []  # place, bytes, seconds, storages
        self.written: set[int] = set()
        self._numbers: dict[int, int] = {}
        self._last = 0

    def home(self, tensor: Tensor, made: bool = False) -> int:
        """The number of a tensor's storage, a new one if it was just made."""
        key = _torch.storage_key(tensor)
        if made or key not in self._numbers:
            self._last += 1
            self._numbers[key] = self._last
        return self._numbers[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op and price it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = _torch.tensors_of(result)
        given = {_torch.storage_key(tensor) for tensor in _torch.tensors_of((args, kwargs))}
        fresh = {_torch.storage_key(tensor): tensor for tensor in made}
        for key, tensor in fresh.items():
            self.home(tensor, made=key not in given)
        if _torch.is_in_place(func) and args and isinstance(args[0], Tensor):
            self.written.add(self.home(args[0]))
        seconds = 0.0
        if costs.kind_of(func) != "view":
            flops = costs.flops_of(func, args, kwargs, result)
            moved = sum(costs.traffic(func, args, kwargs, result))
            seconds = max(flops / self.rates.flops_per_s, moved / self.rates.bytes_per_s)
        if costs.is_product(func):
            self.priced.append((len(self.seconds), sum(t.nbytes for t in made), seconds, [self.home(t) for t in made]))
        self.seconds.append(seconds)
        return result


def _look(module: nn.Module, function: Function, args: Any, kwargs: Any, rates: Rates, device: torch.device) -> _Facts:
    """Run a block's call once for nothing, and say what it costs and what it touches."""
    given = _torch.tensors_of((args, kwargs))
    copies = [_like(tensor) for tensor in given]
    versions = [copy._version for copy in copies]
    replaced = {id(tensor): copy for tensor, copy in zip(given, copies, strict=True)}
    homes = [home for m in module.modules() for home in (vars(m), m._buffers)]
    held = [(home, key, value, _frozen(value)) for home in homes for key, value in home.items() if key not in _TABLES]
    states = {id(t) for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}
    last = 0
    ops = _Ops(rates)
    ignored = {ops.home(t) for t in (*module.parameters(), *module.buffers())}
    entering = {ops.home(copy): copy.nbytes for copy in copies if copy.requires_grad}
    ignored |= {ops.home(copy) for copy in copies if not copy.requires_grad}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal last
        last = len(ops.seconds)
        if id(tensor) not in states:
            saved[ops.home(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an op that saved its own result would hold itself: no backward lets go of this graph

    devices = [device] if device.type == "cuda" else []
    changes = []
    with untouched(module), torch.random.fork_rng(devices=devices):
        with saved_tensors_hooks(pack, lambda tensor: tensor), ops:
            inside, named = _copied((args, kwargs), replaced)
            output = function(*inside, **named)
        for home, key, value, content in held:
            changed = home.get(key) is not value or not _equal(value, content)
            if changed or _may_change(key, value):
                changes.append((home, key))
            if changed and isinstance(value, Tensor):
                value.data.copy_(content)
    returned = {ops.home(tensor) for tensor in _torch.tensors_of(output)}
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


_TABLES = ("_parameters", "_buffers", "_modules")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SMALL = 1 << 16
"""Bytes of a buffer that is worth copying at every call, in case that this one writes to it."""


def _may_change(key: str, value: Any) -> bool:
    """Whether a call other than the first may change it: a copy of every call is held of what is small."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and value.nbytes <= _SMALL
    return not (key in _OF_EVERY_MODULE or isinstance(value, nn.Module) or callable(value))


def _frozen(value: Any) -> Any:
    """What a value of a module holds now; parameters and modules are not for a call to change."""
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else value


def _equal(value: Any, content: Any) -> bool:
    if isinstance(value, Tensor):
        return value is content or torch.equal(value, content)
    if type(value) in (list, dict):
        pairs = zip(value, content, strict=False) if isinstance(value, list) else zip(value.items(), content.items(), strict=False)
        return len(value) == len(content) and all(a is b or _same_items(a, b) for a, b in pairs)
    return type(value) is not set or value == content


def _same_items(a: Any, b: Any) -> bool:
    return isinstance(a, tuple) and len(a) == 2 and a[0] == b[0] and a[1] is b[1]


def _like(tensor: Tensor) -> Tensor:
    """A copy that a block may write to, with or without a gradient as the original."""
    copy = tensor.detach().clone()
    return copy.requires_grad_().clone() if tensor.requires_grad else copy


def _unwritten(writes: frozenset[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """A call's tensors, copies in the place of those that it writes to: a repetition starts from what came in."""
    return [tensor.clone() if place in writes else tensor for place, tensor in enumerate(tensors)]


# A call and its repetition


class _Kept:
    """The results of one call that are kept, by their place among the products; they lie where `offload` puts them."""

    def __init__(self, places: frozenset[int], device: torch.device, offload: Activations | None) -> None:
        self.places, self.device, self.offload = places, device, offload
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
                offload = self.kept.offload
                pack = Tensor.detach if offload is None else lambda tensor: offload.pack(tensor.detach())
                self.kept.results[self.place] = _torch.tree_map_tensors(pack, result)
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
                offload = self.kept.offload
                leaves, spec = _torch.tree_flatten(self.kept.results[self.place])
                if offload is not None:
                    leaves = [offload.unpack(leaf) if isinstance(leaf, View) else leaf for leaf in leaves]
                return _torch.tree_unflatten([x.detach() if isinstance(x, Tensor) else x for x in leaves], spec)
        return func(*args, **(kwargs or {}))


class _Before:
    """What a call changes on its modules, as it was before; the repetition finds that, and leaves everything as it is by then."""

    def __init__(self, module: nn.Module, changes: list[tuple[dict[str, Any], str]]) -> None:
        self.module, self.repeating = module, False
        self.values = [(home, key, _frozen(home.get(key))) for home, key in changes]

    @contextmanager
    def again(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter `inner` with everything as it was before the call; afterwards all is as it was before the repetition."""
        with ExitStack() as stack:
            stack.enter_context(untouched(self.module))
            for home, key, value in self.values:
                home[key] = _frozen(value)  # another tensor: nothing that was saved is written to
            stack.enter_context(inner)
            self.repeating = True
            stack.callback(lambda: setattr(self, "repeating", False))
            yield


class _Anew:
    """A context that is made anew whenever it is entered: a call is repeated for every backward through it (a gradient penalty)."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self.make = make
        self.entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        self.entered.append(self.make())
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.pop().__exit__(*error)


def has_blocks(names: Sequence[str], plan_text: str, class_name: str) -> bool:
    """Whether there is anything to recompute block by block; warns in a sentence if there is not."""
    if not names:
        warnings.warn(f"{plan_text} changes nothing: {class_name} has no repeated blocks, the units of recompute", stacklevel=2)
    return bool(names)
