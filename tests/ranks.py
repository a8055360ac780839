"""A pool of long-lived local ranks over gloo, one per world size, started once: a distributed test costs milliseconds.

`run(world_size, function, *arguments)` calls a module-level function on every rank and returns their results in rank order.
A rank that raises makes the call raise here, with its traceback; a call that outlasts its limit is killed and the pool renewed.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as multiprocessing


class RankFailed(AssertionError):
    pass


def _serve(rank: int, world_size: int, store: str, pipe: Connection, path: list[str]) -> None:
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    pipe.send(("ready", None))
    while True:
        try:
            function, arguments, keywords = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send(("done", function(*arguments, **keywords)))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))


class _Pool:
    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, f"{self.folder.name}/store", theirs, sys.path)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.collect(120.0)

    def collect(self, limit_s: float) -> list[Any]:
        import time

        deadline = time.monotonic() + limit_s
        results: list[Any] = [None] * len(self.pipes)
        waiting = set(range(len(self.pipes)))
        failures: dict[int, str] = {}
        while waiting:
            for rank in sorted(waiting):
                if self.pipes[rank].poll(0.002):
                    try:
                        kind, value = self.pipes[rank].recv()
                    except EOFError:
                        kind, value = "failed", "the process died"
                    waiting.discard(rank)
                    results[rank] = value
                    if kind == "failed":
                        failures[rank] = value
                        deadline = min(deadline, time.monotonic() + 3.0)
            if time.monotonic() > deadline:
                self.stop()
                hung = "".join(f"\nrank {rank} did not answer" for rank in sorted(waiting))
                raise RankFailed("".join(f"\nrank {rank}: {text}" for rank, text in failures.items()) + hung)
        if failures:
            self.stop()  # collectives may be half done
            raise RankFailed("".join(f"\nrank {rank}: {text}" for rank, text in failures.items()))
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


_pools: dict[int, _Pool] = {}


def run(world_size: int, function: Callable[..., Any], *arguments: Any, limit_s: float = 120.0, **keywords: Any) -> list[Any]:
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    pool = _pools[world_size]
    for pipe in pool.pipes:
        pipe.send((function, arguments, keywords))
    try:
        return pool.collect(limit_s)
    except RankFailed:
        _pools.pop(world_size, None)
        raise


@atexit.register
def _stop_all() -> None:
    for pool in _pools.values():
        pool.stop()
