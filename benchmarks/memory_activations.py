"""Recompute, loss in chunks and activations on disk: what they save and what they cost, on one CPU rank.

    python benchmarks/memory_activations.py [--section recompute|loss|disk|all] [--rounds N] [--directory DIR] [--json PATH]

`recompute`: a GPT (fp32, AdamW, one thread) under none, selective and full in turn; seconds per step as ratios to none, and the
bytes that live between forward and backward. Targets: full at most 1.35, selective at most 1.10 with half of a block's bytes.
`loss`: a small body under a vocabulary of 64k, whole and in 16 chunks: peak bytes of a step and seconds.
`disk`: `parallel/disk.py` against plain sequential direct writes and reads of the same bytes in the same run (target 0.85), and a
step with all activations on disk.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from common import Ratio, interleave, record, table, write_json
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import meshwright as mw
from meshwright.models.decoder import Decoder, gpt
from meshwright.parallel.disk import Disk, aligned

BODY = gpt(layers=4, hidden=512, heads=8, vocab=2048, sequence=256)
WIDE = gpt(layers=2, hidden=256, heads=4, vocab=65536, sequence=256)
ROWS = 4


class Living(TorchDispatchMode):
    """Bytes of storages made inside: alive now, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.known.add(key)
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def engine_of(config: Any, plan: str) -> tuple[Any, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab, (ROWS, config.sequence))
    batch = (tokens, tokens.roll(-1, 1))
    engine = mw.parallelize(
        Decoder(config),
        plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        loss_fn=lambda out, pair: F.cross_entropy(out.flatten(0, 1), pair[1].flatten()),
        example_batch=batch,
    )
    engine.step(batch)
    engine.step(batch)
    return engine, batch


def compare(config: Any, plans: list[str], rounds: int) -> dict[str, Any]:
    """Seconds as ratios to the first plan, bytes saved after the forward, and the most alive in a step."""
    made = {plan: engine_of(config, plan) for plan in plans}
    found: dict[str, Any] = {}
    for plan, (engine, batch) in made.items():
        gc.collect()
        with Living() as living:
            loss = engine._loss_of(batch)
            gc.collect()
            saved = living.alive
            loss.backward()
        engine.zero_grad()
        found[plan] = {"saved_bytes": saved, "peak_bytes": living.most}
    steps = {plan: lambda engine=engine, batch=batch: engine.step(batch) for plan, (engine, batch) in made.items()}
    times = interleave(steps, rounds, 1, "cpu")
    for plan in plans:
        found[plan] |= {"seconds": statistics.median(times[plan].cpu_s)} | Ratio.of(times[plan], times[plans[0]]).to_json()
    return found


def block_bytes(config: Any, mode: str) -> dict[str, int]:
    """Saved bytes of one block, from what the engine has looked at and chosen."""
    engine, _ = engine_of(config, f"recompute={mode}")
    facts = list(engine._applied.recompute._facts.values())[1]
    return {"none": facts.costs.saved, mode: facts.choice.bytes}


def disk(directory: str, nbytes: int) -> dict[str, Any]:
    """Bytes per second of sequential direct writes and reads by hand, and of a Disk, in turn."""
    rates: dict[str, list[float]] = {"by hand": [], "Disk": []}
    for turn in range(8):
        for name in list(rates)[:: 1 if turn % 2 == 0 else -1]:
            rates[name].append(2 * nbytes / (_by_hand if name == "by hand" else _with_disk)(directory, nbytes))
    ratios = [ours / plain for ours, plain in zip(rates["Disk"], rates["by hand"], strict=True)]
    return {"bytes": nbytes, "bytes_per_second": rates, "ratios": ratios, "median": statistics.median(ratios)}


def _by_hand(directory: str, nbytes: int) -> float:
    size = 16 << 20
    memory = aligned(size)
    memory.fill_(1)
    view = (ctypes.c_char * size).from_address(memory.data_ptr())
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        descriptor = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, nbytes)
        begin = time.perf_counter()
        for place in range(0, nbytes, size):
            os.pwritev(descriptor, [view], place)
        for place in range(0, nbytes, size):
            os.preadv(descriptor, [view], place)
        seconds = time.perf_counter() - begin
        os.close(descriptor)
    return seconds


def _with_disk(directory: str, nbytes: int) -> float:
    size = 64 << 20
    there = Disk(directory, nbytes)
    buffers = [aligned(size).fill_(1) for _ in range(2)]
    slots = [there.slot(size) for _ in range(nbytes // size)]
    begin = time.perf_counter()
    for move in (there.write, there.read):
        under_way: list[Any] = []
        for number, slot in enumerate(slots):
            if number > 1:
                under_way[number - 2].wait()
            under_way.append(move(slot, buffers[number % 2]))
        for transfer in under_way:
            transfer.wait()
    seconds = time.perf_counter() - begin
    there.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", default="all", choices=["recompute", "loss", "disk", "all"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "memory_activations-cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = record("cpu")
    if arguments.section in ("recompute", "all"):
        results["recompute"] = compare(BODY, ["single", "recompute=selective", "recompute=full"], arguments.rounds)
        results["block"] = block_bytes(BODY, "selective") | block_bytes(BODY, "full")
        show("recompute", results["recompute"])
        print("saved bytes of a block:", results["block"])
    if arguments.section in ("loss", "all"):
        results["loss"] = compare(WIDE, ["single", "loss_chunks=16"], arguments.rounds)
        show("loss", results["loss"])
    if arguments.section in ("disk", "all"):
        results["disk"] = disk(arguments.directory, 1 << 29)
        print(f"disk: {results['disk']['median']:.2f} of plain direct transfers")
        offload = f"offload=activations:nvme={arguments.directory}"
        results["offload"] = compare(BODY, ["single", offload], arguments.rounds)
        show("offload", results["offload"])
    write_json(arguments.json, results)


def show(title: str, found: dict[str, Any]) -> None:
    lines = [
        [
            plan,
            f"{one['cpu_median']:.2f}",
            f"{one['wall_median']:.2f}",
            f"{one['saved_bytes'] / 1e6:.0f}",
            f"{one['peak_bytes'] / 1e6:.0f}",
        ]
        for plan, one in found.items()
    ]
    table(title, ["plan", "CPU seconds", "wall seconds", "saved MB", "peak MB"], lines)


if __name__ == "__main__":
    main()
