"""Memory on one CUDA device: what each kind of offload costs a Llama's utilisation, and the largest Llama that trains there.

    python benchmarks/memory_gpu.py --directory /scratch                 # both sections; the JSON grows with every case
    python benchmarks/memory_gpu.py --section offload --models 8B --kinds 1 2 --steps 3   # some cases only
    python benchmarks/memory_gpu.py --section largest --directory /scratch --billions 30
    python benchmarks/memory_gpu.py --device cpu --dry                   # tiny sizes: does it run?

`offload`: model FLOP utilisation (6 FLOPs a parameter and token, plus attention's 12 * layers * hidden * sequence, its mask left
out) of a 1B and an 8B Llama in bfloat16, without offload where it fits and with each kind. A step has `--microbatches` of `--rows`
sequences, since what an update takes is the same for every batch. `largest`: seconds per step of a Llama of the asked size against
the floor that the host's link gives: the bytes that a step must move over PCIe at the rates measured in the same run. Each case
runs in a process of its own with a limit of time, so that one that does not fit, dies or hangs fails alone. Weights are one draw
of a million numbers, repeated: to draw 8 billion takes a core the better part of a minute.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, record, table, write_json

import meshwright as mw
from meshwright.models import decoder
from meshwright.plan import Plan
from meshwright.plan.memory import state_bytes
from meshwright.plan.plan import offloads

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets."""
SIZES = {
    "1B": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 128256, "sequence": 4096},
    "8B": {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256, "sequence": 4096},
    "dry": {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 256, "sequence": 32},
}


def main() -> None:
    """Run one section and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=("offload", "largest"), nargs="*", default=["offload", "largest"])
    parser.add_argument("--directory")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--billions", type=float, nargs="*", default=[13.0, 30.0, 40.0, 60.0])
    parser.add_argument("--models", choices=("1B", "8B"), nargs="*", default=["1B", "8B"], help="of `offload`")
    parser.add_argument("--kinds", type=int, nargs="*", help="of `offload`, by number from 0; all by default")
    parser.add_argument("--rows", type=int, default=2, help="sequences in a micro-batch")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=8.0, help="that a case may take")
    parser.add_argument("--extra", default="recompute=selective loss_chunks=16", help="further items of the plans of `offload`")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name = f"memory-{arguments.device}{'-dry' if arguments.dry else ''}.json"
    place = arguments.json or REPOSITORY / "benchmarks" / "results" / name
    about, found = record(arguments.device), {section: list[dict[str, Any]]() for section in arguments.section}
    with tempfile.TemporaryDirectory() as own:
        directory = arguments.directory or own
        for section, cases in found.items():
            for model, sizes, plan in {"offload": _offload, "largest": _largest}[section](arguments, directory):
                cases.append({"model": model, "plan": plan} | _alone(arguments, sizes, plan))
                write_json(place, about | found)
            _print(f"{section} on {arguments.device}", cases, directory)


def _print(title: str, found: list[dict[str, Any]], directory: str) -> None:
    table(
        title,
        ("model", "plan", "s a step", "utilisation", "peak GiB", "floor s"),
        [
            (
                each["model"],
                each["plan"].replace(directory, "DIR"),
                f"{each['seconds']:.3g}" if "seconds" in each else str(each["failed"])[:60],
                f"{each['utilisation']:.1%}" if each.get("utilisation") else "-",
                f"{each.get('peak_bytes', 0) / 2**30:.1f}",
                f"{each['floor_s']:.3g}" if "floor_s" in each else "-",
            )
            for each in found
        ],
    )


def _offload(arguments: argparse.Namespace, directory: str) -> list[tuple[str, dict[str, int], str]]:
    names = ["dry"] if arguments.dry else arguments.models
    kinds = [(name, plan) for name in names for plan in _kinds(arguments, name, directory)]
    return [(name, SIZES[name], plan) for name, plan in kinds]


def _kinds(arguments: argparse.Namespace, name: str, directory: str) -> list[str]:
    bare = f"precision=bf16 microbatches={arguments.microbatches}"
    base = f"{bare} {arguments.extra}".strip()
    # 12 bytes of states and master a parameter, as much of them as the disk has room for.
    share = min(1.0, int(80 * shutil.disk_usage(directory).free / (12 * _parameters(SIZES[name]))) / 100)
    kinds = [
        base,
        f"{base} offload=optimizer:cpu",
        f"{base} offload=optimizer:cpu update=backward",
        f"{base} offload=optimizer:cpu@0.5",
        f"{base} offload=optimizer:nvme={directory}" + (f"@{share:g}" if share < 1.0 else ""),
        f"{base} offload=params:cpu",
        # What an 8B saves in full is more than a host has beside its states, and takes several times as long to move as to compute.
        f"{bare} recompute=full loss_chunks=16 offload=activations:cpu,optimizer:cpu",
        f"{base} master=kahan optimizer_state=int8",
    ]
    return kinds if arguments.kinds is None else [kinds[number] for number in arguments.kinds]


def _parameters(sizes: dict[str, int]) -> int:
    """The matrices' elements of a Llama."""
    hidden, heads = sizes["hidden"], sizes["heads"]
    attention = 2 * hidden * hidden * (heads + sizes["kv_heads"]) // heads
    return 2 * sizes["vocab"] * hidden + sizes["layers"] * (attention + 3 * hidden * sizes["ffn"])


def _largest(arguments: argparse.Namespace, directory: str) -> list[tuple[str, dict[str, int], str]]:
    """Models of the asked sizes, in the shape of an 8B: bfloat16 weights, their states in 8 bits, offloaded as far as they must."""
    base = "precision=bf16 master=stochastic optimizer_state=int8 update=backward recompute=full loss_chunks=16"
    if arguments.dry:
        return [("dry", SIZES["dry"], f"{base} offload=params:cpu,optimizer:cpu@0.6,optimizer:nvme={directory}@0.4")]
    cases = []
    for billions in arguments.billions:
        hidden = 4096 if billions < 12 else 5120 if billions < 20 else 6656
        block = hidden * hidden * 2.5 + 3 * hidden * 3.5 * hidden
        sizes = SIZES["8B"] | {"hidden": hidden, "heads": hidden // 128, "kv_heads": hidden // 512, "ffn": int(3.5 * hidden)}
        sizes["layers"] = round((billions * 1e9 - 2 * hidden * sizes["vocab"]) / block)
        rooms = _room(arguments.device), 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cases.append((f"{billions:g}B", sizes, f"{base} {filled(_parameters(sizes), *rooms, directory)}".strip()))
    return cases


def _room(device: str) -> float:
    """Bytes of the device for states, beside 30 GB for gathered units, gradients on their way, activations and the allocator."""
    return torch.cuda.get_device_properties(device).total_memory - 30e9


def filled(parameters: int, device: float, host: float, directory: str) -> str:
    """`offload=` for weights of 2 bytes and states of 2.03: what the device has no room for goes to the host, what the host has
    none for to the disk. Weights first: the host has nothing to compute with them. Hundredths, rounded up where bytes leave.
    """
    over, items = (2 + 2 * 1.016) * parameters - device, []
    for what, each in (("params", 2.0), ("optimizer", 2 * 1.016)):
        leaves = math.ceil(100 * min(1.0, max(0.0, over) / (each * parameters))) / 100
        stays = min(leaves, math.floor(100 * max(0.0, host) / (each * parameters)) / 100)
        over, host = over - leaves * each * parameters, host - stays * each * parameters
        items += [f"{what}:cpu@{stays:g}"] * (stays > 0) + [f"{what}:nvme={directory}@{leaves - stays:.2g}"] * (leaves > stays)
    return f"offload={','.join(items)}".replace("@1,", ",").removesuffix("@1") if items else ""


def _alone(arguments: argparse.Namespace, sizes: dict[str, int], plan: str) -> dict[str, Any]:
    """Run one case in its own process; what went wrong comes back as a sentence."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    rows = 2 if arguments.dry else arguments.rows
    process = context.Process(target=_case, args=(theirs, sizes, plan, rows, arguments.steps, arguments.device), daemon=True)
    process.start()
    theirs.close()
    found: dict[str, Any] = {"failed": f"not done after {arguments.minutes:g} minutes"}
    try:
        if ours.poll(arguments.minutes * 60):
            found = ours.recv()
    except EOFError:
        found = {"failed": "the process died (out of host memory?)"}
    process.join(30)
    if process.is_alive():
        process.kill()
        process.join()
    return found


def _case(pipe: Connection, sizes: dict[str, int], plan: str, rows: int, steps: int, device: str) -> None:
    try:
        pipe.send(_measure(sizes, plan, rows, steps, torch.device(device)))
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def _model(config: decoder.DecoderConfig) -> decoder.Decoder:
    """A Llama with cheap weights that are random all the same: how fast a GPU multiplies depends on the bits."""
    model = decoder.Decoder(config)
    drawn = 0.02 * torch.randn(1 << 20)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                times = -(-parameter.numel() // len(drawn))
                parameter.copy_(drawn.expand(times, -1).reshape(-1)[: parameter.numel()].view_as(parameter))
    return model


def _measure(sizes: dict[str, int], plan: str, rows: int, steps: int, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    config = decoder.llama(**sizes)
    rows *= Plan.parse(plan).microbatches
    tokens = torch.randint(0, sizes["vocab"], (rows, sizes["sequence"]))
    batch = (tokens, tokens.roll(-1, 1))
    engine = mw.parallelize(
        lambda: _model(config),
        plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4),
        loss_fn=mw.losses.cross_entropy,
        example_batch=tuple(part[:1] for part in batch),
        device=device,
    )
    seconds = []
    for number in range(steps):
        if cuda:
            torch.cuda.synchronize()
            if number == 1:
                torch.cuda.reset_peak_memory_stats()  # the first step's look at each block is no part of the others
        start = time.perf_counter()
        engine.step(batch)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    parameters = sum(entry.shape.numel() for entry in engine.table)
    per_token = 6 * parameters + 12 * sizes["layers"] * sizes["hidden"] * sizes["sequence"]
    peak = next((rate for name, rate in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), None)
    median = statistics.median(seconds[1:] or seconds)
    found: dict[str, Any] = {
        "parameters": parameters,
        "tokens": tokens.numel(),
        "seconds": median,
        "every_step": seconds,
        "utilisation": per_token * tokens.numel() / median / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "formula": state_bytes(engine.plan, parameters, on_host=not cuda).to_json(),
    }
    return found | _floor(engine.plan, parameters, device)


def _floor(plan: Plan, parameters: int, device: torch.device) -> dict[str, float]:
    """Seconds that a step's bytes take over PCIe alone, both directions at once: what lies on the host of the weights comes down
    twice a micro-batch; what is updated there takes its gradients up, and weights that lie on the device down; what is updated on
    the device takes weights that lie on the host up again.
    """
    if device.type != "cuda":
        return {}
    here = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(here, device=device)
    rates = []
    for target, source in ((there, here), (here, there)):
        target.copy_(source)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(4 * len(here) / (time.perf_counter() - start))
    each = 4.0 if plan.master == "fp32" else 2.0  # zero=3 shards the master, and has gradients of its dtype
    away = {what: sum(item.fraction for item in offloads(plan.offload) if item.what == what) for what in ("params", "optimizer")}
    weights, updated = each * parameters * away["params"], parameters * away["optimizer"]
    down = 2 * weights * plan.microbatches + 2.0 * updated * (1.0 - away["params"])
    up = (each if weights else 4.0) * updated + weights * (1.0 - away["optimizer"])
    return {"floor_s": max(down / rates[0], up / rates[1]), "down_bytes_per_s": rates[0], "up_bytes_per_s": rates[1]}


if __name__ == "__main__":
    main()
