"""Hugging Face architectures under tensor and context parallelism: what is captured and cut, and how far the numbers are off.

    python benchmarks/families.py [--json PATH]

Each family is built small from its configuration class, in float64, and run on two gloo ranks; errors are relative to the plain
model in the same process. No line is written for any of them (`tests/families.py` builds them; the tests hold the same errors).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from common import record, run_ranks, table, write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "blueprint"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import families

PLANS = ("tp=2", "tp=2 sp=on", "cp=2 cp_attention=allgather", "cp=2 cp_attention=ring")


def _measure() -> dict[str, dict[str, Any]]:
    warnings.simplefilter("ignore")
    return {family: {plan: families.parity(family, plan) for plan in PLANS} for family in families.FAMILIES}


def _error(found: dict[str, Any]) -> str:
    if "refused" in found:
        return "refused: no sequence in its batch" if "no sequence" in found["refused"] else "refused"
    return f"{max(found['loss'], found['norm'], found['gradients']):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "families-cpu.json")
    arguments = parser.parse_args()
    found = run_ranks(2, _measure)
    lines = []
    for family, plans in found.items():
        first = plans["tp=2"]
        cut = f"{first.get('cut', 0)} of {first.get('parameters', 0)}"
        lines.append([family, str(first.get("blocks", "")), str(first.get("regions", "")), cut, *map(_error, plans.values())])
    header = ["architecture", "blocks", "regions", "parameters cut", *PLANS]
    table("largest relative error of loss, gradient norm and every gradient, float64, two ranks", header, lines)
    write_json(arguments.json, record("cpu") | {"families": found})


if __name__ == "__main__":
    main()
