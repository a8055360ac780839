"""`offload=activations`: what blocks save for the backward lies in host memory or on disk until shortly before it is needed.

Every storage that a block's call saves goes out once, however many views of it are saved, while the next block computes; when the
backward reaches a block, what the block before it saved is on its way back. Parameters, buffers, inputs without a gradient (masks,
position tables) and whatever is smaller than `SMALLEST` stay. Activations on the device are those of about two blocks: the one at
work and the one that travels. The fraction of `offload=activations:...@0.5` counts blocks: the first ones go, to disk before to the
host; the last ones stay, whose turn in the backward comes first.

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
        if home is None or not torch.is_grad_enabled():
            yield
            return
        stays = (*module.parameters(), *module.buffers(), *(tensor for tensor in given if not tensor.requires_grad))
        call = _Call(home, {_torch.storage_key(tensor) for tensor in stays}, self._last)
        self._last = self._current = call
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
        self.fetched = self.closed = False

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
        """The call is over: storages may go, and their keys come again; whoever saved the tensors holds them by their views."""
        self.stored, self.closed = {}, True

    def forget(self, stored: _Stored) -> None:
        """A storage goes while the call is under way: its key may come again."""
        self.stored = {key: other for key, other in self.stored.items() if other is not stored}

    def fetch(self) -> None:
        """Begin to bring back what is out, and what the call before has out."""
        for call in (self, self.before):
            if call is not None and not call.fetched:
                call.fetched = True
                for reference in call.kept:
                    stored = reference()
                    if stored is not None:
                        stored.fetch()
        self.before = None


class _Stored:
    """A storage that has gone out: `memory` while it is still here, or here again."""

    def __init__(self, call: _Call, tensor: Tensor) -> None:
        self.call = call
        self.memory: Tensor | None = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.ticket: Any = call.home.send(self)

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.memory is None:
            self.call.home.fetch(self.ticket)

    def back(self) -> Tensor:
        self.call.fetch()
        return self.memory if self.memory is not None else self.call.home.receive(self.ticket)

    def __del__(self) -> None:
        if hasattr(self, "ticket"):  # in whatever thread collects it: what is to be done is done later
            self.call.home.freed.append(self.ticket)


class _Home:
    """Where storages go: `send` begins to take one out, `fetch` begins to bring it back, `receive` gives it.

    `freed` are the tickets of those that nobody needs any more.
    """

    written = 0

    def __init__(self) -> None:
        self.freed: deque[Any] = deque()

    def send(self, stored: _Stored) -> Any:
        """Begin to take a storage out; return what it is found by."""
        raise NotImplementedError

    def fetch(self, ticket: Any) -> None:
        """Begin to bring it back."""
        raise NotImplementedError

    def receive(self, ticket: Any) -> Tensor:
        """Return it."""
        raise NotImplementedError

    def forget(self, ticket: Any) -> None:
        """Its room may be used again."""
        raise NotImplementedError

    def tidy(self) -> None:
        """Forget what nobody needs: a ticket holds what it has brought back."""
        while self.freed:
            self.forget(self.freed.popleft())


class _DiskTicket:
    """A slot with what is being read from it."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.reading: Transfer | None = None


class _OnDisk(_Home):
    """A file of this rank. At most `_UNDER_WAY` bytes wait to be written; beyond, the forward waits for the disk."""

    _UNDER_WAY = 256 << 20

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.disk = Disk(directory)
        self.waiting: deque[tuple[Sequence[Any], int, _Call, weakref.ref[_Stored]]] = deque()
        self.bytes_waiting = 0

    @property
    def written(self) -> int:  # type: ignore[override]
        """Bytes that have gone out."""
        return self.disk.written

    def send(self, stored: _Stored) -> _DiskTicket:
        """Begin to take a storage out; return what it is found by."""
        self._let_go()
        assert stored.memory is not None
        slot = self.disk.slot(stored.memory.nbytes)
        blocks = self.disk.write(slot, stored.memory).blocks
        self.waiting.append((blocks, slot.nbytes, stored.call, weakref.ref(stored)))
        self.bytes_waiting += slot.nbytes
        return _DiskTicket(slot)

    def _let_go(self) -> None:
        """Of memory that has been written, and of room that nobody needs."""
        self.tidy()
        while self.waiting:
            blocks, nbytes, call, reference = self.waiting[0]
            done = call.closed and all(block.done() for block in blocks)
            if not done and self.bytes_waiting <= self._UNDER_WAY:
                return
            self.waiting.popleft()
            self.bytes_waiting -= nbytes
            for block in blocks:
                block.result()
            stored = reference()
            if stored is not None:
                call.forget(stored)
                stored.memory = None

    def fetch(self, ticket: _DiskTicket) -> None:
        """Begin to bring it back."""
        if ticket.reading is None:
            ticket.reading = self.disk.read(ticket.slot, aligned(ticket.slot.nbytes))

    def forget(self, ticket: _DiskTicket) -> None:
        """Its room may be used again."""
        self.disk.release(ticket.slot)

    def receive(self, ticket: _DiskTicket) -> Tensor:
        """Return it."""
        self.tidy()
        self.fetch(ticket)
        assert ticket.reading is not None
        return ticket.reading.wait()


class _GpuTicket:
    """A pinned copy; `gone` is when it is whole, `coming` the copy on the device that it is being brought back to."""

    def __init__(self, host: Tensor | None, nbytes: int, gone: Any) -> None:
        self.host, self.nbytes, self.gone = host, nbytes, gone
        self.slot: Slot | None = None
        self.writing: Sequence[Any] = ()
        self.reading: Transfer | None = None
        self.coming: tuple[Tensor, Any] | None = None


class _Gpu(_Home):
    """Pinned buffers, and behind them a file if there is a directory. Copies run on one stream, in the order asked for. At most
    `_BUFFERS` wait to be written.
    """

    _BUFFERS = 64

    def __init__(self, device: torch.device, directory: str | None) -> None:
        super().__init__()
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.disk = Disk(directory) if directory is not None else None
        self.spare: dict[int, list[Tensor]] = {}
        self.waiting: deque[tuple[_GpuTicket, _Call, weakref.ref[_Stored]]] = deque()
        self.writing: deque[_GpuTicket] = deque()

    def _pinned(self, nbytes: int) -> Tensor:
        spare = self.spare.get(nbytes)
        return spare.pop() if spare else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def _settle(self, call: _Call) -> None:
        """Let go of what earlier calls have sent: the device goes on only when it has left. And of buffers that are on disk."""
        self.tidy()
        while self.waiting and self.waiting[0][1] is not call:
            ticket, _, reference = self.waiting.popleft()
            torch.cuda.current_stream(self.device).wait_event(ticket.gone)
            stored = reference()
            if stored is not None:
                stored.memory = None
        while self.writing and (all(block.done() for block in self.writing[0].writing) or len(self.writing) > self._BUFFERS):
            ticket = self.writing.popleft()
            for block in ticket.writing:
                block.result()
            self._give_back(ticket)

    def _give_back(self, ticket: _GpuTicket) -> None:
        if ticket.host is not None:
            if self.disk is not None and ticket.coming is not None:
                ticket.coming[1].synchronize()  # a thread of the disk may be the next to write into it
            self.spare.setdefault(ticket.nbytes, []).append(ticket.host)
            ticket.host = None

    def send(self, stored: _Stored) -> _GpuTicket:
        """Begin to take a storage out; return what it is found by."""
        self._settle(stored.call)
        assert stored.memory is not None
        host = self._pinned(stored.memory.nbytes)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(stored.memory, non_blocking=True)
            gone = self.stream.record_event()
        self.written += host.nbytes
        ticket = _GpuTicket(host, host.nbytes, gone)
        if self.disk is not None:
            ticket.slot = self.disk.slot(host.nbytes)
            ticket.writing = self.disk.write(ticket.slot, host, after=gone.synchronize).blocks
            self.writing.append(ticket)
        self.waiting.append((ticket, stored.call, weakref.ref(stored)))
        return ticket

    def fetch(self, ticket: _GpuTicket) -> None:
        """Begin to bring it back."""
        if ticket.coming is not None or ticket.reading is not None:
            return
        if ticket.slot is not None and ticket.host is None:
            assert self.disk is not None
            ticket.host = self._pinned(ticket.nbytes)
            ticket.reading = self.disk.read(ticket.slot, ticket.host)
            return
        self._bring(ticket)

    def _bring(self, ticket: _GpuTicket) -> None:
        assert ticket.host is not None
        memory = torch.empty(ticket.nbytes, dtype=torch.uint8, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            memory.copy_(ticket.host, non_blocking=True)
            ticket.coming = (memory, self.stream.record_event())

    def receive(self, ticket: _GpuTicket) -> Tensor:
        """Return it."""
        self.tidy()
        self.fetch(ticket)
        if ticket.reading is not None and ticket.coming is None:
            ticket.reading.wait()
            self._bring(ticket)
        assert ticket.coming is not None
        memory, there = ticket.coming
        torch.cuda.current_stream(self.device).wait_event(there)
        return memory

    def forget(self, ticket: _GpuTicket) -> None:
        """Its room may be used again."""
        if ticket.coming is not None:  # perhaps nobody took it: its memory must not be used again before the copy into it is over
            torch.cuda.current_stream(self.device).wait_event(ticket.coming[1])
        if ticket.slot is not None:
            assert self.disk is not None
            if ticket.host is not None:
                for block in (*ticket.writing, *(ticket.reading.blocks if ticket.reading is not None else ())):
                    block.result()
            self.disk.release(ticket.slot)
        self._give_back(ticket)  # later copies into it run on the same stream, after those out of it
