"""Which collective call each rank is in, so that ranks with different numbers of batches still meet.

Every rank writes one line into the process group's store: how many steps it has entered, and how many other collective calls
(saving, exporting, evaluating). Writing costs microseconds and waits for nobody. Only a rank that wants another call than a
step reads the others' lines: if somebody is in a step that it has not entered, it joins that step without data; once everybody
wants the other call, all go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

from meshwright import _torch
from meshwright.errors import TrainingError


class Ledger:
    """This rank's line in the store, and a view of the others'."""

    def __init__(self, rank: int, world_size: int, name: str, timeout_s: float) -> None:
        """Open the ledger `name`, which must be the same on every rank; without peers it does nothing."""
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.steps = 0
        self.calls = 0
        self._store = dist.PrefixStore(f"meshwright/{name}", _torch.default_store()) if world_size > 1 else None

    def enter_step(self) -> None:
        """Say that this rank begins its next step."""
        self.steps += 1
        self._write()

    def enter_call(self, join_step: Callable[[], None]) -> None:
        """Wait until every rank has entered this call too, taking part in others' steps by `join_step` until then.

        A rank can leave a call only after all have entered it, so a peer whose count of calls has caught up has agreed, even
        if it is in a later step by now.
        """
        self.calls += 1
        self._write()
        if self._store is None:
            return
        keys = [str(rank) for rank in range(self.world_size)]
        self._store.wait(keys)
        deadline = time.monotonic() + self.timeout_s
        while True:
            lines = [tuple(map(int, line.split())) for line in self._store.multi_get(keys)]
            absent = [(rank, steps) for rank, (steps, calls) in enumerate(lines) if calls < self.calls]
            if not absent:
                return
            if any(steps > self.steps for _, steps in absent):
                join_step()
                deadline = time.monotonic() + self.timeout_s
            elif time.monotonic() > deadline:
                raise TrainingError(
                    f"rank {absent[0][0]} did not reach the call that rank {self.rank} waits in for {self.timeout_s:.0f} s"
                )
            else:
                time.sleep(0.001)

    def _write(self) -> None:
        if self._store is not None:
            self._store.set(str(self.rank), f"{self.steps} {self.calls}")
