"""`meshwright train`: checks everything that can be known beforehand, prepares the run's folder, and starts the ranks."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.cli.layout import layout
from meshwright.errors import ConfigError, DataError, PlanError
from meshwright.plan import Plan


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser("train", help="train a model on text, under any plan")
    parser.add_argument(
        "inputs", nargs="*", metavar="CONFIG.toml | key=value", help="a configuration file; settings such as data=PATH"
    )
    parser.add_argument("--plan", help="a plan by name (ddp, zero2, fsdp, ...) or by fields (dp_replicate=2 dp_shard=2)")
    parser.add_argument("--ranks", type=int, help="local ranks to start (default: as the plan says, or one per CUDA device, or 2)")
    parser.add_argument("--steps", type=int, help="optimizer steps (train.steps)")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/DATE-TIME)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a key of the configuration")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Train; return the exit code. Raises a `MeshwrightError` for what is wrong before any process is started."""
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks} must be at least 1")
    folder = _folder(arguments)
    config = _configure(arguments, folder)
    plan = Plan.parse(config.plan.text)  # what is wrong in the text is said before torch is loaded
    from meshwright.train import launch, worker

    joined = _announced_ranks()
    ranks = joined or arguments.ranks or plan.degree_product() or _default_ranks()
    check(config, ranks)
    config = _planned(config, ranks)
    if arguments.resume:
        _check_resumed(config, folder)
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        _prepare(config, folder, arguments.resume)
    mode = "resume" if arguments.resume else "fresh"
    rank = int(os.environ.get("RANK", "0"))
    with _stdout_on_stderr() if arguments.json else contextlib.nullcontext():
        if joined or ranks == 1:  # rank 0 joins its peers only now, so they find the folder prepared
            code = launch.run_rank(rank, lambda: worker.work(folder, arguments.resume), folder)
        else:
            code = launch.start_ranks(ranks, [sys.executable, "-c", worker.COMMAND, str(folder), mode])
    if arguments.json and code == 0 and rank == 0:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        print(json.dumps({"folder": str(folder), "steps": len(lines), "last": json.loads(lines[-1])}))
    return code


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Send what this process and the ranks that it starts print to stderr, so that stdout holds nothing but the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _planned(config: Any, ranks: int) -> Any:
    """The configuration with `auto` replaced by the plan chosen for `ranks` ranks of this machine."""
    from meshwright.parallel.auto import is_auto
    from meshwright.train.predicted import chosen

    if not is_auto(config.plan.text):
        return config
    return replace(config, plan=replace(config.plan, text=str(chosen(config, ranks))))


def check(config: Any, ranks: int) -> None:
    """Raise in one sentence for whatever a run of `config` on `ranks` ranks would stumble over."""
    from meshwright.blueprint.execute import build_on_meta
    from meshwright.blueprint.spec import parse_spec
    from meshwright.engine.backward import check_clip
    from meshwright.parallel.apply import refuse_unavailable
    from meshwright.plan.recompute import budget_bytes, check_budget
    from meshwright.train.data import VOCABULARY, find_files
    from meshwright.train.loop import make_optimizer
    from meshwright.train.metrics import refuse_missing
    from meshwright.train.predicted import blueprint
    from meshwright.train.storage import check_storage

    plan = Plan.parse(config.plan.text, ranks)
    refuse_unavailable(plan)
    check_clip(plan, config.train.clip_grad_norm)
    refuse_missing(config.log)
    share = plan.dp_replicate * plan.dp_shard * plan.microbatches
    batch = config.data.global_batch
    if batch % share:
        near = max(share, round(batch / share) * share)
        what = f"{plan.dp_replicate * plan.dp_shard} data ranks" + (
            f" x {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
        )
        raise PlanError(f"data.global_batch={batch} can't be divided over {what}: the nearest that can is {near}")
    spec = parse_spec(config.model.spec, sequence=config.data.sequence_length)
    if spec.config is not None and spec.config.vocab < VOCABULARY:
        raise ConfigError(f"model {spec.text!r} has vocab={spec.config.vocab}, but tokens are bytes: use vocab={VOCABULARY}")
    model = build_on_meta(spec.build)  # a user's own code may fail: once, here, not on every rank
    if plan.tp > 1 or plan.cp > 1 or plan.pp > 1:
        layout(spec.text, plan, config.data.sequence_length, 2)
    if budget_bytes(plan.recompute) is not None:
        check_budget(blueprint(config, plan.precision), plan, batch // share)
    check_storage(plan, model, make_optimizer(config.optimizer), int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    find_files(config.data.source)


def _configure(arguments: argparse.Namespace, folder: Path) -> Any:
    from meshwright.train import config

    files = [text for text in arguments.inputs if "=" not in text]
    if len(files) > 1:
        raise ConfigError(f"one configuration file at a time, not {len(files)}: {' '.join(files)}")
    path = Path(files[0]) if files else None
    if path is None and arguments.resume:
        path = folder / "plan.toml"  # a resumed run keeps its own configuration
    loaded = config.load(path, [text for text in arguments.inputs if "=" in text] + arguments.set)
    if arguments.plan is not None:
        loaded = replace(loaded, plan=config.PlanTable(arguments.plan))
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise ConfigError(f"--steps {arguments.steps} must be at least 1")
        loaded = replace(loaded, train=replace(loaded.train, steps=arguments.steps))
    return loaded


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.resume and arguments.out is None:
        raise ConfigError("--resume needs the run's folder: add --out DIR")
    if arguments.resume and not (arguments.out / "plan.toml").is_file():
        raise ConfigError(f"--out {arguments.out} holds no run to resume: there is no plan.toml in it")
    if arguments.out is not None:
        return Path(arguments.out)
    if "SLURM_JOB_ID" in os.environ:
        return Path("runs") / f"slurm-{os.environ['SLURM_JOB_ID']}"
    if "RANK" in os.environ:
        raise ConfigError("under torchrun the ranks must agree on the run's folder: add --out DIR")
    return Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def _check_resumed(asked: Any, folder: Path) -> None:
    """Raise `ConfigError` if a resumed run would not be the same run: its model, and which sample comes when, must stay."""
    from meshwright.train.config import load

    before = load(folder / "plan.toml", [])
    kept = (("model", "spec"), ("data", "source"), ("data", "sequence_length"), ("data", "global_batch"), ("train", "seed"))
    for table, key in kept:
        old, new = (getattr(getattr(config, table), key) for config in (before, asked))
        if old != new:
            raise ConfigError(f"a resumed run keeps {table}.{key}={old!r}, not {new!r}: start a new run in another folder")


def _prepare(config: Any, folder: Path, resume: bool) -> None:
    """Write the tokens and the resolved configuration into the run's folder, the configuration last."""
    from meshwright.train.data import open_samples, write_tokens

    tokens = folder / "data" / "tokens.bin"
    existing = folder / "plan.toml"
    if existing.exists() and not resume:
        raise ConfigError(f"--out {folder} already holds a run: add --resume to go on with it, or name another folder")
    try:
        if not (resume and tokens.exists()):
            write_tokens(config.data.source, tokens)
        try:
            open_samples(tokens, config.data)
        except DataError:
            tokens.unlink()
            raise
        partial = folder / "plan.toml.partial"
        partial.write_text(config.to_toml())
        os.replace(partial, existing)
    except OSError as error:
        raise ConfigError(f"the run's folder {folder} can't be written: {error.strerror}") from error


def _announced_ranks() -> int:
    """Return the number of ranks that torchrun or Slurm started, 0 if neither did."""
    from meshwright.parallel.ranks import slurm_environment

    environment = slurm_environment(os.environ) | dict(os.environ)
    return int(environment.get("WORLD_SIZE", "0")) if "RANK" in environment else 0


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)
