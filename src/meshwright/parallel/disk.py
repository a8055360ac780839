"""Tensors in a file: direct reads and writes of large aligned blocks by a pool of threads.

A `Disk` is one file in a directory that the user names. It has no name there once it is open, so nothing of it outlives the
process, however that ends. The file is handed out in `Slot`s: one that is rewritten in place every step (optimizer states), or
one for a moment (an activation), whose room is used again. Space is claimed from the filesystem when a slot is made, so that a
disk that is too small says so before anything is on it. Transfers of one slot happen in the order in which they were asked for;
others overlap.

Where the filesystem knows O_DIRECT nothing passes through the page cache. A tensor lies in its slot as it does in memory, at the
same distance from a page's start, so that whole pages travel without a copy; its first and last page, and what is read to memory
that lies otherwise, pass through a staging buffer of each thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import MeshwrightError, PlanError, TrainingError

ALIGNMENT = 4096
"""Bytes that addresses, offsets and lengths of direct transfers are multiples of (the largest logical block in use)."""
BLOCK = 8 << 20
"""Bytes of one request: large enough for the device's full rate, small enough that a tensor keeps several threads at work."""
_STAGED = 1 << 20
"""Bytes that are copied at a time where direct transfers can't take memory as it lies."""
_NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "orangefs",
    "smb3",
    "smbfs",
}


Call = Callable[[int, list[Any], int], int]
"""`os.preadv` or `os.pwritev`."""


def rounded(nbytes: int) -> int:
    """Bytes that so many take in the file: the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def aligned(nbytes: int, shift: int = 0) -> Tensor:
    """Return memory [nbytes] (uint8, on the CPU) that begins `shift` bytes behind the start of a page."""
    room = torch.empty(rounded(shift + nbytes) + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT + shift
    return room[start : start + nbytes]


def check_directory(directory: str, needed_bytes: int = 0) -> None:
    """Raise `PlanError` for a directory that is missing, not writable, on a network filesystem, or short of `needed_bytes`."""
    path = Path(directory)
    if os.path.isfile(path):  # which, unlike pathlib's, says no to what this user can't reach
        raise PlanError(f"nvme={directory} is a file; name a directory on a local disk")
    if not os.path.isdir(path):
        raise PlanError(
            f"nvme={directory}: there is no such directory that this user can reach; make it, or name one on a local disk"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise PlanError(f"nvme={directory}: the directory is not writable by this user; name one that is")
    kind = _filesystem(path)
    if kind in _NETWORK or (kind.startswith("fuse.") and kind != "fuse.mergerfs"):
        raise PlanError(f"nvme={directory}: the directory is on a network filesystem ({kind}); name one on a local disk")
    free = _free_bytes(directory)
    if needed_bytes > free:
        part = f", or offload at most @{free / needed_bytes:.2f} of it" if free > 0.01 * needed_bytes else ""
        raise PlanError(
            f"nvme={directory}: the plan puts {_size(needed_bytes)} there and {_size(free)} are free; free some, or name a larger "
            f"disk{part}"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 10**8 else f"{nbytes / 1e6:.3g} MB"


def _free_bytes(place: str | int) -> int:
    """What this user may still write to the filesystem of a path or an open file."""
    state = os.statvfs(place)
    return state.f_bavail * state.f_frsize


def _filesystem(path: Path) -> str:
    """The type of the filesystem that a directory is on, as the kernel names it; empty where the kernel has no such list."""
    table = Path("/proc/self/mounts")
    if not table.exists():
        return ""
    here, best, kind = path.resolve(), -1, ""
    for line in table.read_text(errors="surrogateescape").split("\n")[:-1]:
        _, point, found, *_ = line.split(" ")
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point))  # spaces and the like are in octal there
        if len(mounted.parts) >= best and (here == mounted or mounted in here.parents):
            best, kind = len(mounted.parts), found
    return kind


@dataclass(eq=False)
class Slot:
    """A stretch of the file: `room` bytes at `offset`, of which `nbytes` of use, `shift` bytes behind its start.

    `latest` are the blocks of the transfer that a next one has to follow.
    """

    offset: int
    nbytes: int
    room: int
    shift: int = 0
    latest: Sequence[Future[None]] = field(default=(), repr=False)


@dataclass(eq=False)
class Transfer:
    """A read into, or a write from, `tensor` that is under way."""

    tensor: Tensor
    blocks: Sequence[Future[None]]

    def wait(self) -> Tensor:
        """Return the tensor once the transfer is done. Raises `TrainingError` in one sentence if the disk failed."""
        for block in self.blocks:
            block.result()
        return self.tensor

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return all(block.done() for block in self.blocks)


class Disk:
    """A file without a name in `directory`, read and written by `threads` threads. `written` and `read_back` count bytes.

    Close it at the end; the file is gone then, as it is when the process ends in any other way.
    """

    def __init__(self, directory: str, needed_bytes: int = 0, threads: int = 4) -> None:
        """Claim `needed_bytes` for slots to come. Raises `PlanError` for a directory that won't do (`check_directory`)."""
        check_directory(directory, needed_bytes)
        self.directory = directory
        self.written = self.read_back = 0
        self._descriptor = self._open()
        self._claimed = self._end = 0
        self._free: dict[int, list[Slot]] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="meshwright-disk")
        self._staging = threading.local()
        try:
            self._claim(needed_bytes)
        except MeshwrightError:
            self.close()
            check_directory(directory, needed_bytes + ALIGNMENT)
            raise

    def _open(self) -> int:
        try:
            descriptor, name = tempfile.mkstemp(prefix="meshwright-", dir=self.directory)
            try:
                direct = os.open(name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
            except OSError as error:
                if error.errno != errno.EINVAL:  # a filesystem without direct transfers
                    raise
                return descriptor
            finally:
                os.unlink(name)
        except OSError as error:
            raise PlanError(
                f"nvme={self.directory}: no file can be made there ({error.strerror}); name another directory"
            ) from error
        os.close(descriptor)
        return direct

    # Room

    def slot(self, nbytes: int, loose: bool = False) -> Slot:
        """Return room for `nbytes`, its content undefined; `loose` leaves a page for tensors that begin in the middle of one.

        Raises `TrainingError` where the disk is full.
        """
        room = rounded(nbytes) + ALIGNMENT * loose
        reusable = self._free.get(room)
        if reusable:
            before = reusable.pop()
            return Slot(before.offset, nbytes, room, latest=before.latest)
        short = self._end + room - self._claimed
        if short > 0:
            ahead = min(32 * BLOCK, _free_bytes(self._descriptor) // 8) if self._claimed else 0  # others may use the disk too
            self._claim(max(short, ahead))
        slot = Slot(self._end, nbytes, room)
        self._end += room
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot's room back; the next slot of its size gets it, and follows the transfers that are under way."""
        self._free.setdefault(slot.room, []).append(slot)

    def _claim(self, nbytes: int) -> None:
        if nbytes <= 0:
            return
        try:
            os.posix_fallocate(self._descriptor, self._claimed, rounded(nbytes))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a filesystem that claims nothing in advance
                raise self._failure(error) from error
        self._claimed += rounded(nbytes)

    # Transfers

    def write(self, slot: Slot, tensor: Tensor, after: Callable[[], object] | None = None) -> Transfer:
        """Start writing a contiguous CPU tensor of the slot's size, once `after` has returned; until the transfer is done it must
        not change.
        """
        self.written += tensor.nbytes
        shift = tensor.data_ptr() % ALIGNMENT
        slot.shift = shift if rounded(shift + slot.nbytes) <= slot.room else 0
        return self._start(slot, tensor, os.pwritev, after)

    def read(self, slot: Slot, tensor: Tensor) -> Transfer:
        """Start reading a slot into a contiguous CPU tensor of its size."""
        self.read_back += tensor.nbytes
        return self._start(slot, tensor, os.preadv)

    def put(self, tensor: Tensor) -> Slot:
        """Start writing a tensor to room of its own."""
        slot = self.slot(tensor.nbytes, loose=True)
        self.write(slot, tensor)
        return slot

    def _start(self, slot: Slot, tensor: Tensor, call: Call, after: Callable[[], object] | None = None) -> Transfer:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes != slot.nbytes:
            raise ValueError(f"a slot of {slot.nbytes} bytes takes a contiguous CPU tensor of as many, not {tensor.nbytes}")
        before, first, last = slot.latest, slot.shift, slot.shift + slot.nbytes

        def block(start: int) -> None:
            """Move one block, after those that were asked for before."""
            for earlier in before:  # asked for earlier, so the pool has begun it: no thread waits for one that can't start
                earlier.result()
            if after is not None:
                after()
            try:
                self._move(call, slot.offset, tensor.data_ptr() - first, max(first, start), min(last, start + BLOCK))
            except OSError as error:
                raise self._failure(error) from error

        slot.latest = [self._pool.submit(block, start) for start in range(0, last, BLOCK)]
        return Transfer(tensor, slot.latest)

    def _move(self, call: Call, offset: int, address: int, start: int, stop: int) -> None:
        """Write or read the bytes from `start` to `stop` of what lies at `offset` in the file and at `address` in memory."""
        for low, high, direct in _pieces(start, stop, address % ALIGNMENT == 0):
            if direct:
                self._whole(call, offset + low, address + low, high - low)
                continue
            page = low // ALIGNMENT * ALIGNMENT
            staging = self._buffer(rounded(high - page))
            if call is os.pwritev:
                ctypes.memmove(staging + low - page, address + low, high - low)
            self._whole(call, offset + page, staging, rounded(high - page))
            if call is os.preadv:
                ctypes.memmove(address + low, staging + low - page, high - low)

    def _whole(self, call: Call, offset: int, address: int, nbytes: int) -> None:
        """Go on until all is moved: one call may do less."""
        while nbytes:
            count = call(self._descriptor, [_memory(address, nbytes)], offset)
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            offset, address, nbytes = offset + count, address + count, nbytes - count

    def _buffer(self, nbytes: int) -> int:
        """The address of this thread's staging memory, of `nbytes` at least."""
        if not hasattr(self._staging, "memory") or self._staging.memory.nbytes < nbytes:
            self._staging.memory = aligned(nbytes)
        return int(self._staging.memory.data_ptr())

    def _failure(self, error: OSError) -> TrainingError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return TrainingError(
                f"the disk under {self.directory} is full: the run stops and its last checkpoint is intact; free some and resume"
            )
        return TrainingError(
            f"the disk under {self.directory} failed ({error.strerror}): resume from the last checkpoint elsewhere"
        )

    def close(self) -> None:
        """Wait for what is under way and give the file's space back."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        # Nothing is under way, for that would hold on to this. What collects it may be one of its own threads: no waiting for them.
        if hasattr(self, "_pool"):
            self._pool.shutdown(wait=False)
            if self._descriptor >= 0:
                os.close(self._descriptor)


def _pieces(start: int, stop: int, direct: bool) -> Iterator[tuple[int, int, bool]]:
    """Cut a stretch of bytes into (start, stop, whether it moves as it lies): whole pages do, if addresses allow it."""
    if not direct:
        bounds = [start, *range(start // ALIGNMENT * ALIGNMENT + _STAGED, stop, _STAGED), stop]
        yield from ((low, high, False) for low, high in pairwise(bounds))
        return
    inner = min(stop, rounded(start))
    outer = max(inner, stop // ALIGNMENT * ALIGNMENT)
    yield from ((low, high, place == 1) for place, (low, high) in enumerate(pairwise((start, inner, outer, stop))) if low < high)


def _memory(address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * nbytes).from_address(address)
