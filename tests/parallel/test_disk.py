"""Tensors come back from disk as they went, in any order of transfers, and a disk that won't do says so in a sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError, TrainingError
from meshwright.parallel import disk as disks
from meshwright.parallel.disk import BLOCK, Disk, aligned, check_directory, rounded


@pytest.mark.parametrize("nbytes", [1, 8, 4096, 4097, BLOCK, BLOCK + 1, 3 * BLOCK + 12345])
@pytest.mark.parametrize(
    "make", [lambda n: torch.empty(n, dtype=torch.uint8), aligned, lambda n: torch.empty(n + 1, dtype=torch.uint8)[1:]]
)
def test_what_is_written_is_read(tmp_path: Path, nbytes: int, make) -> None:
    disk = Disk(str(tmp_path))
    before, after = make(nbytes).random_(), make(nbytes).zero_()
    slot = disk.put(before)
    assert disk.read(slot, after).wait() is after
    assert torch.equal(before, after)
    assert disk.written == disk.read_back == nbytes
    disk.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40))
def test_transfers_of_one_slot_keep_their_order(tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, bool]]) -> None:
    disk = Disk(str(tmp_path_factory.getbasetemp()))
    slots = [disk.slot(5000 * (n + 1)) for n in range(5)]
    held = [torch.full((5000 * (n + 1),), n, dtype=torch.uint8) for n in range(5)]
    for slot, tensor in zip(slots, held, strict=True):
        disk.write(slot, tensor)
    expected = list(range(5))
    reads = []
    for step, (place, is_write) in enumerate(moves):
        if is_write:
            expected[place] = step + 100
            disk.write(slots[place], torch.full((slots[place].nbytes,), step + 100, dtype=torch.uint8))
        else:
            reads.append((expected[place], disk.read(slots[place], aligned(slots[place].nbytes))))
    for value, transfer in reads:
        assert (transfer.wait() == value).all()
    disk.close()


def test_nothing_is_left_in_the_directory_and_room_is_used_again(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path))
    assert not list(tmp_path.iterdir())
    slot = disk.slot(10_000)
    disk.write(slot, torch.zeros(10_000, dtype=torch.uint8)).wait()
    disk.release(slot)
    assert disk.slot(10_001).offset == slot.offset
    assert disk.slot(10_001).offset != slot.offset
    disk.close()


def test_a_directory_that_will_not_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="no such directory"):
        Disk(str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    for name, says in (("file", "is a file"), ("x" * 300, "no such directory")):
        with pytest.raises(PlanError, match=says):
            Disk(str(tmp_path / name))
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(PlanError, match=r"B are free; .*offload at most @0\.0[456] of it$"):
        Disk(str(tmp_path), needed_bytes=20 * free)
    with pytest.raises(PlanError, match=r"B are free; .*a larger disk$"):
        Disk(str(tmp_path), needed_bytes=1 << 60)
    monkeypatch.setattr(disks, "_filesystem", lambda _: "nfs4")
    with pytest.raises(PlanError, match="network filesystem"):
        Disk(str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PlanError, match="not writable"):
        Disk(str(tmp_path))


def test_the_filesystem_is_the_one_that_is_mounted_nearest() -> None:
    check_directory("/dev/shm") if Path("/dev/shm").is_dir() else None
    assert disks._filesystem(Path("/proc/self")) == "proc"


def test_a_disk_that_fills_up_stops_the_run_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(str(tmp_path))
    slot = disk.slot(100)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(TrainingError, match="is full"):
        disk.write(slot, torch.zeros(100, dtype=torch.uint8)).wait()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainingError, match="is full"):
        disk.slot(1 << 30)
    disk.close()


def test_short_transfers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(str(tmp_path))
    real_write, real_read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda f, b, o: real_write(f, [memoryview(b[0])[:4096]], o))
    monkeypatch.setattr(os, "preadv", lambda f, b, o: real_read(f, [memoryview(b[0])[:4096]], o))
    before = torch.empty(50_000, dtype=torch.uint8).random_()
    assert torch.equal(disk.read(disk.put(before), aligned(50_000)).wait(), before)
    disk.close()


def test_sizes_are_rounded_up() -> None:
    assert [rounded(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert all(aligned(n).data_ptr() % 4096 == 0 for n in (1, 4096, 5000))


def test_room_is_not_claimed_far_beyond_what_a_small_disk_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 1 MB takes 1 MB, in pieces that are asked for one by one."""
    capacity, claimed = 1 << 20, 0

    def allocate(_: int, offset: int, length: int) -> None:
        nonlocal claimed
        if offset + length > capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        claimed = offset + length

    class State:
        f_frsize = 1

        @property
        def f_bavail(self) -> int:
            return capacity - claimed

    monkeypatch.setattr(disks.os, "posix_fallocate", allocate)
    monkeypatch.setattr(disks.os, "statvfs", lambda _: State())
    disk = Disk(str(tmp_path))
    slots = [disk.slot(64 << 10) for _ in range(16)]
    assert len({slot.offset for slot in slots}) == 16
    with pytest.raises(TrainingError, match="is full"):
        disk.slot(64 << 10)
    disk.close()


@pytest.mark.parametrize("name", ["plain", "with space", "ünï"])
def test_a_network_filesystem_is_known_by_its_place_whatever_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / name
    place.mkdir()
    lines = f"/dev/root / ext4 rw 0 0\nhost:/export {str(place).replace(' ', chr(92) + '040')} nfs4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: lines)
    with pytest.raises(PlanError, match=r"network filesystem \(nfs4\)"):
        check_directory(str(place))
    check_directory(str(tmp_path))
