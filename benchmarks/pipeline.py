"""Pipelines: meshwright's step against torch's `PipelineStage` by hand and one device, and against its own simulation.

    python benchmarks/pipeline.py [--section 10m|50m|overhead] [--rounds N] [--json PATH]

Two gloo ranks with one thread each train a GPT (fp32, AdamW, clipping) on 8 micro-batches of 256 tokens. `by hand` is what a
specialist writes on the same cut: two modules, `PipelineStage`, a schedule of `torch.distributed.pipelining`, and one all-reduce
for the norm. `over ideal` is the step's wall time over (one device's / 2) / (1 - bubble), the bubble being the closed form's;
target 1.10. `to by hand` has the target 1.00, in CPU seconds of both ranks, and `to ddp` 1.09: torch's DDP on the same global batch
in one piece (the field's pipelines stand at 1.22 and 1.09). `simulated` is the wall time that the simulator gives for the measured
seconds of each stage's F, B, I and W in that step (target: within 10%; the median of 3 steps), and `in flight` compares the bytes
that autograd holds with the simulator's.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Ratio, Times, interleave, record, run_ranks, table, write_json
from contenders import CLIP_NORM, Batch, Job, adamw, cross_entropy, hand_ddp
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

import meshwright as mw
from meshwright.models.decoder import Decoder, llama
from meshwright.plan.simulate import StageCost, simulate

CONFIGS = {
    "10m": llama(layers=8, hidden=256, heads=8, vocab=8192, sequence=256),
    "50m": llama(layers=8, hidden=640, heads=10, vocab=8192, sequence=256),
    "overhead": llama(layers=4, hidden=64, heads=4, vocab=256, sequence=64),
}
MICROBATCHES = 8
STEPS = 3  # whose stages are timed
PLANS = ["1f1b", "gpipe", "interleaved", "zero_bubble", "zbv"]
BY_HAND = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
Step = Callable[[], Any]


class Part(nn.Module):
    """Some blocks of the decoder, with the embedding if they are the first and the head if they are the last."""

    def __init__(self, model: Decoder, first: int, last: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model.blocks[first:last])
        self.embedding = model.embedding if first == 0 else None
        self.norm, self.head = (model.norm, model.head) if last == len(model.blocks) else (None, None)
        self.register_buffer("cos", model.get_buffer("cos"), persistent=False)
        self.register_buffer("sin", model.get_buffer("sin"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        rotary = (self.get_buffer("cos")[: x.shape[1]], self.get_buffer("sin")[: x.shape[1]])
        for block in self.blocks:
            x = block(x, rotary)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def by_hand(job: Job, name: str, ends: list[int], batch: Batch) -> Step:
    """Return a step on torch's own stages and schedule, cut where meshwright cut."""
    rank, stages = dist.get_rank(), len(ends)
    model, bounds = job.model(), [0, *ends]
    parts = {s: Part(model, bounds[s], bounds[s + 1]) for s in range(stages) if s % 2 == rank}
    made = [PipelineStage(part, s, stages, torch.device("cpu")) for s, part in parts.items()]
    schedule = BY_HAND[name](made if stages > 2 or name == "zero_bubble" else made[0], MICROBATCHES, loss_fn=cross_entropy)
    parameters = [parameter for part in parts.values() for parameter in part.parameters()]
    optimizer = adamw(parameters)
    tokens, labels = batch

    def step() -> float:
        losses: list[Tensor] = []
        schedule.step(*([tokens] if 0 in parts else []), target=labels, losses=losses, return_outputs=False)
        sums = torch.stack(
            [torch.stack(torch._foreach_norm([p.grad for p in parameters])).square().sum(), sum(losses, torch.zeros(()))]
        )
        dist.all_reduce(sums)
        coefficient = min(1.0, CLIP_NORM / (sums[0].sqrt().item() + 1e-6))
        torch._foreach_mul_([p.grad for p in parameters], coefficient)
        optimizer.step()
        optimizer.zero_grad()
        return sums[1].item() / MICROBATCHES

    return step


def one_device(job: Job, batch: Batch) -> Step:
    """Return a plain loop over the micro-batches on one device."""
    model = job.model()
    optimizer = adamw(model.parameters())

    def step() -> None:
        for tokens, labels in zip(batch[0].chunk(MICROBATCHES), batch[1].chunk(MICROBATCHES), strict=True):
            (cross_entropy(model(tokens), labels) / MICROBATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def data(section: str, micro_batch: int) -> Batch:
    config = CONFIGS[section]
    tokens = torch.randint(
        0, config.vocab, (MICROBATCHES * micro_batch, config.sequence + 1), generator=torch.Generator().manual_seed(1)
    )
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def engine(job: Job, plan: str, batch: Batch) -> mw.Engine:
    text = f"{plan} pp=2 microbatches={MICROBATCHES}"
    return mw.parallelize(
        job.model(), text, optimizer=adamw, loss_fn=mw.losses.cross_entropy, clip_grad_norm=CLIP_NORM, example_batch=batch
    )


# On the ranks


def measure(section: str, rounds: int, steps: int, micro_batch: int, plans: list[str]) -> dict[str, Any]:
    """Return every contender's times, and for each plan what was simulated and what was held."""
    job, batch = Job(CONFIGS[section], "cpu", sync_loss=True), data(section, micro_batch)
    engines = {plan: engine(job, plan, batch) for plan in plans}
    contenders: dict[str, Step] = {plan: (lambda e=each: e.step(batch)) for plan, each in engines.items()}
    for plan in (plan for plan in plans if plan in BY_HAND):
        contenders[f"{plan} by hand"] = by_hand(job, plan, engines[plan].pipeline.ends, batch)
    alone = one_device(job, batch) if dist.get_rank() == 0 else lambda: None
    contenders["one device"] = alone
    replica, share = hand_ddp(job), tuple(part.chunk(2)[dist.get_rank()] for part in batch)
    contenders["ddp by hand"] = lambda: replica(share)
    check(engines, contenders, batch)
    times = interleave(contenders, rounds, steps, "cpu")
    found = {plan: held(each, batch) | {"stages": stage_seconds(each, batch)} for plan, each in engines.items()}
    gathered: list[Any] = [None] * 2
    dist.all_gather_object(gathered, found)
    simulated = {plan: simulation(engines[plan], [each[plan] for each in gathered]) for plan in plans}
    return {"times": {name: vars(each) for name, each in times.items()}, "simulated": simulated}


def check(engines: dict[str, mw.Engine], contenders: dict[str, Step], batch: Batch) -> None:
    """All train the same: the first loss of everybody's."""
    first = [each.step(batch).loss for each in engines.values()]
    first += [contenders[f"{plan} by hand"]() for plan in engines if plan in BY_HAND]
    assert max(first) - min(first) < 1e-4 * max(first), first


def stage_seconds(each: mw.Engine, batch: Batch) -> list[dict[tuple[int, str], float]]:
    """Return, for each of some steps, its own seconds and the median seconds of this rank's computations by stage and kind.

    Without the waiting; an I that does its W too counts as B.
    """
    found: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    runs = []

    @contextmanager
    def watch(action: Any) -> Iterator[None]:
        whole = (action.stage, action.microbatch) in each.pipeline.runner.schedule.at_once(dist.get_rank())
        began = time.perf_counter()
        yield
        if not (whole and action.kind == "W"):
            found[action.stage, "B" if whole and action.kind == "I" else action.kind].append(time.perf_counter() - began)

    before, each.pipeline.watch = each.pipeline.watch, watch
    for _ in range(STEPS):
        found.clear()
        dist.barrier()
        start = time.perf_counter()
        each.accumulate(batch)
        dist.barrier()
        step = time.perf_counter() - start
        runs.append({key: statistics.median(values) for key, values in found.items()} | {(-1, "step"): step})
        each.zero_grad()
    each.pipeline.watch = before
    return runs


def held(each: mw.Engine, batch: Batch) -> dict[str, Any]:
    """Return the most bytes that autograd held for backwards at once on this rank, and what one forward of each stage holds."""
    count = _Held({p.untyped_storage().data_ptr() for p in each.module.parameters() if not p.is_meta}, each.pipeline)
    before, each.pipeline.watch = each.pipeline.watch, count.watch
    each.accumulate(batch)
    each.zero_grad()
    each.pipeline.watch = before
    return {"most_bytes": count.most, "bytes": count.by_stage, "bytes_after_inputs": count.after_inputs}


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Held:
    """Bytes of the storages that autograd has saved and not let go of, or weight gradients wait with, without the model."""

    def __init__(self, own: set[int], pipeline: Any) -> None:
        self.own, self.pipeline, self.now, self.most = own, pipeline, 0, 0
        self.waiting: dict[tuple[int, int], list[Any]] = {}
        self.users: defaultdict[int, int] = defaultdict(int)
        self.by_stage: dict[int, int] = {}
        self.after_inputs: dict[int, int] = {}

    @contextmanager
    def watch(self, action: Any) -> Iterator[None]:
        before = self.now
        with saved_tensors_hooks(self._pack, lambda kept: kept.tensor if isinstance(kept, _Kept) else kept):
            yield
        if action.kind == "W":
            del self.waiting[action.stage, action.microbatch]
        elif action.kind == "F":
            self.by_stage[action.stage] = self.now - before
        elif action.kind == "I":
            waiting = self.pipeline.runner.waiting(action.stage, action.microbatch)
            self.waiting[action.stage, action.microbatch] = list(map(self._pack, waiting))
            self.after_inputs[action.stage] = self.by_stage[action.stage] + self.now - before

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.own:
            return tensor
        kept, place, size = _Kept(tensor), storage.data_ptr(), storage.nbytes()
        self.users[place] += 1
        if self.users[place] == 1:
            self.now += size
            self.most = max(self.most, self.now)
        weakref.finalize(kept, self._free, place, size)
        return kept

    def _free(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            self.now -= size


def simulation(each: mw.Engine, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return simulated and measured seconds of forwards and backwards (of the step with the median ratio), bytes by rank."""
    schedule = each.pipeline.runner.schedule
    sizes = {stage: size for rank in found for stage, size in rank["bytes"].items()}
    kept = {stage: size for rank in found for stage, size in rank["bytes_after_inputs"].items()}
    runs = []
    for parts in zip(*(rank["stages"] for rank in found), strict=True):
        seconds = {key: value for part in parts for key, value in part.items()}
        costs = []
        for stage in range(schedule.stages):
            whole = seconds.get((stage, "B"))
            inputs, weights = seconds.get((stage, "I"), whole or 0.0), seconds.get((stage, "W"), 0.0)
            costs.append(StageCost(seconds[stage, "F"], inputs, weights, sizes[stage], kept.get(stage), whole))
        runs.append((simulate(schedule, costs), statistics.mean(part[-1, "step"] for part in parts)))
    runs.sort(key=lambda run: run[0].step_s / run[1])
    simulated, measured = runs[len(runs) // 2]
    return {
        "simulated_s": simulated.step_s,
        "measured_s": measured,
        "ratios": [run.step_s / seconds for run, seconds in runs],
        "simulated_bytes": list(simulated.rank_peak_bytes),
        "measured_bytes": [rank["most_bytes"] for rank in found],
        "bubble": simulate(schedule).bubble_fraction,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=list(CONFIGS), default="10m")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=PLANS)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences in a micro-batch")
    parser.add_argument("--json", type=Path, help="where results go (default: benchmarks/results/pipeline-SECTION.json)")
    arguments = parser.parse_args()
    counts = (arguments.rounds, arguments.steps, arguments.micro_batch)
    results = record("cpu") | run_ranks(2, measure, arguments.section, *counts, arguments.plans)
    times = {name: Times(**each) for name, each in results["times"].items()}
    lines = []
    for plan in arguments.plans:
        found = results["simulated"][plan]
        ideal = statistics.median(times["one device"].wall_s) / 2 / (1 - found["bubble"])
        ratio = Ratio.of(times[plan], times[f"{plan} by hand"]).to_json() if plan in BY_HAND else None
        to_ddp = Ratio.of(times[plan], times["ddp by hand"]).to_json()
        results.setdefault("ratios", {})[plan] = ratio
        results.setdefault("to_ddp", {})[plan] = to_ddp
        lines.append(
            [
                plan,
                f"{statistics.median(times[plan].wall_s):.3f}",
                f"{statistics.median(times[plan].wall_s) / ideal:.2f}",
                f"{ratio['cpu_median']:.3f} ({ratio['wall_median']:.2f} wall)" if ratio else "-",
                f"{to_ddp['cpu_median']:.3f}",
                f"{found['simulated_s'] / found['measured_s']:.2f}",
                ", ".join(f"{a / b:.3f}" for a, b in zip(found["measured_bytes"], found["simulated_bytes"], strict=True)),
            ]
        )
    table(
        f"{arguments.section}, 2 ranks, {MICROBATCHES} micro-batches",
        [
            "plan",
            "step, s",
            "over ideal",
            "to by hand, CPU",
            "to ddp, CPU",
            "simulated / measured",
            "in flight: measured / simulated, by rank",
        ],
        lines,
    )
    path = arguments.json or Path(__file__).parent / "results" / f"pipeline-{arguments.section}.json"
    write_json(path, results)


if __name__ == "__main__":
    main()
