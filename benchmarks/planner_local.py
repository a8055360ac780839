"""The planner against this machine: step times and live bytes of local CPU runs, and the regret of `auto`.

    python benchmarks/planner_local.py [--group NAME ...] [--json PATH] [--report PATH ...]

Run `meshwright doctor --probe` first: without it the rates are the catalog's. Each group is a model on a number of ranks (one
thread each) under several plans of one global batch; `auto` is the plan of them that the planner takes for the fastest, and its
regret what it measured over the fastest that was measured. Every plan runs in fresh processes, as a user's would: in one that has
run others, the C library's allocator has learnt to keep memory, and a step is up to 15 % faster. Peak live bytes are what torch's
allocator hands out during one step on top of parameters, buffers and optimizer states, the most of all ranks. `--report` puts
results of several calls together and predicts them anew. The groups of `HELD_OUT` were written, and measured once, after the
planner's model of a CPU had been settled on the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
import torch.distributed as dist
from common import record, run_ranks, table, write_json
from torch import Tensor, nn

import meshwright as mw
from meshwright import losses
from meshwright.cluster import probe
from meshwright.errors import MeshwrightError
from meshwright.models.decoder import Decoder, gpt, llama

SECONDS = 0.8
"""Measured of each case, after two steps of warming up."""


class Cnn(nn.Module):
    """A small residual network on 32 x 32 pixels."""

    def __init__(self, width: int = 48, blocks: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Bottleneck(nn.Module):
    """Two convolutions of one pixel around one of nine, each followed by a BatchNorm; halves the image if told to."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 2
        self.path = nn.Sequential(
            *(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
            *(nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
            *(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.short = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.short(x) + self.path(x))


class ResNet(nn.Module):
    """Bottleneck blocks at 32 x 32, then at 16 x 16 pixels."""

    def __init__(self, width: int = 96, blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, padding=2)
        self.blocks = nn.ModuleList(Bottleneck(width, 2 if at == blocks // 2 else 1) for at in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """torch's own encoder layers, LayerNorm after each part, with dropout; classifies a sequence of features."""

    def __init__(self, width: int = 224, layers: int = 5) -> None:
        super().__init__()
        self.enter = nn.Linear(40, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 7, 3 * width, dropout=0.1, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Model:
    """How to build a model, a batch of so many rows for it, and its loss."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Any], Tensor]


def _tokens(vocab: int, length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(rows: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def _pixels(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 32, 32), torch.arange(rows) % 10


def _features(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 160, 40), torch.arange(rows) % 100


def _classified(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def _decoder(family: Callable[..., Any], **sizes: Any) -> Model:
    config = family(**sizes)
    return Model(lambda: Decoder(config), _tokens(sizes["vocab"], sizes["sequence"]), losses.cross_entropy)


MODELS = {
    "gpt": _decoder(gpt, layers=6, hidden=192, heads=6, vocab=2048, sequence=128),
    "llama": _decoder(llama, layers=4, hidden=256, heads=8, kv_heads=4, ffn=704, vocab=2048, sequence=128),
    "moe": _decoder(llama, layers=4, hidden=192, heads=4, ffn=384, vocab=2048, sequence=128, experts=4, topk=2),
    "cnn": Model(Cnn, _pixels, _classified),
    "wide": _decoder(gpt, layers=3, hidden=320, heads=5, vocab=6000, sequence=96),
    "deep": _decoder(llama, layers=10, hidden=128, heads=2, ffn=320, vocab=1000, sequence=192),
    "resnet": Model(ResNet, _pixels, _classified),
    "encoder": Model(Encoder, _features, _classified),
}
_TWO = ["ddp", "ddp microbatches=2", "zero1", "zero2", "fsdp", "fsdp microbatches=2"]
_CUT = ["tp", "tp sp=on", "cp=2", "1f1b microbatches=4", "gpipe microbatches=4"]
_FOUR = ["ddp", "zero1", "fsdp", "hsdp"]
GROUPS: dict[str, tuple[str, int, int, list[str]]] = {
    "gpt-1": ("gpt", 1, 8, ["single", "microbatches=2", "microbatches=4"]),
    "llama-1": ("llama", 1, 8, ["single", "microbatches=4"]),
    "moe-1": ("moe", 1, 8, ["single", "microbatches=2"]),
    "cnn-1": ("cnn", 1, 32, ["single", "microbatches=2"]),
    "gpt-2": ("gpt", 2, 8, _TWO + _CUT),
    "llama-2": ("llama", 2, 16, _TWO + _CUT),
    "moe-2": ("moe", 2, 16, _TWO),
    "cnn-2": ("cnn", 2, 64, _TWO),
    "gpt-4": ("gpt", 4, 16, [*_FOUR, "2d tp=2", "dp_replicate=2 pp=2 microbatches=4", "tp=2 dp_replicate=2"]),
    "moe-4": ("moe", 4, 16, _FOUR),
    "cnn-4": ("cnn", 4, 64, _FOUR),
    "encoder-1": ("encoder", 1, 8, ["single", "microbatches=4"]),
    "resnet-1": ("resnet", 1, 24, ["single", "microbatches=3"]),
    "wide-2": ("wide", 2, 12, ["ddp", "zero1", "fsdp", "tp", "1f1b microbatches=3"]),
    "deep-2": ("deep", 2, 8, ["ddp", "ddp microbatches=2", "fsdp", "tp sp=on", "cp=2"]),
    "encoder-2": ("encoder", 2, 16, ["ddp", "zero2", "fsdp recompute=full", "tp"]),
    "resnet-2": ("resnet", 2, 32, ["ddp", "ddp microbatches=4", "fsdp", "1f1b microbatches=4"]),
    "wide-4": ("wide", 4, 16, ["ddp", "zero2", "hsdp", "2d tp=2"]),
}
HELD_OUT = ("encoder-1", "resnet-1", "wide-2", "deep-2", "encoder-2", "resnet-2", "wide-4")


def measure(name: str, text: str, rows: int) -> dict[str, Any]:
    """Seconds of a step (median) and peak live bytes (the most of all ranks) of a plan; run on every rank."""
    try:
        return {"plan": text} | _measured(MODELS[name], text, rows)
    except MeshwrightError as error:
        return {"plan": text, "refused": str(error)}


def _measured(model: Model, text: str, rows: int) -> dict[str, Any]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    plan = mw.Plan.parse(text, ranks)
    share = rows // (plan.dp_replicate * plan.dp_shard)
    batch = model.batch(share)
    before = held()
    engine = mw.parallelize(
        model.build(),
        plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        loss_fn=model.loss,
        example_batch=batch,
        clip_grad_norm=1.0,
    )
    for _ in range(2):
        engine.step(batch)
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 4:
        if ranks > 1:
            dist.barrier()
        began = time.perf_counter()
        engine.step(batch)
        took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        if ranks > 1:
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
        times.append(took.item())
    peak = torch.tensor(held() - before + _allocated(lambda: engine.step(batch)), dtype=torch.float64)
    if ranks > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {"seconds": statistics.median(times), "steps": len(times), "bytes": peak.item()}


def held() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            local = thing.to_local() if hasattr(thing, "to_local") else thing
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def _allocated(step: Callable[[], object]) -> int:
    """The most bytes that the allocator has handed out at once during `step`, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def predicted(name: str, ranks: int, rows: int, plans: list[str]) -> dict[str, Any]:
    """The prediction of each plan that the planner takes, by its text."""
    model = MODELS[name]
    blueprint = mw.inspect(model.build(), model.batch(2), loss_fn=model.loss, device="cpu")
    cluster = mw.Cluster.here(ranks)
    found = {}
    for text in plans:
        try:
            found[text] = mw.predict(blueprint, cluster, text, rows)
        except MeshwrightError as error:
            found[text] = str(error)
    return found


def group(name: str) -> list[dict[str, Any]]:
    """Measure one group, each plan on fresh ranks."""
    model, ranks, rows, plans = GROUPS[name]
    return [run_ranks(ranks, measure, model, text, rows) | {"group": name} for text in plans]


def expect(lines: list[dict[str, Any]]) -> None:
    """Put the planner's prediction beside each measurement, and print both."""
    for name in dict.fromkeys(line["group"] for line in lines):
        model, ranks, rows, plans = GROUPS[name]
        expected = predicted(model, ranks, rows, plans)
        for line in lines:
            if line["group"] != name:
                continue
            guess = expected[line["plan"]]
            if isinstance(guess, str):
                line["not_predicted"] = guess
            else:
                line |= {"predicted_seconds": guess.step_seconds, "predicted_bytes": guess.memory_bytes["peak"]}
                line["parts"] = {"bytes": guess.memory_bytes, "seconds": guess.time_seconds}
            print(_text(line), flush=True)


def _text(line: dict[str, Any]) -> str:
    if "refused" in line or "not_predicted" in line:
        return f"{line['group']:8} {line['plan']:36} {line.get('refused') or line['not_predicted']}"
    times = f"{line['seconds'] * 1e3:7.1f} ms, predicted {line['predicted_seconds'] * 1e3:7.1f} ({_error(line, 'seconds'):+.0%})"
    sizes = f"{line['bytes'] / 1e6:7.1f} MB, predicted {line['predicted_bytes'] / 1e6:7.1f} ({_error(line, 'bytes'):+.1%})"
    return f"{line['group']:8} {line['plan']:36} {times}; {sizes}"


def _error(line: dict[str, Any], what: str) -> float:
    return float(line[f"predicted_{what}"] / line[what] - 1)


def report(lines: list[dict[str, Any]], title: str = "summary") -> dict[str, Any]:
    """Medians over all cases and the regret of the planner's choice in each group."""
    whole = [line for line in lines if "seconds" in line and "predicted_seconds" in line]
    regrets = {}
    for name in dict.fromkeys(line["group"] for line in whole):
        mine = [line for line in whole if line["group"] == name]
        chosen = min(mine, key=lambda line: line["predicted_seconds"])
        regrets[name] = (chosen["seconds"] / min(line["seconds"] for line in mine) - 1, chosen["plan"])
    found = {
        "cases": len(whole),
        "seconds_median_error": statistics.median(abs(_error(line, "seconds")) for line in whole),
        "bytes_median_error": statistics.median(abs(_error(line, "bytes")) for line in whole),
        "mean_regret": statistics.mean(regret for regret, _ in regrets.values()),
        "regrets": regrets,
    }
    rows = [[name, plan, f"{regret:.1%}"] for name, (regret, plan) in regrets.items()]
    table(f"{title}: regret of the planner's choice", ["group", "chosen", "regret"], rows)
    print(
        f"\n{found['cases']} cases: seconds {found['seconds_median_error']:.1%} (asked 15 %), bytes"
        f" {found['bytes_median_error']:.1%} (asked 3 %), mean regret {found['mean_regret']:.1%} (asked 5 %)"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", action="append", choices=list(GROUPS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, nargs="+", help="put the results of earlier calls together")
    arguments = parser.parse_args()
    if arguments.report:
        lines = [line for path in arguments.report for line in json.loads(path.read_text())["cases"]]
    else:
        lines = [line for name in arguments.group or GROUPS for line in group(name)]
    expect(lines)
    content = record("cpu") | {"probe": probe.load()}
    for title, mine in (
        ("summary", [line for line in lines if line["group"] not in HELD_OUT]),
        ("held_out", [line for line in lines if line["group"] in HELD_OUT]),
    ):
        if mine:
            content[title] = report(mine, title)
    content["cases"] = lines
    if arguments.json:
        write_json(arguments.json, content)


if __name__ == "__main__":
    main()
