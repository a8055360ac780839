"""`offload=params`: FSDP2's shards lie in host memory or on disk, and come to the device one unit at a time.

A unit's shards have memory only while it is gathered (before its forward and its backward) and while it is updated; the units that
follow are read ahead by the shelf, and the next one travels to a GPU while this one computes. Under `update=backward` a unit that
came for its backward stays until its update, so that a step reads every parameter twice and writes it once. Only zero=3 has such
units; a run of a single rank gets them from an FSDP2 mesh of one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from meshwright import _torch
from meshwright.parallel import fsdp
from meshwright.parallel.copies import Copies
from meshwright.parallel.fsdp import Root
from meshwright.parallel.parameters import Parameter, Stored
from meshwright.parallel.ranks import Ranks
from meshwright.parallel.shelf import Order, Place, Shelf, places
from meshwright.plan.plan import Offload

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's malloc.h."""


class _Unit:
    """The shards of what FSDP2 gathers together; `awake` while they have memory, `coming` while that is being filled."""

    def __init__(self, number: int, group: Any, entries: list[Parameter]) -> None:
        self.number, self.group, self.entries = number, group, entries
        self.shards = [_torch.local_of(entry.live) for entry in entries]
        self.sizes = [shard.untyped_storage().nbytes() for shard in self.shards]  # with FSDP2's padding
        self.awake = True
        self.coming: tuple[Any] | None = None

    def pairs(self, memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each shard's storage as bytes, and its place in `memory`."""
        for shard, part in zip(self.shards, memory[: sum(self.sizes)].split(self.sizes), strict=True):
            if len(part):
                yield torch.empty(0, dtype=torch.uint8, device=shard.device).set_(shard.untyped_storage()), part

    def wake(self) -> None:
        for shard, size in zip(self.shards, self.sizes, strict=True):
            shard.untyped_storage().resize_(size)
        self.awake = True

    def sleep(self) -> None:
        for shard in self.shards:
            shard.untyped_storage().resize_(0)
        self.awake = False


class Parked:
    """The units of a root that are parked, and where. `keep`: units that wake in a backward stay until they have been updated."""

    def __init__(self, root: Root, taken: list[Parameter], offload: Sequence[Offload], ranks: Ranks) -> None:
        """Choose the units by the plan's fractions and claim their room. None sleeps yet: `park` begins it.

        Raises `PlanError` for a directory that won't do.
        """
        self.keep = False
        if ranks.device.type == "cpu":
            _return_freed_memory()
        units = fsdp.units(root, taken)
        sizes = [sum(_shard_bytes(entry, ranks.size("dp_shard")) for entry in entries) for _, entries in units]
        where = places(offload, "params", ranks.device, sizes)
        away = [number for number, place in enumerate(where) if place != Place(ranks.device)]
        self._numbers = {id(units[number][0]): item for item, number in enumerate(away)}
        self.ahead = ranks.device.type != "cpu"
        self.shelf = Shelf([sizes[number] for number in away], [where[number] for number in away], travels=self.ahead)
        self._copies, self._order = Copies(ranks.device), Order()
        self._units: dict[int, _Unit] = {}
        self._numbered: dict[int, _Unit] = {}
        self._next: _Unit | None = None

    def park(self, group: Any, entries: list[Parameter]) -> None:
        """Store the values of a unit that is to be parked, and let it sleep from now on whenever it is not needed."""
        if id(group) not in self._numbers:
            return
        unit = _Unit(self._numbers[id(group)], group, entries)
        for entry in entries:
            self._units[id(entry)] = unit
            self._numbered[unit.number] = unit
            entry.stored = self._stored(entry)
        _torch.fsdp_around_gather(group, lambda: self._before(unit), lambda: self._after(unit))
        self._store(unit)

    def _stored(self, entry: Parameter) -> Stored:
        def get() -> Tensor:
            with self.awake([entry], changed=False):
                return entry.master.detach().clone()

        def put(value: Tensor) -> None:
            with self.awake([entry]):
                entry.master.detach().copy_(value)

        return Stored(entry.master.shape, entry.master.dtype, get, put)

    def _before(self, unit: _Unit) -> None:
        if not _torch.fsdp_is_gathered(unit.group):
            self._need(unit)

    def _after(self, unit: _Unit) -> None:
        if unit.awake and not (self.keep and _torch.in_backward()):
            _torch.fsdp_wait_for_copy_in(unit.group)
            unit.sleep()

    def _need(self, unit: _Unit, learn: bool = True) -> None:
        """Have a unit awake, and begin to wake the one that follows."""
        following = self._order.next(unit.number) if learn and self.ahead else None
        if self._next is not None and self._next is not unit:
            self._drop(self._next)  # another order than the last time
        if not unit.awake:
            self._begin(unit, learn)
        self._arrived(unit)
        self._next = None
        if following is not None and not self._numbered[following].awake:
            self._next = self._numbered[following]
            self._begin(self._next, learn)

    def _begin(self, unit: _Unit, learn: bool) -> None:
        memory = self.shelf.take(unit.number, learn=learn)
        unit.wake()
        unit.coming = (self._copies.fill(unit.pairs(memory)),)

    def _arrived(self, unit: _Unit) -> None:
        if unit.coming is not None:
            self._copies.arrived(*unit.coming)  # the host waits: FSDP2 reads the shards on a stream of its own
            unit.coming = None
            self.shelf.give(unit.number, changed=False)

    def _drop(self, unit: _Unit) -> None:
        """Let a unit sleep, unchanged."""
        self._arrived(unit)
        unit.sleep()

    def _store(self, unit: _Unit) -> None:
        memory = self.shelf.take(unit.number, fresh=True, learn=False)
        for flat, part in unit.pairs(memory):
            part.copy_(flat)
        self.shelf.give(unit.number)
        unit.sleep()

    @contextmanager
    def awake(self, entries: Iterable[Parameter], changed: bool = True) -> Iterator[None]:
        """Have the units of `entries` in memory inside; `changed` says that their values are to be kept."""
        units = {unit.number: unit for entry in entries if (unit := self._units.get(id(entry))) is not None}
        for unit in units.values():
            self._need(unit, learn=changed)
        try:
            yield
        finally:
            for unit in units.values():
                if changed:
                    self._store(unit)
                else:
                    self._drop(unit)

    def release(self) -> None:
        """Let every unit sleep, unchanged."""
        for unit in self._numbered.values():
            if unit.awake:
                self._drop(unit)
        self._next = None


def _return_freed_memory() -> None:
    """Have glibc give large blocks back to the system when they are freed, for the rest of this process.

    By default its threshold for doing so grows to 32 MiB with the blocks that come and go, and a unit's memory stays in a heap that
    falls to pieces: three times the live bytes. Elsewhere than in glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 20)


def _shard_bytes(entry: Parameter, shards: int) -> int:
    """Bytes of this rank's rows of a parameter, as FSDP2 pads them."""
    return -(-entry.shape[0] // shards) * (entry.shape.numel() // entry.shape[0]) * entry.live.element_size()
