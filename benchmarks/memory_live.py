"""Live bytes of each combination of stage, recompute, offload and form of states, against what the planner predicts.

    python benchmarks/memory_live.py --directory /scratch                # a GPT under 216 combinations, two models under fewer
    python benchmarks/memory_live.py --model llama --stages zero3

Every combination trains three steps on local ranks. glibc counts the bytes in use, whichever thread frees them (`mallinfo2`). It is
read after every op of the third step (a dispatch mode sees them all), so temporaries inside one op are left out, as they are in
the prediction. What it counts between steps beyond the tensors there are (graphs, records, torch's objects: 1 to 2 MB) is taken
off. The first plan of a process is run twice: libraries allocate for good when they are first used. (16-bit computing is left out:
on a CPU the planner halves what autocast keeps in float32. The bytes of 16-bit states and masters are held by
tests/parallel/test_memory.py.)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
import torch.distributed as dist
from common import REPOSITORY, record, run_ranks, table, write_json
from planner_local import MODELS, held
from torch.utils._python_dispatch import TorchDispatchMode

import meshwright as mw
from meshwright.errors import MeshwrightError
from meshwright.parallel import parked

STAGES = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2}
RECOMPUTE = ("", "recompute=selective", "recompute=full")
OFFLOAD = ((), ("optimizer",), ("params",), ("activations",), ("optimizer", "activations"), ("optimizer", "params", "activations"))
STATES = ("", "optimizer_state=bf16", "optimizer_state=int8")
ROWS = 8
SHARE = 0.03
_MMAP_THRESHOLD = -3


def plans(stage: str, directory: str, brief: bool) -> Iterator[str]:
    """The combinations that exist: parameters are offloaded from zero=3, or from one rank."""
    for recompute, offload, states in itertools.product(RECOMPUTE, OFFLOAD, STATES):
        units = "params" in offload
        if (units and stage not in ("single", "zero3")) or (brief and (states not in ("", STATES[-1]) or len(offload) == 1)):
            continue
        moved = "offload=" + ",".join(f"{what}:nvme={directory}" for what in offload) if offload else ""
        yield " ".join(item for item in (stage, "zero=3" * (units and stage == "single"), recompute, moved, states) if item)


class _Counts(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


class Peak(TorchDispatchMode):
    """The most bytes in use after any op inside."""

    def __init__(self) -> None:
        super().__init__()
        self.library = ctypes.CDLL(None)
        self.library.mallinfo2.restype = _Counts
        self.library.mallopt(_MMAP_THRESHOLD, 1 << 15)
        self.most = 0

    def now(self) -> int:
        counts = self.library.mallinfo2()
        return int(counts.uordblks + counts.hblkhd)

    def settled(self) -> int:
        """What is in use when nothing runs: gloo's thread, and those of a disk, let go of tensors a moment later."""
        gc.collect()
        counts = [self.now()]
        while len(set(counts[-8:])) > 1 or len(counts) < 8:
            time.sleep(0.02)
            counts.append(self.now())
        return counts[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, self.now())
        return result


def measure(name: str, text: str) -> list[float]:
    """Bytes between steps and at the peak of the third one, the most of all ranks."""
    gc.collect()
    model, ranks = MODELS[name], dist.get_world_size() if dist.is_initialized() else 1
    plan = mw.Plan.parse(text, ranks)
    batch = model.batch(ROWS // (plan.dp_replicate * plan.dp_shard))
    peak = Peak()
    peak.settled()
    tensors = held()
    engine = mw.parallelize(
        model.build(),
        plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        loss_fn=model.loss,
        example_batch=batch,
    )
    for _ in range(2):
        engine.step(batch)
    between, tensors = peak.settled(), held() - tensors
    with peak:
        engine.step(batch)
    found = torch.tensor([tensors, tensors + peak.most - between], dtype=torch.float64)
    if ranks > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def measure_all(name: str, texts: list[str]) -> list[Any]:
    """`measure` each plan, or say why it can't run."""
    torch.set_num_threads(1)
    parked._return_freed_memory = lambda: None  # it would set the threshold to its own value
    found: list[Any] = []
    for text in (texts[0], *texts):
        try:
            found.append(measure(name, text))
        except MeshwrightError as error:
            found.append(str(error))
    return found[1:]


def compare(name: str, stage: str, directory: str, brief: bool) -> list[dict[str, Any]]:
    """Measured and predicted bytes of a model's combinations in one stage."""
    model, texts = MODELS[name], list(plans(stage, directory, brief))
    blueprint = mw.inspect(model.build(), model.batch(2), loss_fn=model.loss, device="cpu")
    cluster = mw.Cluster.here(STAGES[stage])
    rows = []
    for text, found in zip(texts, run_ranks(STAGES[stage], measure_all, name, texts), strict=True):
        row: dict[str, Any] = {"model": name, "stage": stage, "plan": text.replace(directory, "DIR")}
        if isinstance(found, str):
            rows.append(row | {"refused": found})
            continue
        predicted = mw.predict(blueprint, cluster, text, ROWS).memory_bytes
        row |= {"between_bytes": found[0], "peak_bytes": found[1], "predicted_bytes": predicted["peak"], "parts": predicted}
        rows.append(row | {"error": predicted["peak"] / found[1] - 1})
    return rows


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far predictions are off, by model and stage."""
    counted = [row for row in rows if "error" in row]
    lines, found = [], {}
    for key in dict.fromkeys((row["model"], row["stage"]) for row in counted):
        errors = [abs(row["error"]) for row in counted if (row["model"], row["stage"]) == key]
        within = sum(error <= SHARE for error in errors)
        found[" ".join(key)] = {"n": len(errors), "within": within, "median": statistics.median(errors), "worst": max(errors)}
        lines.append([*key, str(len(errors)), str(within), f"{statistics.median(errors):.2%}", f"{max(errors):.1%}"])
    table("predicted peak of live bytes", ["model", "stage", "combinations", "within 3 %", "median error", "worst"], lines)
    for row in sorted(counted, key=lambda row: -abs(row["error"]))[:8]:
        print(f"{row['error']:+.1%} {row['peak_bytes'] / 1e6:8.1f} MB {row['model']} {row['plan']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory")
    parser.add_argument("--model", nargs="*", default=["gpt", "llama", "encoder"], choices=list(MODELS))
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--brief", action="store_true", help="fewer combinations for the first model too")
    parser.add_argument("--report", type=Path, help="print an earlier result")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks" / "results" / "memory_live-cpu.json")
    arguments = parser.parse_args()
    if arguments.report:
        report(json.loads(arguments.report.read_text())["cases"])
        return
    about, rows = record("cpu"), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for index, name in enumerate(arguments.model):
            for stage in arguments.stages:
                rows += compare(name, stage, directory, arguments.brief or index > 0)
                write_json(arguments.json, about | {"summary": report(rows), "cases": rows})


if __name__ == "__main__":
    main()
