"""`meshwright predict`: one plan's memory and time on a cluster, itemised."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from meshwright.cli.plan import add_subject, subject
from meshwright.plan import Plan


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command's arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser("predict", help="what one plan costs on a cluster: memory and time")
    parser.add_argument("--plan", required=True, metavar="P", help="a plan by name (fsdp, ...) or by fields (dp_shard=4 tp=2 ...)")
    add_subject(parser)
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Predict and print; returns 0."""
    plan = Plan.parse(arguments.plan)
    given = arguments.precision or (plan.precision if "precision" in arguments.plan else None)
    blueprint, cluster, precision = subject(arguments, given)
    import dataclasses

    from meshwright.plan.explain import itemised
    from meshwright.plan.predict import predict

    plan = dataclasses.replace(plan.resolve(cluster.devices), precision=precision)
    began = time.perf_counter()
    found = predict(blueprint, cluster, plan, arguments.global_batch)
    seconds = time.perf_counter() - began
    if arguments.json:
        model = {
            "model": blueprint.model,
            "parameters": blueprint.n_parameters,
            "sequence": blueprint.sequence,
            "precision": precision,
        }
        document = {"model": model, "cluster": cluster.to_json() | {"devices": cluster.devices}, "searched": 1, "rejected": {}}
        print(json.dumps(document | {"seconds": seconds, "candidates": [found.candidate()]}))
    else:
        print(itemised(found))
    return 0
