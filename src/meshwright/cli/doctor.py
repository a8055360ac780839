"""`meshwright doctor`: what is here, what is missing, and with `--probe` the measured rates of this machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
from typing import Any

from meshwright.errors import ConfigError

_OPTIONAL = {"transformers": "Hugging Face config.json models", "tensorboard": "log.tensorboard", "wandb": "log.wandb"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command's arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser("doctor", help="what is here, what is missing, measured rates")
    parser.add_argument("--probe", action="store_true", help="measure this machine and keep the result for the planner")
    parser.add_argument("--ranks", metavar="N,N", default="2,4", help="numbers of ranks whose collectives to measure (default 2,4)")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Report, after measuring if asked to; returns 0."""
    from meshwright.cluster import probe

    sizes = _sizes(arguments.ranks)
    if arguments.probe:
        measured = probe.measure() | _collectives(sizes)
        probe.save(measured)
    found = report()
    if arguments.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def report() -> dict[str, Any]:
    """Named values: versions, devices, what is missing, the probe's result and the history of prediction errors."""
    import torch

    from meshwright.cluster import Cluster, history, probe

    runs = history.recall()
    cluster: Cluster | None = None
    try:
        cluster = Cluster.here()
        described = str(cluster)
    except ConfigError as error:
        described = f"none: {error}"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cluster": cluster.to_json() if cluster else None,
        "cluster_text": described,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cores": os.cpu_count(),
        "backends": [name for name in ("gloo", "nccl", "mpi") if _has_backend(name)],
        "missing": {name: what for name, what in _OPTIONAL.items() if importlib.util.find_spec(name) is None},
        "probe": probe.load(),
        "probe_file": str(probe.cache_file()),
        "runs": len(runs),
        "error_seconds": history.errors(runs, "seconds"),
        "error_bytes": history.errors(runs, "bytes"),
        "history": runs[-10:],
    }


def _has_backend(name: str) -> bool:
    import torch.distributed as dist

    return bool(getattr(dist, f"is_{name}_available", lambda: False)())


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ranks {text!r} is not a list of numbers such as 2,4") from None
    if any(size < 2 for size in sizes):
        raise ConfigError(f"--ranks {text}: collectives need at least 2 ranks")
    return sizes


def _collectives(sizes: list[int]) -> dict[str, Any]:
    """Measure all-reduce over each number of local ranks; a size that fails is left out."""
    from meshwright.train.launch import start_ranks

    found: dict[str, Any] = {}
    backend = "gloo"
    before = os.environ.get("OMP_NUM_THREADS")
    for size in sizes:
        with tempfile.NamedTemporaryFile("r") as file:
            os.environ["MESHWRIGHT_MEASURED"] = file.name
            code = start_ranks(size, [sys.executable, "-c", "from meshwright.parallel.measure import main; main()"])
            text = file.read()
        if code == 0 and text:
            result = json.loads(text)
            backend = result.pop("backend")
            found[str(size)] = result
    if before is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    return {"collectives": found, "backend": backend}


def _show(found: dict[str, Any]) -> None:
    print(f"python {found['python']}, torch {found['torch']}, backends {', '.join(found['backends'])}, {found['cores']} cores")
    print(f"devices: {', '.join(found['devices']) or 'no GPU: ranks run on CPU'}")
    print(f"as a cluster: {found['cluster_text']}")
    for name, what in found["missing"].items():
        print(f"missing: {name} (only for {what})")
    measured = found["probe"]
    if measured is None:
        print("not measured yet: meshwright doctor --probe")
    else:
        best = max(product["flops_per_s"] for product in measured["products"])
        memory = measured["memory_bytes_per_s"] / 1e9
        print(f"measured: {best / 1e9:,.1f} GFLOP/s, {memory:,.1f} GB/s memory, kept in {found['probe_file']}")
        print(f"  a kernel takes {measured['kernel_s'] * 1e6:.1f} us, disk writes {measured['disk_bytes_per_s'] / 1e6:,.0f} MB/s")
        for size, rate in measured.get("collectives", {}).items():
            for n, kinds in rate["groups"].items():
                lines = [
                    f"{kind} {at['latency_s'] * 1e6:,.0f} us + {at['bytes_per_s'] / 1e9:.2f} GB/s" for kind, at in kinds.items()
                ]
                print(f"  {size} ranks, groups of {n}: {', '.join(lines)}")
    if found["runs"]:
        shown = {what: found[f"error_{what}"] for what in ("seconds", "bytes")}
        text = ", ".join(f"{what} {value:.1%}" for what, value in shown.items() if value is not None)
        print(f"predictions of {found['runs']} runs here, median error: {text or 'nothing measured'}")
        for run in found["history"]:
            if run.get("measured_seconds"):
                guess, took = run["predicted_seconds"], run["measured_seconds"]
                print(f"  predicted {guess:.4g} s, measured {took:.4g} ({guess / took - 1:+.0%}): {run['plan']}")
