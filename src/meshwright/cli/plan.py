"""`meshwright plan`: search for the best plans and explain them. `meshwright predict` (its module is beside) prices one plan."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from meshwright.errors import ConfigError

if TYPE_CHECKING:
    from meshwright.blueprint.record import Blueprint
    from meshwright.cluster import Cluster

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command's arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser("plan", help="search for the best plan on a cluster, and explain it")
    add_subject(parser)
    parser.add_argument("--objective", choices=("fastest", "cheapest", "smallest", "longest"), default="fastest")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="candidates to show (default 5)")
    parser.add_argument("--fix", action="append", default=[], metavar="FIELD=VALUE", help="hold a field of the plan, such as tp=4")
    parser.add_argument("--compile", action="store_true", help="count the kernels that torch.compile makes")
    parser.add_argument("--brief", action="store_true", help="leave out alternatives and what a change would buy")
    parser.set_defaults(run=run)
    return parser


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The arguments that `plan` and `predict` share: the model, the cluster, the batch."""
    parser.add_argument("--model", required=True, metavar="M", help="preset, gpt:..., llama:..., config.json")
    parser.add_argument(
        "--cluster", required=True, metavar="C", help="here, [NODESx]GPUSxNAME[,intra=GB/s][,inter=GB/s], or a TOML file"
    )
    parser.add_argument(
        "--global-batch", required=True, type=int, metavar="B", help="items (sequences) of one step, all ranks together"
    )
    parser.add_argument("--seq", type=int, metavar="S", help="sequence length (default: the model's)")
    parser.add_argument("--precision", choices=PRECISIONS, default=None, help="default bf16; fp32 on CPU")


def subject(arguments: argparse.Namespace, precision: str | None) -> tuple[Blueprint, Cluster, str]:
    """Capture the model for the cluster's devices; the blueprint, the cluster and the precision."""
    from meshwright.cluster import Cluster

    cluster = Cluster.parse(arguments.cluster)
    if arguments.global_batch < 1:
        raise ConfigError(f"--global-batch {arguments.global_batch} must be at least 1")
    cpu = cluster.device.kernels == "cpu"
    precision = precision or ("fp32" if cpu else "bf16")
    import torch

    from meshwright.blueprint.inspection import inspect
    from meshwright.plan.time import COMPUTE

    dtype = getattr(torch, COMPUTE[precision])
    return inspect(arguments.model, seq=arguments.seq, dtype=dtype, device="cpu" if cpu else "cuda"), cluster, precision


def run(arguments: argparse.Namespace) -> int:
    """Search and print; returns 0."""
    fixed = _fixed(arguments.fix)
    blueprint, cluster, precision = subject(arguments, arguments.precision)
    from meshwright.plan import explain
    from meshwright.plan.search import search

    found = search(
        blueprint,
        cluster,
        arguments.global_batch,
        precision,
        objective=arguments.objective,
        top=arguments.top,
        compiled=arguments.compile,
        fixed=fixed,
    )
    more = not arguments.brief and arguments.objective == "fastest"
    if arguments.json:
        print(json.dumps(found.to_json()))
    else:
        print(found)
        if more:
            print(explain.paragraphs("well-known alternatives:", explain.alternatives(blueprint, found, precision)))
            print(explain.paragraphs("one change would buy:", explain.what_if(blueprint, found, precision)))
    return 0


def _fixed(items: list[str]) -> dict[str, Any]:
    """Fields of a plan from `tp=4` and the like, checked by the plan itself."""
    from meshwright.plan import Plan

    given: dict[str, Any] = {}
    for item in items:
        name, equals, _ = item.partition("=")
        if not equals:
            raise ConfigError(f"--fix {item!r} is not FIELD=VALUE")
        value = getattr(Plan.parse(item), name)
        if given.setdefault(name, value) != value:
            raise ConfigError(f"--fix {item} contradicts --fix {name}={given[name]}: a field is held at one value")
    return given
