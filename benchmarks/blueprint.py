"""Blueprint: speed, memory and exactness, each beside what was asked. Usage: blueprint.py [--quick] [--json FILE].

Prints: seconds and peak memory of a capture in a fresh process (one core); FLOPs against closed forms; FLOPs and saved
bytes of every test model against real runs on CPU; blocks and split weights against what Hugging Face publishes. Times
are of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "blueprint"))

SPEEDS = {
    # name: (python that makes `model, batch`, seconds asked, GiB asked)
    "gpt2, ours": ("spec", "gpt2", 1.0, 1.5),
    "gpt2, Hugging Face": ("hf", "GPT2Config()", 1.0, 1.5),
    "llama3-405b, ours": ("spec", "llama3-405b", 5.0, 1.5),
    "llama3-405b, Hugging Face": (
        "hf",
        "LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,"
        " num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)",
        5.0,
        1.5,
    ),
    "gpt-1t": ("spec", "gpt-1t", 2.0, 1.5),
    "kimi-k2": ("spec", "kimi-k2", 5.0, 1.5),
}

CHILD = """
import json, resource, sys, time
import torch
import meshwright.blueprint.inspection as m
kind, text = sys.argv[1:]
if kind == "hf":
    import transformers
    from meshwright.blueprint.execute import build_on_meta
    config = eval("transformers." + text); config.use_cache = False
    make = lambda: transformers.AutoModelForCausalLM.from_config(config)
    length = getattr(config, "max_position_embeddings", 1024)
    ids = torch.zeros(2, length, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    import transformers.models.auto.modeling_auto
    transformers.AutoModelForCausalLM._model_mapping[type(config)]
def once():
    start = time.perf_counter()
    m.inspect(text) if kind == "spec" else m.inspect(make, batch)
    return time.perf_counter() - start
first = once()
second = once()
print(json.dumps([first, second, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


def speeds() -> list[dict[str, Any]]:
    rows = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for name, (kind, text, seconds, memory) in SPEEDS.items():
        command = [sys.executable, "-c", CHILD, kind, text]
        if Path("/usr/bin/taskset").exists():
            command = ["taskset", "-c", "0", *command]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            rows.append({"model": name, "error": done.stderr.strip().splitlines()[-1]})
            continue
        first, second, used = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(
            {
                "model": name,
                "first_s": first,
                "again_s": second,
                "asked_s": seconds,
                "peak_gib": used,
                "asked_gib": memory,
            }
        )
    print("\nbuild on meta and capture, one core (first: with torch's own lazy imports, about 1.1 s; asked: seconds, GiB)")
    for row in rows:
        if "error" in row:
            print(f"  {row['model']:28} {row['error']}")
            continue
        good = row["again_s"] <= row["asked_s"] and row["peak_gib"] <= row["asked_gib"]
        print(
            f"  {row['model']:28} first {row['first_s']:5.2f} s, again {row['again_s']:5.2f} s "
            f"(asked {row['asked_s']:.0f}), peak {row['peak_gib']:.2f} GiB (asked {row['asked_gib']}) "
            f"{'ok' if good else 'MISSED'}"
        )
    return rows


def closed_forms() -> list[dict[str, Any]]:
    """Forward FLOPs of a decoder: 2 per weight and token of every matrix, and 4 s h per token of attention (whole
    square).
    """
    from meshwright.blueprint.inspection import inspect

    rows = []
    print("\nforward FLOPs against the closed form (asked: within 0.1 %)")
    for name, layers, hidden, kv, ffn, vocab, matrices, sequence in (
        ("gpt3-175b", 96, 12288, 12288, 4 * 12288, 50257, 2, 2048),
        ("llama3-8b", 32, 4096, 1024, 14336, 128256, 3, 8192),
        ("llama3-405b", 126, 16384, 1024, 53248, 128256, 3, 8192),
    ):
        per_token = layers * (2 * (2 * hidden * hidden + 2 * hidden * kv + matrices * hidden * ffn) + 4 * sequence * hidden)
        wanted = sequence * (per_token + 2 * hidden * vocab)
        found = inspect(name).forward_flops(1)
        rows.append({"model": name, "captured": found, "closed_form": wanted, "error": found / wanted - 1})
        print(f"  {name:14} {found:.6g} against {wanted:.6g}: {found / wanted - 1:+.4%}")
    return rows


def real_runs() -> list[dict[str, Any]]:
    import copy

    import torch
    from blueprint_zoo import CASES
    from real_run import whole_model

    from meshwright.blueprint.inspection import inspect

    rows = []
    print("\ncaptured on meta against a real run on CPU (asked: equal)")
    for name, case in CASES.items():
        torch.manual_seed(0)
        model, batch = case()
        run = whole_model(model, batch)
        blueprint = inspect(copy.deepcopy(model).to("meta"), batch)
        ours = (blueprint.forward_flops(4), blueprint.backward_flops(4), blueprint.saved_bytes(4))
        real = (run.forward_flops, run.backward_flops, run.saved_without_state)
        rows.append({"model": name, "captured": ours, "real": real, "equal": ours == real})
        print(
            f"  {name:18} FLOPs {ours[0] + ours[1]:>12,} / {real[0] + real[1]:>12,}   saved bytes {ours[2]:>10,} / {real[2]:>10,}"
        )
    return rows


def agreement(limit: int | None) -> list[dict[str, Any]]:
    import dataclasses

    import torch
    from huggingface import build, compare, planned_architectures
    from real_run import whole_model

    from meshwright.blueprint.inspection import inspect

    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(3, 128, (4, 32)), "attention_mask": torch.ones(4, 32, dtype=torch.int64)}
    rows: list[dict[str, Any]] = []
    print("\nblocks against _no_split_modules, split weights against base_model_tp_plan")
    for architecture in planned_architectures()[:limit]:
        try:
            model, config = build(architecture, batch)
        except Exception as error:
            rows.append({"architecture": architecture, "unbuilt": f"{type(error).__name__}: {error}"[:160]})
            continue
        run = whole_model(model, batch)
        start = time.perf_counter()
        try:
            blueprint = inspect(model.to("meta"), batch)
        except Exception as error:
            rows.append({"architecture": architecture, "uncaptured": str(error)[:300]})
            print(f"  {architecture:28} not captured: {str(error)[:200]}")
            continue
        found = compare(blueprint, model, config)
        row = dataclasses.asdict(found) | {"architecture": architecture, "seconds": time.perf_counter() - start}
        row["flops_equal"] = (run.forward_flops, run.backward_flops) == (
            blueprint.forward_flops(4),
            blueprint.backward_flops(4),
        )
        row["saved_equal"] = run.saved_without_state == blueprint.saved_bytes(4)
        rows.append(row | {"ours": sorted(found.ours), "theirs": sorted(found.theirs)})
        blocks = "blocks =" if found.blocks_equal else f"blocks {sorted(found.ours)} / {sorted(found.theirs)}"
        exact = f"FLOPs {'=' if row['flops_equal'] else 'DIFFER'}, saved {'=' if row['saved_equal'] else 'DIFFER'}"
        print(f"  {architecture:28} {blocks}, weights {found.agree}/{found.total}, {exact}")
        for difference in found.differences:
            print(f"      {difference}")
    captured = [row for row in rows if "agree" in row]
    built = [row for row in rows if "unbuilt" not in row]
    agree, total = sum(row["agree"] for row in captured), sum(row["total"] for row in captured)
    print(f"  {len(rows)} architectures publish a plan; {len(built)} build and run small; {len(captured)} captured;")
    equal = sum(row["blocks_equal"] for row in captured)
    print(f"  blocks equal in {equal}; {agree} of {total} weights split as published")
    exact = sum(row["flops_equal"] for row in captured), sum(row["saved_equal"] for row in captured)
    print(f"  FLOPs equal a real CPU run in {exact[0]}, saved bytes to the byte in {exact[1]}")
    print("  not built: " + ", ".join(row["architecture"] for row in rows if "unbuilt" in row))
    return rows


def structure() -> dict[str, Any]:
    """Blocks by structure alone against `_no_split_modules` for every architecture that builds at its default size on
    meta.
    """
    import warnings

    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from meshwright.blueprint.blocks import block_names
    from meshwright.blueprint.execute import build_on_meta

    warnings.simplefilter("ignore")
    counts = {"equal": 0, "more than published": 0, "other": 0, "not built": 0, "nothing published": 0}
    rows = []
    for architecture, kind in CONFIG_MAPPING.items():
        try:
            config = kind()
            model = build_on_meta(lambda config=config: transformers.AutoModel.from_config(config))
        except Exception:
            counts["not built"] += 1
            continue
        theirs = set(getattr(model, "_no_split_modules", None) or ())
        if not theirs:
            counts["nothing published"] += 1
            continue
        ours = {type(model.get_submodule(name)).__name__ for name in block_names(model)}
        verdict = "equal" if ours and ours <= theirs else "more than published" if ours & theirs else "other"
        counts[verdict] += 1
        present = {type(module).__name__ for module in model.modules()}
        if verdict != "equal":
            row = {
                "architecture": architecture,
                "ours": sorted(ours - theirs),
                "theirs": sorted((theirs & present) - ours),
            }
            rows.append(row | {"verdict": verdict})
    print(f"\nblocks by structure against _no_split_modules, default sizes on meta: {counts}")
    for row in rows:
        if row["verdict"] == "other":
            print(f"  {row['architecture']:28} ours {row['ours']}, theirs {row['theirs']}")
    return {"counts": counts, "differences": rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="only a few architectures")
    parser.add_argument("--json", metavar="FILE", default=str(HERE / "results" / "blueprint.json"))
    arguments = parser.parse_args()
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(result))
    result |= {"speeds": speeds(), "closed_forms": closed_forms(), "real_runs": real_runs()}
    result["agreement"] = agreement(12 if arguments.quick else None)
    if not arguments.quick:
        result["structure"] = structure()
    result["own_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    target = Path(arguments.json)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
