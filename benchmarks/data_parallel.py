"""Data parallelism: meshwright's step time against code by hand and the libraries, and its bytes against the formulas.

    python benchmarks/data_parallel.py [--section 10m|50m|overhead|memory|all] [--rounds N] [--steps N] [--json PATH]

Sections `10m` and `50m` train a GPT of that many parameters (fp32, AdamW, clipping, micro-batch 4 x 256 tokens per rank, two gloo
ranks with one thread each); `overhead` trains one so small that the code around the model is what is measured; `memory` counts
live bytes. Ratios below 1 mean that meshwright, or the peer, is faster than what it is compared with. Targets: 1.02 of the code
by hand in CPU seconds (1.05 in `overhead`), no slower than any peer, 2% between bytes and formula.

Peers that are not installed are left out with a line saying so. DeepSpeed: `pip install wheel ninja`, then `DS_BUILD_OPS=0 pip
install --no-build-isolation deepspeed`; its first run compiles an extension for half a minute and needs `ninja` on the PATH.
Accelerate turns FSDP2 on for accelerators only; here its FSDP2 code is switched on by hand (see `contenders.py`).
With `--device cuda` one rank compares `single` with a plain torch loop.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Ratio, Times, interleave, record, run_ranks, table, write_json
from contenders import CLIP_NORM, GROUPS, Batch, Contender, Job, Step, adamw, build
from torch import Tensor
from torch.distributed.tensor import DTensor

import meshwright as mw
from meshwright.models.decoder import Decoder, DecoderConfig, llama
from meshwright.plan.memory import state_bytes

CONFIGS = {
    "10m": llama(layers=8, hidden=256, heads=8, vocab=8192, sequence=256),
    "50m": llama(layers=8, hidden=640, heads=10, vocab=8192, sequence=256),
    "overhead": llama(layers=2, hidden=64, heads=4, vocab=256, sequence=64),
    "memory": llama(layers=8, hidden=256, heads=8, vocab=8192, sequence=256),
}
RANKS = 2
WARMUP_STEPS = 3
STEPS = {"10m": 1, "50m": 1, "overhead": 25}
"""Steps in one turn by default: long enough to time, short enough that a disturbance hits few turns."""

TARGETS = {"10m": 1.02, "50m": 1.02, "overhead": 1.05}
MEMORY_PLANS = [f"{plan}{precision}" for precision in ("", " precision=bf16") for plan in ("ddp", "zero1", "zero2", "fsdp")]


def main() -> None:
    arguments = _arguments()
    results: dict[str, Any] = record(arguments.device) | {"ranks": 1 if arguments.device == "cuda" else RANKS}
    sections = ["10m", "50m", "overhead", "memory"] if arguments.section == "all" else [arguments.section]
    path = arguments.json or Path(__file__).parent / "results" / f"data_parallel-{arguments.device}.json"
    for section in sections:
        if section != "memory":
            results[section] = _times(section, arguments)
        elif arguments.device == "cpu":
            results[section] = _memory()
        write_json(path, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=[*CONFIGS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender")
    parser.add_argument("--steps", type=int, help="steps in a turn (default: 1, and 25 in `overhead`)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), help="launch only these groups of contenders")
    parser.add_argument("--no-loss-sync", action="store_true", help="others than meshwright log their own rank's loss")
    parser.add_argument("--json", type=Path, help="where results go (default: benchmarks/results/data_parallel-DEVICE.json)")
    return parser.parse_args()


# Step times


def _times(section: str, arguments: argparse.Namespace) -> dict[str, Any]:
    cuda = arguments.device == "cuda"
    groups = ["single"] if cuda else ["overhead"] if section == "overhead" else ["ddp", "fsdp", "zero"]
    job = Job(CONFIGS[section], arguments.device, sync_loss=not arguments.no_loss_sync)
    found: dict[str, Any] = {"loss_sync": job.sync_loss, "groups": {}}
    for group in arguments.groups or groups:
        steps = arguments.steps or STEPS[section]
        raw = run_ranks(1 if cuda else RANKS, _measure, group, job, arguments.rounds, steps)
        found["groups"][group] = raw | _compare(GROUPS[group], raw)
        _print(section, group, job, found["groups"][group])
    return found


def _measure(group: str, job: Job, rounds: int, steps: int) -> dict[str, Any]:
    """Build a group's contenders on this rank, let them take turns, and return what was seen."""
    built, absent = build(GROUPS[group], job)
    running = {name: _running(step, job) for name, step in built.items()}
    losses = {name: [next(run) for _ in range(WARMUP_STEPS)] for name, run in running.items()}
    turns = {name: partial(next, run) for name, run in running.items()}
    times = interleave(turns, rounds, steps, job.device)  # type: ignore[arg-type]
    return {
        "parameters": sum(parameter.numel() for parameter in Decoder(job.config).parameters()),
        "rounds": rounds,
        "steps": steps,
        "absent": absent,
        "warmup_losses": losses,
        "seconds_per_step": {name: {"cpu": one.cpu_s, "wall": one.wall_s} for name, one in times.items()},
    }


def _running(step: Step, job: Job) -> Iterator[float]:
    """Yield the losses of one step after another; every contender sees the same batches in the same order."""
    batches = _batches(job)
    index = 0
    while True:
        yield step(batches[index % len(batches)])
        index += 1


def _batches(job: Job, count: int = 8) -> list[Batch]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1 + rank)
    shape = (job.micro_batch, job.config.sequence + 1)
    tokens = [torch.randint(0, job.config.vocab, shape, generator=generator).to(job.device) for _ in range(count)]
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def _compare(contenders: list[Contender], raw: dict[str, Any]) -> dict[str, Any]:
    """Pair every contender with the code by hand of its form, with the group's first, and every plan with its peers."""
    times = {name: Times(seconds["cpu"], seconds["wall"]) for name, seconds in raw["seconds_per_step"].items()}
    here = [contender for contender in contenders if contender.name in times]
    by_hand = {contender.form: contender.name for contender in here if contender.who == "hand"}
    first = here[0].name
    to_hand, to_first, to_peers = {}, {}, {}
    for one in here:
        counterpart = by_hand.get(one.form, first)
        if one.name != counterpart:
            to_hand[one.name] = {"of": counterpart} | Ratio.of(times[one.name], times[counterpart]).to_json()
        if one.name != first:
            to_first[one.name] = {"of": first} | Ratio.of(times[one.name], times[first]).to_json()
        for peer in here:
            if one.who == "meshwright" and peer.who == "peer" and peer.form == one.form:
                to_peers[f"{one.name} / {peer.name}"] = Ratio.of(times[one.name], times[peer.name]).to_json()
    return {"to_hand_written": to_hand, "to_first": to_first, "to_peers": to_peers}


def _print(section: str, group: str, job: Job, found: dict[str, Any]) -> None:
    names = list(found["seconds_per_step"])
    reference = found["warmup_losses"][names[0]][-1]
    lines = []
    for name in names:
        seconds = found["seconds_per_step"][name]
        hand, first = found["to_hand_written"].get(name), found["to_first"].get(name)
        lines.append(
            [
                name,
                _milliseconds(seconds["cpu"]),
                _milliseconds(seconds["wall"]),
                f"{_ratio(hand, 'cpu')} of {hand['of']}" if hand else "",
                _ratio(hand, "wall"),
                _ratio(first, "cpu"),
                f"{abs(found['warmup_losses'][name][-1] / reference - 1):.0e}",
            ]
        )
    title = (
        f"## {section}, {group}: {found['parameters'] / 1e6:.2f}M parameters, {job.micro_batch} x {job.config.sequence} tokens per "
        f"rank, {found['rounds']} rounds of {found['steps']} steps, target {TARGETS[section]}"
    )
    header = ["", "CPU ms, all ranks", "wall ms", "CPU ratio [quartiles]", "wall ratio", f"CPU of {names[0]}", "loss differs"]
    table(title, header, lines)
    peers = [[pair, _ratio(ratio, "cpu"), _ratio(ratio, "wall")] for pair, ratio in found["to_peers"].items()]
    if peers:
        table("Against peers of the same form", ["", "CPU ratio [quartiles]", "wall ratio"], peers)
    for name, reason in found["absent"].items():
        print(f"{name}: not measured here: {reason}")


def _milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f}"


def _ratio(ratio: dict[str, Any] | None, clock: str) -> str:
    if ratio is None:
        return ""
    low, high = ratio[f"{clock}_quartiles"]
    return f"{ratio[f'{clock}_median']:.3f} [{low:.3f} {high:.3f}]"


# Live bytes


def _memory() -> dict[str, Any]:
    found = {}
    lines = []
    for plan in MEMORY_PLANS:
        found[plan] = seen = run_ranks(RANKS, _live_bytes, plan, CONFIGS["memory"])
        for moment in ("between_steps", "peak"):
            counted, formula = seen[moment]["counted"], seen[moment]["formula"]
            seen[moment]["relative_error"] = counted / formula - 1
            lines.append([plan, moment.replace("_", " "), f"{counted:,}", f"{formula:,.0f}", f"{counted / formula - 1:+.2%}"])
    header = ["plan", "when", "live bytes on rank 0", "formula", "error"]
    table(f"## memory: {found['ddp']['parameters'] / 1e6:.2f}M parameters, {RANKS} ranks, target 2%", header, lines)
    print(
        "\nCounted: the storages (each once, whole, padding included) of every tensor that Python's collector sees and of their "
        "gradients,\nwithout the batch and the module's buffers. Not seen: tensors that only C++ holds (none are known here)."
    )
    return found


def _live_bytes(text: str, config: DecoderConfig) -> dict[str, Any]:
    """Train three steps under a plan; count live tensor bytes of this rank between steps and just before an update."""
    job = Job(config, "cpu", sync_loss=True)
    engine = mw.parallelize(
        job.model(), text, optimizer=adamw, loss_fn=mw.losses.cross_entropy, clip_grad_norm=CLIP_NORM, device=torch.device("cpu")
    )
    batches = _batches(job, count=3)
    outside = [*engine.module.buffers(), *(tensor for batch in batches for tensor in batch)]
    peaks: list[int] = []
    engine.optimizer.register_step_pre_hook(lambda *_: peaks.append(_live_storage_bytes(outside)))
    for batch in batches:
        engine.step(batch)
    parameters = sum(entry.shape.numel() for entry in engine.table)
    formula = state_bytes(engine.plan, parameters)
    return {
        "parameters": parameters,
        "plan": str(engine.plan),
        "between_steps": {"counted": _live_storage_bytes(outside), "formula": formula.between_steps},
        "peak": {"counted": max(peaks[1:]), "formula": formula.peak},  # in the first step there are no optimizer states yet
    }


def _live_storage_bytes(outside: list[Tensor]) -> int:
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # isinstance would ask proxies for their class, and some import on being asked
            _add(thing, storages)
    for tensor in outside:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _add(tensor: Tensor, storages: dict[int, int]) -> None:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return
    storage = tensor.untyped_storage()
    storages[storage.data_ptr()] = storage.nbytes()
    gradient = tensor.grad if tensor.is_leaf else None
    if gradient is not None:
        _add(gradient, storages)


if __name__ == "__main__":
    main()
