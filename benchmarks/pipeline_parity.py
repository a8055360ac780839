"""Pipelines against one device, every schedule on every model: how far the numbers are off (float64).

    python benchmarks/pipeline_parity.py [--section schedules|axes|families ...] [--only TEXT] [--add] [--json PATH]

`schedules`: each model of the tests' zoo that has enough blocks, in all schedules, on 2 and 4 pipeline ranks. `axes`: pipelines
with data, tensor and context parallelism. `families`: Hugging Face architectures. Each figure is the largest relative error of
losses, gradient norms, gradients and (but for families) weights after 3 steps; the bound of the tests is 1e-9.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import record, write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "blueprint"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import families
import parity
import ranks

SCHEDULES = ("layerwise", "gpipe", "1f1b", "interleaved", "looped_bfs", "zero_bubble", "zero_bubble virtual=2", "zbv", "dualpipev")
ROWS = 9
MICROBATCHES = {2: 5, 4: 9}  # no multiple of the ranks
TWO_STAGES = (
    "gpt",
    "gpt-tied",
    "gpt-learned",
    "hf-gpt2",
    "hf-llama",
    "encoder-decoder",
    "resnet",
    "lora",
    "unused",
    "hf-t5",
    "unet",
)
EIGHT_STAGES = (
    *("gpt-8", "gpt-learned-8", "encoder-decoder-8", "unet-8", "resnet-8", "lora-8", "unused-8", "hf-gpt2-8", "hf-llama-8"),
    "hf-t5-8",
)
COMPOSED = ("gpt-8", "encoder-decoder-8", "unet-8", "hf-llama-8", "hf-t5-8")
AXES = (
    *(f"{schedule} pp=2 {axes}" for axes in ("dp_shard=2", "tp=2") for schedule in SCHEDULES),
    *(f"{schedule} pp=2 dp_shard=2 tp=2" for schedule in ("gpipe", "interleaved", "zero_bubble")),
    "1f1b pp=2 dp_replicate=2",
    *(f"{schedule} pp=2 dp_shard=2 zero={zero}" for zero in (1, 2, 3) for schedule in ("1f1b", "interleaved", "zbv")),
    "1f1b pp=2 dp_replicate=2 dp_shard=2 zero=3",
    "zero_bubble pp=2 tp=2 sp=on",
    "1f1b pp=2 cp=2",
    "zbv pp=2 cp=2 tp=2",
    "1f1b pp=2 dp_shard=2 tp=2 zero=1",
    "3d pp=2 dp_shard=2 tp=2",
    "3d pp=2 dp_shard=2 tp=2 recompute=full",
    "zbv pp=2 dp_shard=2 tp=2 sp=on zero=2",
    "zero_bubble pp=2 tp=2 recompute=selective",
    "1f1b pp=4 dp_shard=2 zero=3",
)
IN_FAMILIES = ("1f1b pp=2 microbatches=3", "zero_bubble pp=2 microbatches=3", "1f1b pp=4 microbatches=3", "zbv pp=4 microbatches=4")

Row = tuple[str, str, Callable[[], dict[str, Any]]]


def _world(plan: str) -> int:
    sizes = dict(item.split("=") for item in plan.split() if "=" in item)
    size = 1
    for axis in ("dp_replicate", "dp_shard", "tp", "cp", "pp"):
        size *= int(sizes.get(axis, 1))
    return size


def _in_zoo(name: str, plan: str) -> dict[str, Any]:
    found = parity.errors(name, plan, _world(plan), rows=ROWS)
    wrong = found.pop("wrong")
    return {"error": max(max(values.values()) for values in found.values()), "wrong": wrong}


def _in_family(name: str, plan: str) -> dict[str, Any]:
    found = ranks.run(_world(plan), families.parity, name, plan, 4, limit_s=240.0)[0]
    if "refused" in found:
        return found
    error = max(found["loss"], found["norm"], found["gradients"])
    bound = 1e-5 if name in families.SINGLE_PRECISION_INSIDE else 1e-9
    return {"error": error, "wrong": {found["worst"]: error} if error > bound or found["missing"] else {}}


def rows(sections: list[str]) -> Iterator[Row]:
    if "schedules" in sections:
        for pp, names in ((2, (*TWO_STAGES, *EIGHT_STAGES)), (4, EIGHT_STAGES)):
            for name in names:
                for schedule in SCHEDULES:
                    many = any(word in schedule for word in ("interleaved", "looped", "virtual", "zbv", "dual"))
                    if many and name in TWO_STAGES and name not in ("encoder-decoder", "hf-t5", "unet"):
                        continue  # fewer blocks than stages
                    count = 1 if schedule == "layerwise" else MICROBATCHES[pp]
                    text = f"{schedule} pp={pp} microbatches={count}"
                    yield name, text, lambda n=name, p=text: _in_zoo(n, p)
    if "axes" in sections:
        for name in COMPOSED:
            for plan in AXES:
                text = f"{plan} microbatches={1 if 'layerwise' in plan else 5}"
                yield name, text, lambda n=name, p=text: _in_zoo(n, p)
    if "families" in sections:
        for name in families.FAMILIES:
            for plan in IN_FAMILIES:
                yield name, plan, lambda n=name, p=plan: _in_family(n, p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--section", nargs="+", choices=["schedules", "axes", "families"], default=["schedules", "axes", "families"]
    )
    parser.add_argument("--only", default="", help="rows that contain this text")
    parser.add_argument("--add", action="store_true", help="keep the rows of the file at --json, and run those that it lacks")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "pipeline_parity.json")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no row after this many seconds")
    arguments = parser.parse_args()
    start = time.perf_counter()
    warnings.simplefilter("ignore")
    found: list[dict[str, Any]] = (
        json.loads(arguments.json.read_text())["rows"] if arguments.add and arguments.json.exists() else []
    )
    known = {(row["model"], row["plan"]) for row in found}
    for name, plan, measure in rows(arguments.section):
        if arguments.only not in f"{name} {plan}" or (name, plan) in known:
            continue
        began = time.perf_counter()
        try:
            result = measure()
        except AssertionError as error:
            result = {"failed": str(error).strip()[-1500:]}
        verdict = "refused: " + result["refused"] if "refused" in result else "FAILED" if "failed" in result else ""
        verdict = verdict or f"{result['error']:.0e}" + (f" WRONG {list(result['wrong'].items())[:3]}" if result["wrong"] else "")
        print(f"{name:20} {plan:55} {verdict}  ({time.perf_counter() - began:.1f} s)", flush=True)
        if "failed" in result:
            print(result["failed"][-1200:], flush=True)
        found.append({"model": name, "plan": plan} | result)
        if time.perf_counter() - start > arguments.limit:
            break
    write_json(arguments.json, record("cpu") | {"rows": found})
    good = sum("error" in row and not row["wrong"] for row in found)
    print(f"{good} of {len(found)} agree, {sum('refused' in row for row in found)} are refused")


if __name__ == "__main__":
    main()
