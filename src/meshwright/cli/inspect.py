"""`meshwright inspect`: a model's blueprint as a tree, as JSON, in a file, or against one saved before; or a plan's schedule."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from meshwright.cli.layout import show_layout
from meshwright.cli.schedule import show_schedule
from meshwright.errors import ConfigError

if TYPE_CHECKING:
    from meshwright.blueprint.record import Blueprint, Unit

DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command's arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect", help="read a model from its code: blocks, parameters, FLOPs, saved bytes, what can be split"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="M", help="preset, gpt:..., llama:..., config.json, or package.module:callable")
    source.add_argument("--load", metavar="FILE", help="show a blueprint that was saved")
    parser.add_argument(
        "--plan",
        metavar="P",
        help="what a plan does to the model: cuts and collectives; without --model: the pipeline schedule, drawn",
    )
    parser.add_argument("--svg", metavar="FILE", help="with --plan: write the drawing to a file too")
    parser.add_argument("--seq", type=int, metavar="S", help="sequence length (default: the model's)")
    parser.add_argument("--items", type=int, default=1, metavar="B", help="micro-batch to show amounts for (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, help="capture as if parameters and float inputs had this type")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels to count (needs no GPU)")
    parser.add_argument("--structure", action="store_true", help="if it can't be captured, show blocks and parameters")
    parser.add_argument("--save", metavar="FILE", help="write the blueprint to a file")
    parser.add_argument("--compare", metavar="FILE", help="say what differs from a saved blueprint")
    parser.add_argument("--ops", action="store_true", help="with --json: list every op and saved tensor too")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the blueprint, or a plan's schedule; returns 0."""
    if not arguments.model and not arguments.load:
        if not arguments.plan:
            raise ConfigError("one of the arguments --model, --load, --plan is required")
        return show_schedule(arguments.plan, arguments.json, arguments.svg)
    if arguments.items < 1:
        raise ConfigError(f"--items {arguments.items} must be at least 1")
    if arguments.plan and arguments.model:
        return show_layout(arguments.model, arguments.plan, arguments.seq, arguments.items, arguments.json)
    import torch

    from meshwright.blueprint.compare import differences
    from meshwright.blueprint.inspection import inspect
    from meshwright.blueprint.record import Blueprint
    from meshwright.blueprint.show import show

    if arguments.load:
        blueprint = Blueprint.load(arguments.load)
    else:
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
        options = {"dtype": dtype, "device": arguments.device, "strict": not arguments.structure}
        blueprint = inspect(arguments.model, seq=arguments.seq, **options)
    if arguments.save:
        _save(blueprint, arguments.save)
    changed = differences(Blueprint.load(arguments.compare), blueprint, arguments.items) if arguments.compare else None
    if arguments.json:
        print(json.dumps(summary(blueprint, arguments.items, arguments.ops) | ({} if changed is None else {"changes": changed})))
    elif changed is None:
        print(show(blueprint, arguments.items))
    else:
        print("\n".join(changed) or "no difference")
    return 0


def _save(blueprint: Blueprint, path: str) -> None:
    try:
        blueprint.save(path)
    except OSError as error:
        raise ConfigError(f"--save {path} can't be written: {error.strerror}") from error


def summary(blueprint: Blueprint, items: int, ops: bool) -> dict[str, Any]:
    """Named values for programs; amounts that depend on the micro-batch are for `items` items."""
    return {
        "model": blueprint.model,
        "class": blueprint.class_name,
        "dtype": blueprint.dtype,
        "sequence": blueprint.sequence,
        "items": items,
        "captured": blueprint.captured,
        "parameters": blueprint.n_parameters,
        "parameter_bytes": blueprint.parameter_bytes,
        "forward_flops": blueprint.forward_flops(items),
        "backward_flops": blueprint.backward_flops(items),
        "saved_bytes": blueprint.saved_bytes(items),
        "chains": [dataclasses.asdict(chain) for chain in blueprint.chains],
        "calls": [dataclasses.asdict(call) for call in blueprint.calls],
        "boundaries": [_resolved(boundary, items) for boundary in blueprint.boundaries],
        "kinds": [_unit(unit, items, ops) for unit in blueprint.kinds],
        "outside": _unit(blueprint.rest, items, ops),
        "notes": list(blueprint.notes),
    }


def _unit(unit: Unit, items: int, ops: bool) -> dict[str, Any]:
    record = {
        "class": unit.class_name,
        "instances": list(unit.instances),
        "parameters": unit.n_parameters,
        "forward_flops": unit.forward_flops.at(items),
        "backward_flops": unit.backward_flops.at(items),
        "saved_bytes": unit.saved_bytes.at(items),
        "activation_bytes": unit.activation_bytes.at(items),
        "forward_peak_bytes": unit.forward_peak.at(items),
        "backward_peak_bytes": unit.backward_peak.at(items),
        "regions": _resolved(unit.regions, items),
        "whole": dict(unit.whole),
        "experts": _resolved(unit.experts, items),
    }
    details = ("forward", "backward", "saved") if ops else ()
    return record | {name: _resolved(getattr(unit, name), items) for name in details}


def _resolved(value: Any, items: int) -> Any:
    """Plain data with every count taken at `items`."""
    from meshwright.blueprint.record import Count, Peak

    if isinstance(value, Count | Peak):
        return value.at(items)
    if dataclasses.is_dataclass(value):
        return {field.name: _resolved(getattr(value, field.name), items) for field in dataclasses.fields(value)}
    return [_resolved(item, items) for item in value] if isinstance(value, tuple) else value
