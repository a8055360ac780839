"""Optimizer states in another form or place, and the update that streams over them a slice at a time.

A slice is a bounded stretch of this rank's parameters. Its states (and, where the plan says so, its fp32 masters or Kahan's
compensation) are the bytes of one item of a shelf. An update takes the item, hands the user's own torch optimizer the slice as
plain parameters with plain states, lets it step, and puts the results back: so any elementwise optimizer works, and its groups,
rates and hooks are the user's. Everything else (checkpoints, exports) reads a state as a `Stored`.

| the weights are updated | between updates they are                                     | a slice's item holds    |
|-------------------------|--------------------------------------------------------------|-------------------------|
| as they are             | the master that the plan has anyway                          | the states              |
| from a stored master    | fp32 in the item; the 16-bit live weights are its rounding   | the states, the master  |
| with Kahan's sum        | bfloat16; the item has what rounding left (arXiv:2010.06192) | the states, 2 bytes     |
| stochastically          | bfloat16, rounded at random so that the mean is right        | the states              |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.engine.optimizer import BoundOptimizer, OptimizerFactory, refuse_whole_matrices
from meshwright.errors import ConfigError
from meshwright.parallel.copies import Copies
from meshwright.parallel.forms import Form, remainder, stochastic_bf16
from meshwright.parallel.materialise import derive_seed
from meshwright.parallel.parameters import Parameter, Stored
from meshwright.parallel.parked import Parked
from meshwright.parallel.ranks import Ranks
from meshwright.parallel.shelf import Place, Shelf, active, places
from meshwright.plan import Plan
from meshwright.plan.memory import slice_elements

_FUSED_ON_CPU = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_WEIGHT = ""
"""The field of an item that belongs to the weight itself: its master, or what rounding left of it."""
_AS_IS = Form("fp32")
_APART = 8192
"""Bytes between large fields: an update reads them side by side, and addresses a power of two apart share a place in the cache
(three to seven times slower on an EPYC).
"""


@dataclass(frozen=True)
class _Field:
    key: str
    form: Form
    dtype: torch.dtype


@dataclass(eq=False)
class _Piece:
    """Elements `start` to `start + count` of an entry's master; `places` are those of its fields in the slice's item."""

    entry: Parameter
    start: int
    count: int
    places: dict[str, slice] = field(default_factory=dict)

    @property
    def last(self) -> bool:
        return self.start + self.count == self.entry.master.numel()


@dataclass(eq=False)
class _Slice:
    number: int
    pieces: list[_Piece] = field(default_factory=list)
    count: int = 0


@dataclass(eq=False)
class _Job:
    """An update of some pieces of a slice. Once `begun`, their gradients (and weights, by piece) are `there`, or on their way."""

    slice: _Slice
    pieces: list[_Piece]
    gradients: list[Tensor]
    there: list[Tensor] = field(default_factory=list)
    weights: dict[int, Tensor] = field(default_factory=dict)
    begun: tuple[Any, ...] = ()


class StoredOptimizer(BoundOptimizer):
    """A torch optimizer whose states (and what else the plan says) lie on a shelf. See this file's first lines.

    `beside`: the host updates in a thread of its own while the device computes, where states lie on the host of another device.
    (Not with `offload=params`: the units that an update needs come and go with the backward.)
    `torch.state` has only what is no tensor of a parameter's shape (step counts); `state_dict()` of the torch optimizer puts the
    states of this rank in, `load_state_dict()` takes them out again.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        table: list[Parameter],
        ranks: Ranks,
        plan: Plan,
        groups: Sequence[Sequence[Parameter]],
        parked: Parked | None,
        seed: int,
    ) -> None:
        """Build the optimizer; `groups` are the entries that are updated together, in the order in which that happens."""
        self._parked = parked
        super().__init__(factory, table, ranks)
        refuse_whole_matrices(self.torch, plan)
        self._plan, self._device, self._seed = plan, ranks.device, seed
        known = {id(entry) for entry in self.entries}
        kept = [[entry for entry in group if id(entry) in known] for group in groups]
        self._group_of = {
            id(parameter): index for index, group in enumerate(self.torch.param_groups) for parameter in group["params"]
        }
        self._groups = kept
        away = any(item.what == "optimizer" for item in active(plan, ranks.device))
        self._rounds = plan.optimizer_state != "fp32" or plan.master == "stochastic"
        total = sum(entry.master.numel() for group in kept for entry in group)
        # What is updated where and as it lies needs no room beside it.
        self._slices = _cut(kept, slice_elements(total) if away or self._rounds or plan.master != "fp32" else max(1, total))
        self._slices_of: dict[int, list[_Slice]] = {}
        for one in self._slices:
            for piece in one.pieces:
                self._slices_of.setdefault(id(piece.entry), []).append(one)
        where = places(active(plan, ranks.device), "optimizer", ranks.device, [one.count for one in self._slices])
        self._weights = {id(entry): self._way(entry, where) for group in kept for entry in group}
        self._fields = self._all_fields()
        self.shelf = Shelf([self._lay_out(one) for one in self._slices], where)
        self._copies = Copies(ranks.device)
        self.beside = parked is None and any(place.device != ranks.device for place in where)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="meshwright-update")
        self._under_way: Future[None] | None = None
        self._started: set[int] = set()
        self._store_weights()
        self._absorb()
        self.torch.register_state_dict_post_hook(lambda _, found: self._with_states(found))
        self.torch.register_load_state_dict_post_hook(lambda _: self._absorb())

    # What is stored

    def _way(self, entry: Parameter, where: Sequence[Place]) -> str:
        """How an entry's weights are updated: `as is`, from a `stored` master, by `kahan`, or `stochastic`."""
        if self._plan.master != "fp32" and entry.master.dtype == torch.bfloat16 and entry.dtype != torch.bfloat16:
            return self._plan.master
        apart = entry.master.dtype != entry.live.dtype and not (self._plan.pp > 1 and self._plan.zero == 3)  # their live rows sleep
        elsewhere = any(where[one.number] != Place(self._device) for one in self._slices_of[id(entry)])
        return "stored" if apart and elsewhere else "as is"

    def _dtype(self, entry: Parameter) -> torch.dtype:
        """The dtype that an entry is updated in."""
        return entry.dtype if self._weights[id(entry)] in ("kahan", "stochastic") else entry.master.dtype

    def _all_fields(self) -> dict[int, list[_Field]]:
        """What an item holds of each entry; the optimizer's states are learned from an update of two zeros."""
        learned: dict[tuple[int, torch.dtype], list[_Field]] = {}
        fields = {}
        self._with_weights: set[tuple[int, str]] = set()  # (group, key): counts that lie where the weights do, not on the host
        for entry in self.entries:
            dtype = self._dtype(entry)
            kind = (self._group_of[id(entry.master)], dtype)
            if kind not in learned:
                probe = nn.Parameter(torch.zeros(2, dtype=dtype, device=self._device))
                probe.grad = torch.zeros_like(probe)
                state: dict[str, Any] = {}
                self._call([(kind[0], probe, state)])
                learned[kind] = [
                    _Field(key, Form(self._plan.optimizer_state) if value.is_floating_point() else _AS_IS, value.dtype)
                    for key, value in state.items()
                    if isinstance(value, Tensor) and value.shape == probe.shape
                ]
                there = {key for key, value in state.items() if isinstance(value, Tensor) and value.device.type != "cpu"}
                self._with_weights |= {(kind[0], key) for key in there}
            weight = {"stored": [_Field(_WEIGHT, _AS_IS, dtype)], "kahan": [_Field(_WEIGHT, _AS_IS, torch.bfloat16)]}
            fields[id(entry)] = [*weight.get(self._weights[id(entry)], []), *learned[kind]]
        return fields

    def _lay_out(self, one: _Slice) -> int:
        """Give every field of every piece its offset in the slice's item; return the item's bytes."""
        end = 0
        for piece in one.pieces:
            for each in self._fields[id(piece.entry)]:
                nbytes = each.form.nbytes(piece.count, each.dtype)
                piece.places[each.key] = slice(end, end + nbytes)
                end += -(-nbytes // 64) * 64 + (_APART if nbytes >= 128 * _APART else 0)
        return end

    def _store_weights(self) -> None:
        """Move the masters that are to be stored into their items, and begin Kahan's sums at zero."""
        for one in self._slices:
            if not any(_WEIGHT in piece.places for piece in one.pieces):
                continue
            memory = self.shelf.take(one.number, fresh=True, learn=False).zero_()
            for piece in one.pieces:
                if self._weights[id(piece.entry)] == "stored":
                    memory[piece.places[_WEIGHT]].view(self._dtype(piece.entry)).copy_(_stretch(piece.entry.master, piece))
            self.shelf.give(one.number)
        for entry in self.entries:
            if self._weights[id(entry)] == "as is":
                continue
            if self._weights[id(entry)] == "stored":
                entry.master.untyped_storage().resize_(0)
            shape = entry.master.shape

            def get(entry: Parameter = entry) -> Tensor:
                return self._get_weight(entry)

            def put(value: Tensor, entry: Parameter = entry) -> None:
                self._put_weight(entry, value)

            entry.stored = Stored(shape, self._dtype(entry), get, put)

    # The update

    def step(self) -> None:
        """Update every entry that has a `gradient`."""
        self.update(self.entries)

    def update(self, entries: Iterable[Parameter]) -> None:
        """Update those of `entries` that have a `gradient`: each of them whole, in one call a step."""
        self.settle()
        self._work(self._jobs(entries), self._copies.now())
        self._copies.land()

    def start(self, entries: Iterable[Parameter]) -> Callable[[], None] | None:
        """Begin to `update` entries, after what was started before; return None once it is done, else what waits for that.

        Then the host updates while the caller and its device go on, who may let go of the gradients.
        """
        if not self.beside:
            self.update(entries)
            return None
        self.settle()
        self._under_way = self._thread.submit(self._work, self._jobs(entries), self._copies.now())
        return self.settle

    def settle(self) -> None:
        """Wait for what was started. Raises what went wrong there."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()
            self._copies.land()

    def _jobs(self, entries: Iterable[Parameter]) -> list[list[_Job]]:
        """The slices to update and their gradients, by group."""
        gradients = {id(e): e.gradient.detach() for e in entries if e.gradient is not None and id(e) in self._slices_of}
        found = []
        for group in self._groups:
            chosen = {one.number: one for entry in group if id(entry) in gradients for one in self._slices_of[id(entry)]}
            jobs = []
            for one in chosen.values():
                pieces = [piece for piece in one.pieces if id(piece.entry) in gradients]
                jobs.append(_Job(one, pieces, [gradients[id(piece.entry)] for piece in pieces]))
            if jobs:
                found.append(jobs)
        return found

    @torch.no_grad()
    def _work(self, groups: Sequence[Sequence[_Job]], moment: Any) -> None:
        """Update slices; what the next one needs of the device comes while one is updated, and what the last one gave goes back."""
        with self._copies.after(moment):
            for jobs in groups:
                with self._awake([piece.entry for job in jobs for piece in job.pieces]):
                    for job, following in zip(jobs, [*jobs[1:], None], strict=True):
                        self._bring(job)
                        if following is not None and self.shelf.place(following.slice.number).device != self._device:
                            self._bring(following)
                        self._update_slice(job)
                    self._copies.land()  # before a unit that was awake is stored and lets go of its memory
                self._started |= {id(piece.entry) for job in jobs for piece in job.pieces}

    def _awake(self, entries: Iterable[Parameter], changed: bool = True) -> AbstractContextManager[None]:
        """Have the weights of `entries` in memory inside."""
        return nullcontext() if self._parked is None else self._parked.awake(entries, changed)

    def _bring(self, job: _Job) -> None:
        """Begin to bring a slice's gradients, and the weights that its item does not have, to where it is updated."""
        if job.begun:
            return
        device = self.shelf.place(job.slice.number).device
        for piece, gradient in zip(job.pieces, job.gradients, strict=True):
            entry, dtype = piece.entry, self._dtype(piece.entry)
            job.there.append(self._copies.down(_stretch(gradient, piece), device, dtype))
            if self._weights[id(entry)] != "stored":
                job.weights[id(piece)] = self._copies.down(_stretch(entry.master, piece), device, dtype)
        job.begun = (self._copies.begun(),)

    def _update_slice(self, job: _Job) -> None:
        memory = self.shelf.take(job.slice.number)
        self._copies.arrived(*job.begun)
        generator = torch.Generator(memory.device)
        if self._rounds:
            generator.manual_seed(derive_seed(self._seed, self.now, job.slice.number))
        parts = []
        for piece, gradient in zip(job.pieces, job.there, strict=True):
            parameter = nn.Parameter(self._read_weight(memory, piece, job.weights.pop(id(piece), None)))
            parameter.grad = gradient
            parts.append((self._group_of[id(piece.entry.master)], parameter, self._read_states(memory, piece)))
        self._call(parts)
        for piece, (_, parameter, state) in zip(job.pieces, parts, strict=True):
            self._write_states(memory, piece, state, generator)
            self._write_weight(memory, piece, parameter.detach(), generator)
        self.shelf.give(job.slice.number)
        job.gradients, job.there = [], []

    def _call(self, parts: Sequence[tuple[int, nn.Parameter, dict[str, Any]]]) -> None:
        """Let the user's optimizer step on (group, parameter, its state) alone; the states are changed in place."""
        groups, everything = self.torch.param_groups, self.torch.state
        chosen: dict[int, list[nn.Parameter]] = {}
        for index, parameter, _ in parts:
            chosen.setdefault(index, []).append(parameter)
        self.torch.param_groups = [
            {**groups[index], "params": parameters, **self._kernel(groups[index], parameters[0])}
            for index, parameters in chosen.items()
        ]
        self.torch.state = type(everything)(dict, {parameter: state for _, parameter, state in parts})
        try:
            self.torch.step()
        finally:
            self.torch.param_groups, self.torch.state = groups, everything

    def _kernel(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """On the host the fused kernels, unless the user has said which: one pass over memory in place of a dozen."""
        open_to_choice = (
            "fused" in group and group["fused"] is None and not group.get("foreach") and not group.get("differentiable")
        )
        chosen = open_to_choice and parameter.device.type == "cpu" and type(self.torch) in _FUSED_ON_CPU
        return {"fused": True} if chosen else {}

    # The pieces of an item

    def _read_weight(self, memory: Tensor, piece: _Piece, brought: Tensor | None) -> Tensor:
        """A piece's weights [count] to be updated: `brought` from the device, or from the item."""
        way, entry = self._weights[id(piece.entry)], piece.entry
        if brought is None:
            return memory[piece.places[_WEIGHT]].view(self._dtype(entry))
        if way == "kahan":
            brought += memory[piece.places[_WEIGHT]].view(torch.bfloat16)
        return brought

    def _write_weight(self, memory: Tensor, piece: _Piece, value: Tensor, generator: torch.Generator) -> None:
        """Bring what is kept of a weight, and the live weight, up to the updated `value` [count]."""
        way, entry = self._weights[id(piece.entry)], piece.entry
        if way == "stored":
            mine = memory[piece.places[_WEIGHT]].view(value.dtype)
            if mine.data_ptr() != value.data_ptr():
                mine.copy_(value)
            self._copies.up(_stretch(entry.own_rows(entry.live), piece), value)
            return
        kept = _stretch(entry.master, piece)
        if way == "kahan":
            rounded = value.to(torch.bfloat16)
            self._copies.up(kept, rounded)
            memory[piece.places[_WEIGHT]].view(torch.bfloat16).copy_(remainder(value, rounded))
        elif way == "stochastic":
            self._copies.up(kept, stochastic_bf16(value.float(), generator))
        elif kept.data_ptr() != value.data_ptr():
            self._copies.up(kept, value)

    def _read_states(self, memory: Tensor, piece: _Piece) -> dict[str, Any]:
        """Return a piece's states as the optimizer expects them: none before its first update."""
        if id(piece.entry) not in self._started:
            return {}
        group = self._group_of[id(piece.entry.master)]
        state: dict[str, Any] = {}
        for key, value in self.torch.state.get(piece.entry.master, {}).items():
            where = memory.device if (group, key) in self._with_weights else torch.device("cpu")
            state[key] = value.to(where, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for each in self._fields[id(piece.entry)]:
            if each.key != _WEIGHT:
                mine = memory[piece.places[each.key]]
                view = each.form.view(mine, each.dtype)
                state[each.key] = each.form.decode(mine, piece.count, each.dtype) if view is None else view
        return state

    def _write_states(self, memory: Tensor, piece: _Piece, state: dict[str, Any], generator: torch.Generator) -> None:
        for each in self._fields[id(piece.entry)]:
            value = state.pop(each.key, None)
            if each.key == _WEIGHT or value is None:
                continue
            mine = memory[piece.places[each.key]]
            if mine.data_ptr() != value.data_ptr():
                each.form.encode(value, mine, generator)
        if piece.last:
            grown = [key for key, value in state.items() if isinstance(value, Tensor) and value.dim()]
            if grown:
                raise ConfigError(
                    f"the optimizer keeps {grown[0]} now, which it did not when it was made: its settings may not change"
                )
            self.torch.state[piece.entry.master] = state

    # For checkpoints and exports

    def states(self, entry: Parameter) -> dict[str, Any]:
        """Return this rank's states of an entry: small ones as they are, those of its shape as `Stored`; empty before an update."""
        if id(entry) not in self._started:
            return {}
        return super().states(entry) | {
            each.key: self._state(entry, each.key) for each in self._fields[id(entry)] if each.key != _WEIGHT
        }

    def of_its_shape(self, entry: Parameter, key: str, shape: torch.Size) -> bool:
        """Return whether a saved state of this (whole) shape is one that lies on the shelf: of a scalar too."""
        known = any(each.key == key for each in self._fields[id(entry)])
        return shape == entry.whole and (known or super().of_its_shape(entry, key, shape))

    def empty_state(self, entry: Parameter, key: str, dtype: torch.dtype) -> Stored:
        """Return the state `key` of an entry. Raises `ConfigError` if the optimizer as it is set here has no such state."""
        if not any(each.key == key for each in self._fields[id(entry)]):
            raise ConfigError(f"the optimizer as it is set here keeps no {key}, which the checkpoint has")
        return self._state(entry, key)

    def begin(self, entry: Parameter, state: dict[str, Any]) -> None:
        """Say that an entry has states from now on, of which `state` are those that are not stored."""
        super().begin(entry, state)
        self._started.add(id(entry))

    def forget(self, entry: Parameter) -> None:
        """Drop an entry's states."""
        super().forget(entry)
        self._started.discard(id(entry))

    def _state(self, entry: Parameter, key: str) -> Stored:
        each = next(each for each in self._fields[id(entry)] if each.key == key)
        return Stored(entry.master.shape, each.dtype, lambda: self._get(entry, key), lambda value: self._put(entry, key, value))

    def _pieces(self, entry: Parameter) -> Iterator[tuple[_Slice, _Piece]]:
        for one in self._slices_of[id(entry)]:
            yield from ((one, piece) for piece in one.pieces if piece.entry is entry)

    @torch.no_grad()
    def _get(self, entry: Parameter, key: str) -> Tensor:
        each = next(each for each in self._fields[id(entry)] if each.key == key)
        found = torch.empty(entry.master.shape, dtype=each.dtype, device=self._device)
        for one, piece in self._pieces(entry):
            memory = self.shelf.take(one.number, learn=False)
            _stretch(found, piece).copy_(each.form.decode(memory[piece.places[key]], piece.count, each.dtype))
            self.shelf.give(one.number, changed=False)
        return found

    @torch.no_grad()
    def _put(self, entry: Parameter, key: str, value: Tensor) -> None:
        each = next(each for each in self._fields[id(entry)] if each.key == key)
        for one, piece in self._pieces(entry):
            memory = self.shelf.take(one.number, learn=False)
            generator = torch.Generator(memory.device).manual_seed(self._seed)
            part = _stretch(value, piece).to(device=memory.device, dtype=each.dtype)
            each.form.encode(part, memory[piece.places[key]], generator)
            self.shelf.give(one.number)

    @torch.no_grad()
    def _get_weight(self, entry: Parameter) -> Tensor:
        if self._weights[id(entry)] == "stored":
            return self._get(entry, _WEIGHT)
        with self._awake([entry], changed=False):
            found = entry.master.detach().to(self._dtype(entry), copy=True)
        return found.add_(self._get(entry, _WEIGHT)) if self._weights[id(entry)] == "kahan" else found

    @torch.no_grad()
    def _put_weight(self, entry: Parameter, value: Tensor) -> None:
        with self._awake([entry]):
            rows = entry.own_rows(entry.live.detach()) if self._weights[id(entry)] == "stored" else entry.master.detach()
            rows.copy_(value)
            if self._weights[id(entry)] == "stored":
                self._put(entry, _WEIGHT, value)
            elif self._weights[id(entry)] == "kahan":
                self._put(entry, _WEIGHT, remainder(value.to(rows.device), rows))

    def _absorb(self) -> None:
        """Take the states that torch's optimizer holds (made at once, or loaded into it) onto the shelf."""
        for entry in self.entries:
            state = self.torch.state.get(entry.master)
            if not state or not any(isinstance(v, Tensor) and v.shape == entry.master.shape and v.dim() for v in state.values()):
                continue
            fields = {each.key for each in self._fields[id(entry)]}
            for key in [key for key in state if key in fields]:
                self._put(entry, key, state.pop(key))
            self.begin(entry, state)

    def _with_states(self, found: dict[str, Any]) -> dict[str, Any]:
        """Complete a state_dict of torch's optimizer with this rank's states."""
        numbers: dict[int, int] = {}
        for packed, group in zip(found["param_groups"], self.torch.param_groups, strict=True):
            numbers.update({id(parameter): number for parameter, number in zip(group["params"], packed["params"], strict=True)})
        for entry in self.entries:
            states = {key: value.get() for key, value in self.states(entry).items() if isinstance(value, Stored)}
            if states:
                found["state"].setdefault(numbers[id(entry.master)], {}).update(states)
        return found


def _cut(groups: Sequence[Sequence[Parameter]], limit: int) -> list[_Slice]:
    """Cut each group's masters into slices of at most `limit` elements."""
    slices: list[_Slice] = []
    for group in groups:
        current: _Slice | None = None
        for entry in group:
            start, total = 0, entry.master.numel()
            while True:
                if current is None or current.count >= limit:
                    current = _Slice(len(slices))
                    slices.append(current)
                count = min(total - start, limit - current.count)
                current.pieces.append(_Piece(entry, start, count))
                current.count += count
                start += count
                if start == total:
                    break
    return slices


def _stretch(tensor: Tensor, piece: _Piece) -> Tensor:
    """Return a piece's elements [count] of a contiguous tensor of its entry's master's shape."""
    return tensor.detach().reshape(-1)[piece.start : piece.start + piece.count]
