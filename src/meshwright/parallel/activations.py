"""`offload=activations`: what blocks save for the backward lies in host memory or on disk until shortly before it is needed.

Every storage that a block's call saves goes out once, however many views of it are saved. Its memory is let go of when the call
after the next one begins, which waits for the transfer if it must; when the backward reaches a block, what the block before it
saved is on its way back. So activations on the device are always those of two blocks, the one at work and the one that travels.
Parameters, buffers, inputs without a gradient (masks, position tables) and whatever is smaller than `SMALLEST` stay. The fraction
of `offload=activations:...@0.5` counts blocks: the first ones go, to disk before to the host; the last ones stay, whose turn in the
backward comes first.

On a GPU tensors travel on a stream of their own, through pinned buffers that are used again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from meshwright import _torch
from meshwright.parallel.disk import Disk, Slot, Transfer, aligned
from meshwright.plan.plan import Offload

SMALLEST = 4096
"""Bytes of a storage that is worth a transfer."""


class Activations:
    """Where the saved tensors of a module's blocks lie, `SMALLEST` bytes and more; `items` are those of the plan that move anything
    from this device.
    """

    def __init__(self, items: Sequence[Offload], device: torch.device) -> None:
        """Open what the items need. Raises `PlanError` for a directory that won't do."""
        self._device = device
        self._ends: list[tuple[float, _Home]] = []
        total = 0.0
        for item in sorted(items, key=lambda item: item.directory is None):  # the first blocks go to the slowest
            total += item.fraction
            home = _Gpu(device, item.directory) if device.type == "cuda" else _OnDisk(str(item.directory))
            self._ends.append((total, home))
        self._order: dict[str, int] = {}
        self._known = False
        self._last: _Call | None = None
        self._current: _Call | None = None
        self._here: deque[_Call | None] = deque()  # calls whose storages may still be here; None for one that sends nothing

    @property
    def written_bytes(self) -> int:
        """Bytes that have gone out so far."""
        return sum(home.written for _, home in self._ends)

    def _home(self, name: str) -> _Home | None:
        """Where a block's tensors go. Until the first backward the number of blocks is not known: all go to the first place."""
        place = self._order.setdefault(name, len(self._order))
        if not self._known:
            return self._ends[0][1] if self._ends else None
        return next((home for end, home in self._ends if place < round(end * len(self._order))), None)

    @contextmanager
    def block(self, name: str, module: nn.Module, given: Sequence[Tensor]) -> Iterator[None]:
        """Entered around a block's call on the tensors `given`."""
        home = self._home(name)
        while len(self._here) > 1:
            if (before := self._here.popleft()) is not None:
                before.let_go()
        if home is None:
            self._here.append(None)
            yield
            return
        stays = (*module.parameters(), *module.buffers(), *(tensor for tensor in given if not tensor.requires_grad))
        call = _Call(home, {_torch.storage_key(tensor) for tensor in stays}, self._last)
        self._last = self._current = call
        self._here.append(call)
        try:
            with saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self._current = None
            call.close()

    def pack(self, tensor: Tensor) -> Any:
        """What is kept in the place of a saved tensor of the block at work."""
        base = tensor if tensor._base is None else tensor._base
        call = self._current
        if call is None or (base.is_leaf and base.requires_grad) or tensor.layout != torch.strided:
            return tensor
        if tensor.device.type != self._device.type:
            return tensor
        stored = call.store(tensor)
        return tensor if stored is None else View(stored, tensor)

    def unpack(self, kept: Any) -> Tensor:
        """The tensor again, from wherever it is."""
        if isinstance(kept, Tensor):
            return kept
        if self._last is not None:
            self._last, self._known = None, True
        found: Tensor = kept.tensor()
        return found


class View:
    """How a saved tensor lies in a storage that has gone out."""

    def __init__(self, stored: _Stored, tensor: Tensor) -> None:
        self.stored, self.dtype = stored, tensor.dtype
        self.place = (int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def tensor(self) -> Tensor:
        """The tensor, in memory that has come back."""
        memory = self.stored.back()
        return torch.empty(0, dtype=self.dtype, device=memory.device).set_(memory.untyped_storage(), *self._moved(memory))

    def _moved(self, memory: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
        """The place in memory that may itself begin within a larger storage."""
        offset, shape, stride = self.place
        return int(offset) + memory.storage_offset() // self.dtype.itemsize, shape, stride


class _Call:
    """One call of a block: what it has sent out, and the call before it."""

    def __init__(self, home: _Home, stays: set[int], before: _Call | None) -> None:
        self.home, self.stays, self.before = home, stays, before
        self.stored: dict[int, _Stored] = {}
        self.kept: list[weakref.ref[_Stored]] = []
        self.fetched = False

    def store(self, tensor: Tensor) -> _Stored | None:
        """Send a tensor's storage out, unless it stays."""
        key = _torch.storage_key(tensor)
        if key in self.stays or tensor.untyped_storage().nbytes() < SMALLEST:
            return None
        if key not in self.stored:
            self.stored[key] = _Stored(self, tensor)
            self.kept.append(weakref.ref(self.stored[key]))
        return self.stored[key]

    def close(self) -> None:
        """The call is over: what it saved goes out as it is by now, held by the views of whoever saved it.

        Not before: ops may save one part of a storage, then write to another part and save that (the gates of a GRU).
        """
        self.stored = {}  # their keys may come again
        for stored in self._living():
            stored.send()

    def _living(self) -> Iterator[_Stored]:
        return (stored for reference in self.kept if (stored := reference()) is not None)

    def let_go(self) -> None:
        """Free what has been sent, once it has left."""
        self.home.tidy()
        for stored in self._living():
            self.home.left(stored.ticket)
            stored.memory = None

    def fetch(self) -> None:
        """Begin to bring back what is out, and what the call before has out."""
        for call in (self, self.before):
            if call is not None and not call.fetched:
                call.fetched = True
                for stored in call._living():
                    stored.fetch()
        self.before = None


class _Stored:
    """A storage that goes out when its call is over: `memory` while it is still here, or here again."""

    def __init__(self, call: _Call, tensor: Tensor) -> None:
        self.call = call
        self.memory: Tensor | None = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.ticket: Any = None

    def send(self) -> None:
        """Begin to take it out."""
        self.ticket = self.call.home.send(self)

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.memory is None:
            self.call.home.fetch(self.ticket)

    def back(self) -> Tensor:
        self.call.fetch()
        return self.memory if self.memory is not None else self.call.home.receive(self.ticket)

    def __del__(self) -> None:
        if self.ticket is not None:  # in whatever thread collects it: what has to wait for a transfer is done later
            self.ticket.drop()
            self.call.home.freed.append(self.ticket)


class _Home:
    """Where storages go. `freed` are the tickets of those that nobody needs any more."""

    written = 0

    def __init__(self) -> None:
        self.freed: deque[Any] = deque()

    def send(self, stored: _Stored) -> Any:
        """Begin to take a storage out; return what it is found by."""
        raise NotImplementedError

    def left(self, ticket: Any) -> None:
        """Wait until it is out, or have the device wait before it uses the memory again."""
        raise NotImplementedError

    def fetch(self, ticket: Any) -> None:
        """Begin to bring it back."""
        raise NotImplementedError

    def receive(self, ticket: Any) -> Tensor:
        """Return it."""
        raise NotImplementedError

    def tidy(self) -> None:
        """Give the room of what was freed to what comes next."""
        while self.freed:
            self.free(self.freed.popleft())

    def free(self, ticket: Any) -> None:
        """Let another storage have its room."""
        raise NotImplementedError


class _DiskTicket:
    """A slot with what is being written to it or read from it."""

    def __init__(self, slot: Slot, writing: Transfer) -> None:
        self.slot = slot
        self.writing: Transfer | None = writing
        self.reading: Transfer | None = None

    def drop(self) -> None:
        """Let go of what came back; a transfer under way holds its own memory."""
        self.writing = self.reading = None


class _OnDisk(_Home):
    """A file of this rank."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.disk = Disk(directory)

    @property
    def written(self) -> int:  # type: ignore[override]
        """Bytes that have gone out."""
        return self.disk.written

    def send(self, stored: _Stored) -> _DiskTicket:
        """Begin to take a storage out; return what it is found by."""
        assert stored.memory is not None
        slot = self.disk.slot(stored.memory.nbytes, loose=True)
        return _DiskTicket(slot, self.disk.write(slot, stored.memory))

    def left(self, ticket: _DiskTicket) -> None:
        """Wait until it is written. Raises `TrainingError` where the disk failed."""
        if ticket.writing is not None:
            ticket.writing.wait()
            ticket.writing = None

    def fetch(self, ticket: _DiskTicket) -> None:
        """Begin to bring it back."""
        if ticket.reading is None:
            ticket.reading = self.disk.read(ticket.slot, aligned(ticket.slot.nbytes, ticket.slot.shift))

    def receive(self, ticket: _DiskTicket) -> Tensor:
        """Return it."""
        self.fetch(ticket)
        assert ticket.reading is not None
        return ticket.reading.wait()

    def free(self, ticket: _DiskTicket) -> None:
        """Let another storage have its slot."""
        self.disk.release(ticket.slot)


class _GpuTicket:
    """A pinned copy, whole once `gone` is reached; `memory` is what it is brought back to, there once `there` is reached."""

    def __init__(self, host: Tensor, gone: Any) -> None:
        self.host: Tensor | None = host
        self.nbytes, self.gone = host.nbytes, gone
        self.slot: Slot | None = None
        self.writing: Transfer | None = None
        self.reading: Transfer | None = None
        self.memory: Tensor | None = None
        self.there: Any = None
        self.received = False

    def drop(self) -> None:
        """Let go of what came back; what nobody took waits for the copy into it."""
        if self.received:
            self.memory = None


class _Gpu(_Home):
    """Pinned buffers, and behind them a file if there is a directory. Copies run on one stream, in the order asked for."""

    def __init__(self, device: torch.device, directory: str | None) -> None:
        super().__init__()
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.disk = Disk(directory) if directory is not None else None
        self.spare: dict[int, list[Tensor]] = {}

    def _pinned(self, nbytes: int) -> Tensor:
        spare = self.spare.get(nbytes)
        return spare.pop() if spare else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def _give_back(self, ticket: _GpuTicket) -> None:
        if ticket.host is not None:
            self.spare.setdefault(ticket.nbytes, []).append(ticket.host)
            ticket.host = None

    def send(self, stored: _Stored) -> _GpuTicket:
        """Begin to take a storage out; return what it is found by."""
        assert stored.memory is not None
        host = self._pinned(stored.memory.nbytes)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(stored.memory, non_blocking=True)
            gone = self.stream.record_event()
        self.written += host.nbytes
        ticket = _GpuTicket(host, gone)
        if self.disk is not None:
            ticket.slot = self.disk.slot(host.nbytes)
            ticket.writing = self.disk.write(ticket.slot, host, after=gone.synchronize)
        return ticket

    def left(self, ticket: _GpuTicket) -> None:
        """Have the device wait until it has left; one that goes to disk gives its buffer back."""
        torch.cuda.current_stream(self.device).wait_event(ticket.gone)
        if ticket.writing is not None:
            ticket.writing.wait()
            ticket.writing = None
            self._give_back(ticket)

    def fetch(self, ticket: _GpuTicket) -> None:
        """Begin to bring it back."""
        if ticket.memory is not None or ticket.reading is not None:
            return
        if ticket.host is None:
            assert self.disk is not None
            assert ticket.slot is not None
            ticket.host = self._pinned(ticket.nbytes)
            ticket.reading = self.disk.read(ticket.slot, ticket.host)
            return
        self._bring(ticket)

    def _bring(self, ticket: _GpuTicket) -> None:
        assert ticket.host is not None
        ticket.memory = torch.empty(ticket.nbytes, dtype=torch.uint8, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            ticket.memory.copy_(ticket.host, non_blocking=True)
            ticket.there = self.stream.record_event()

    def receive(self, ticket: _GpuTicket) -> Tensor:
        """Return it."""
        self.fetch(ticket)
        if ticket.reading is not None and ticket.memory is None:
            ticket.reading.wait()
            self._bring(ticket)
        assert ticket.memory is not None
        torch.cuda.current_stream(self.device).wait_event(ticket.there)
        ticket.received = True
        return ticket.memory

    def free(self, ticket: _GpuTicket) -> None:
        """Let another storage have its buffer and its slot."""
        if ticket.memory is not None:  # nobody took it: its memory must not be used again before the copy into it is over
            torch.cuda.current_stream(self.device).wait_event(ticket.there)
            ticket.memory = None
        for transfer in (ticket.writing, ticket.reading):
            if transfer is not None:
                transfer.wait()
        if self.disk is not None:
            assert ticket.slot is not None
            self.disk.release(ticket.slot)
            if ticket.there is not None:
                ticket.there.synchronize()  # a thread of the disk may be the next to write into the buffer
        self._give_back(ticket)  # later copies into it run on the same stream, after those out of it
