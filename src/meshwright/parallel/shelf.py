"""Numbered items of bytes that lie in memory, in the host's memory or on disk, and are used one at a time.

`take` gives an item's bytes as a tensor, `give` puts them back. An item on disk passes through one of a few reused buffers: while
one is worked on, the next is read and the last is written. What is next is what followed the last time, so the first round is read
on demand, and a round that takes another order wastes one read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright import _torch
from meshwright.errors import PlanError
from meshwright.parallel.disk import Disk, Slot, Transfer, aligned, rounded
from meshwright.plan import Plan
from meshwright.plan.memory import BUFFERS
from meshwright.plan.plan import Offload, offloads


@dataclass(frozen=True)
class Place:
    """Where an item lies: on the `device` that it is used on, in host memory, or under `directory`."""

    device: torch.device
    directory: str | None = None

    def __str__(self) -> str:
        """Return the plan's word for it."""
        return self.directory or self.device.type


def active(plan: Plan, device: torch.device) -> tuple[Offload, ...]:
    """Return what of a plan's offload moves anything from this device: on a CPU, not what is said to lie in host memory."""
    return tuple(item for item in offloads(plan.offload) if item.directory is not None or device.type != "cpu")


def stores(plan: Plan, device: torch.device) -> bool:
    """Return whether a plan keeps optimizer states or masters otherwise than torch does, or updates them a part at a time."""
    chosen = (plan.optimizer_state, plan.master, plan.update) != ("fp32", "fp32", "step")
    return chosen or any(item.what in ("optimizer", "params") for item in active(plan, device))


def places(offload: Sequence[Offload], what: str, device: torch.device, sizes: Sequence[int]) -> list[Place]:
    """Return each item's place: those for the disk come last, those for the host before them, the first stay on the device.

    `sizes` weigh the fractions of the plan. An item goes where its middle falls. On a CPU, host memory is the device.
    """
    shares = [(item.fraction, Place(torch.device("cpu"), item.directory)) for item in offload if item.what == what]
    shares.sort(key=lambda share: share[1].directory is not None)
    bounds, used = [], 1.0 - sum(fraction for fraction, _ in shares)
    for fraction, place in shares:
        bounds.append((used, place))
        used += fraction
    total, before, found = max(1, sum(sizes)), 0, []
    for size in sizes:
        middle, before = (before + size / 2) / total, before + size
        place = Place(device)
        for start, candidate in bounds:
            place = candidate if middle > start + 1e-9 else place
        found.append(place)
    return found


@dataclass(eq=False)
class _Item:
    nbytes: int
    place: Place
    kept: Tensor | None = None
    slot: Slot | None = None


@dataclass(eq=False)
class _Buffer:
    memory: Tensor
    number: int = -1
    transfer: Transfer | None = None
    at_work: bool = False
    used: int = 0


class Order:
    """What follows what: the last two of a sequence tell the next, for a forward and a backward go opposite ways."""

    def __init__(self) -> None:
        self._follows: dict[tuple[int, int], int] = {}
        self._latest = (-1, -1)

    def next(self, number: int) -> int | None:
        """Take note of a number; return what came after it the last time."""
        self._follows[self._latest] = number
        self._latest = (self._latest[1], number)
        return self._follows.get(self._latest)


class Shelf:
    """The items. `moved` are the bytes that disks have read and written so far."""

    def __init__(self, sizes: Sequence[int], where: Sequence[Place], travels: bool = False) -> None:
        """Claim room for items of `sizes` bytes; `travels` says that they go to a GPU as they lie, from page-locked memory then:
        from any other the host copies them itself, and asks the device for nothing else meanwhile.

        Raises `PlanError` for a directory that won't do (see `disk.py`), or where the host can't lock so much.
        """
        # Whole blocks go to the disk from where they are; any other length would be copied first.
        self._items = [
            _Item(size if place.directory is None else rounded(size), place) for size, place in zip(sizes, where, strict=True)
        ]
        self._locked: list[Tensor] = []
        self._disks: dict[str, Disk] = {}
        on_disk: dict[str, int] = {}
        for item in self._items:
            if item.place.directory is not None:
                on_disk[item.place.directory] = on_disk.get(item.place.directory, 0) + item.nbytes
        for directory, needed in on_disk.items():
            self._disks[directory] = Disk(directory, needed)
        largest = 0
        for item in self._items:
            if item.place.directory is None:
                if travels and item.place.device.type == "cpu":
                    item.kept = self._lock(aligned(item.nbytes).zero_())
                else:
                    item.kept = torch.zeros(item.nbytes, dtype=torch.uint8, device=item.place.device)
            else:
                item.slot = self._disks[item.place.directory].slot(item.nbytes)
                largest = max(largest, item.nbytes)
        self._largest, self._travels = largest, travels
        self._buffers: list[_Buffer] = []
        self._order = Order()
        self._uses = 0

    def _lock(self, memory: Tensor) -> Tensor:
        """Lock pages as they are (torch's own come in powers of two); they hold nothing else, for CUDA takes no page twice."""
        if not memory.nbytes:
            return memory
        if not _torch.lock_pages(memory):
            raise PlanError(
                f"offload=params: the host can't lock {memory.nbytes / 1e9:.2f} GB more for copies to the GPU: offload a smaller "
                "fraction to cpu, or to nvme=DIR"
            )
        self._locked.append(memory)
        return memory

    def __del__(self) -> None:
        for memory in getattr(self, "_locked", ()):
            _torch.unlock_pages(memory)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes read from disk and written to it."""
        disks = self._disks.values()
        return sum(disk.read_back for disk in disks), sum(disk.written for disk in disks)

    def place(self, number: int) -> Place:
        """Return where an item lies."""
        return self._items[number].place

    def take(self, number: int, fresh: bool = False, learn: bool = True) -> Tensor:
        """Return an item's bytes (perhaps with more behind them), the caller's until `give`. `fresh` leaves out the reading."""
        item = self._items[number]
        if item.kept is not None:
            return item.kept
        buffer = self._find(number) or self._begin(number, fresh)
        buffer.at_work = True
        if buffer.transfer is not None:
            buffer.transfer.wait()
            buffer.transfer = None
        if learn:
            following = self._order.next(number)
            if following is not None and self._find(following) is None and self._free() is not None:
                self._begin(following, fresh=False)
        return buffer.memory[: item.nbytes]

    def give(self, number: int, changed: bool = True) -> None:
        """Take an item back; `changed` says that its bytes are to be kept."""
        item = self._items[number]
        if item.kept is not None:
            return
        buffer = self._find(number)
        assert buffer is not None
        buffer.at_work = False
        if changed:
            buffer.transfer = self._disk(item).write(_slot(item), buffer.memory[: item.nbytes])

    def settle(self) -> None:
        """Wait for every transfer under way. Raises `TrainingError` where one failed."""
        for buffer in self._buffers:
            if buffer.transfer is not None and not buffer.at_work:
                buffer.transfer.wait()
                buffer.transfer = None

    def close(self) -> None:
        """Give the disks' room back."""
        for disk in self._disks.values():
            disk.close()

    def _disk(self, item: _Item) -> Disk:
        assert item.place.directory is not None
        return self._disks[item.place.directory]

    def _find(self, number: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.number == number), None)

    def _free(self) -> _Buffer | None:
        """A buffer that nobody works on and nothing is read into: one whose transfer is over, or the first that will be."""
        if len(self._buffers) < BUFFERS:
            memory = aligned(self._largest)
            self._buffers.append(_Buffer(self._lock(memory) if self._travels else memory))
            return self._buffers[-1]
        idle = sorted((buffer for buffer in self._buffers if not buffer.at_work), key=lambda buffer: buffer.used)
        done = [buffer for buffer in idle if buffer.transfer is None or buffer.transfer.done]
        return next(iter(done or idle), None)

    def _begin(self, number: int, fresh: bool) -> _Buffer:
        buffer = self._free()
        if buffer is None:
            raise PlanError(f"more than {BUFFERS} items of a shelf are in use at once")
        if buffer.transfer is not None:
            buffer.transfer.wait()
        item = self._items[number]
        self._uses += 1
        buffer.number, buffer.transfer, buffer.used = number, None, self._uses
        if not fresh:
            buffer.transfer = self._disk(item).read(_slot(item), buffer.memory[: item.nbytes])
        return buffer


def _slot(item: _Item) -> Slot:
    assert item.slot is not None
    return item.slot
