"""Tensor parallelism and 2D: meshwright against code by hand, Hugging Face's plan, and the physical floor.

    python benchmarks/tensor_parallel.py [--section 10m|50m|2d|all] [--rounds N] [--few] [--json PATH]

A GPT of that many parameters (fp32, AdamW, clipping), the same global batch of 8 x 256 tokens for all, gloo ranks with one thread
each: two of them, four in section `2d` (dp_shard=2 tp=2). The code by hand uses `parallelize_module` with local tensors between
column and row styles, once with logits gathered, once with `loss_parallel`; the better of the two is what counts. The floor is the
same local program with the activations' collectives left out, plus these alone. Targets: 0.85 of the code by hand
in CPU seconds, peak bytes at most 1.0 of it. Peak bytes are those of tensors alive at the worst moment of a step, per storage.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Ratio, Times, interleave, record, run_ranks, table, write_json
from contenders import CLIP_NORM, Batch, Job, Step, cross_entropy, hand_ddp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import meshwright as mw
from meshwright.models.decoder import Decoder, llama
from meshwright.partition import collectives

CONFIGS = {
    "10m": llama(layers=8, hidden=256, heads=8, vocab=8192, sequence=256),
    "50m": llama(layers=8, hidden=640, heads=10, vocab=8192, sequence=256),
    "2d": llama(layers=8, hidden=256, heads=8, vocab=8192, sequence=256),
}
ROWS = 8
WARMUP_STEPS = 3
TARGET = 0.85


def main() -> None:
    arguments = _arguments()
    results: dict[str, Any] = record("cpu")
    path = arguments.json or Path(__file__).parent / "results" / "tensor_parallel-cpu.json"
    for section in list(CONFIGS) if arguments.section == "all" else [arguments.section]:
        raw = run_ranks(4 if section == "2d" else 2, _measure, section, arguments.rounds, arguments.few)
        results[section] = raw | _compare(raw)
        _print(section, results[section])
        write_json(path, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=[*CONFIGS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender")
    parser.add_argument("--few", action="store_true", help="only the code by hand and meshwright's")
    parser.add_argument("--json", type=Path, help="where results go (default: benchmarks/results/tensor_parallel-cpu.json)")
    return parser.parse_args()


# Contenders


def adamw(parameters: Any) -> torch.optim.AdamW:
    """AdamW, fused; plain tensors and DTensors in groups of their own, since one kernel can't take both."""
    listed = list(parameters)
    groups = [[p for p in listed if isinstance(p, DTensor) == kind] for kind in (False, True)]
    return torch.optim.AdamW([{"params": group} for group in groups if group], lr=3e-4, fused=True)


def _clip(parameters: list[nn.Parameter]) -> None:
    """The norm over plain tensors and DTensors: torch's own function refuses a mix of them."""
    squares = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        norm = torch.linalg.vector_norm(gradient)
        squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2)
    coefficient = (CLIP_NORM / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            local.mul_(coefficient)


def _tensor_parallel(model: Decoder, mesh: DeviceMesh, gathered: bool) -> Decoder:
    """The plan that a specialist writes for this decoder; activations between styles are local tensors."""
    styles: dict[str, Any] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
    head = ColwiseParallel(output_layouts=Replicate()) if gathered else ColwiseParallel(use_local_output=False)
    styles["head"] = head
    for index in range(len(model.blocks)):
        for name in ("attention.query", "attention.key", "attention.value", "ffn.gate", "ffn.up"):
            styles[f"blocks.{index}.{name}"] = ColwiseParallel()
        for name in ("attention.output", "ffn.down"):
            styles[f"blocks.{index}.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, styles)  # type: ignore[return-value]


def _step(model: nn.Module, gathered: bool) -> Step:
    parameters = list(model.parameters())
    optimizer = adamw(parameters)

    def step(batch: Batch) -> float:
        tokens, labels = batch
        if gathered:
            loss = cross_entropy(model(tokens), labels)
            loss.backward()
        else:
            with loss_parallel():
                loss = cross_entropy(model(tokens), labels)
                loss.backward()
        _clip(parameters)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach()
        return (value.full_tensor() if isinstance(value, DTensor) else value).item()

    return step


def hand_tp(job: Job, gathered: bool) -> Step:
    return _step(_tensor_parallel(job.model(), init_device_mesh("cpu", (dist.get_world_size(),)), gathered), gathered)


def hand_2d(job: Job, gathered: bool) -> Step:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = _tensor_parallel(job.model(), mesh["tp"], gathered)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])  # type: ignore[call-overload]
    fully_shard(model, mesh=mesh["dp"])
    step = _step(model, gathered)

    def logged(batch: Batch) -> float:
        return job.logged(torch.tensor(step(batch)))

    return logged


def hugging_face(job: Job) -> Step:
    """A Llama of the same sizes, loaded with the library's own plan."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = job.config
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.sequence,
        use_cache=False,
    )
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder[0])
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=torch.float32)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens).logits

    return _step(Logits(), gathered=True)


def meshwright(job: Job, plan: str) -> Step:
    engine = mw.parallelize(
        job.model(),
        plan,
        optimizer=partial(torch.optim.AdamW, lr=3e-4, fused=True),
        loss_fn=mw.losses.cross_entropy,
        clip_grad_norm=CLIP_NORM,
        example_batch=next(_batches(job, 1)),
    )
    return lambda batch: engine.step(batch).loss


def without_collectives(job: Job) -> Step:
    """The floor's first part: what meshwright runs, less every transfer (the numbers are wrong, the work is the same)."""
    inner = meshwright(job, "tp")
    silent = {
        "all_reduce": lambda tensor, axis, op=None: tensor,
        "all_gather": lambda tensor, axis, dim, label: axis.join([tensor] * axis.size, dim, label),
    }

    def step(batch: Batch) -> float:
        kept = {name: getattr(collectives, name) for name in silent}
        for name, function in silent.items():
            setattr(collectives, name, function)
        try:
            return inner(batch)
        finally:
            for name, function in kept.items():
                setattr(collectives, name, function)

    return step


def collectives_alone(job: Job) -> Step:
    """The floor's second part: the two all-reduces of each layer, forward and backward, and the embedding's and the head's."""
    activation = torch.zeros(ROWS, job.config.sequence, job.config.hidden)
    count = 2 * (2 * job.config.layers + 1)

    def step(_: Batch) -> float:
        for _ in range(count):
            dist.all_reduce(activation)
        return 0.0

    return step


def _contenders(section: str) -> dict[str, Callable[[Job], Step]]:
    if section == "2d":
        return {
            "hand-written 2D": partial(hand_2d, gathered=True),
            "hand-written 2D, loss_parallel": partial(hand_2d, gathered=False),
            "meshwright dp_shard=2 tp=2": partial(meshwright, plan="dp_shard=2 tp=2"),
        }
    return {
        "hand-written DDP": hand_ddp,
        "hand-written TP": partial(hand_tp, gathered=True),
        "hand-written TP, loss_parallel": partial(hand_tp, gathered=False),
        "Hugging Face tp_plan": hugging_face,
        "meshwright tp": partial(meshwright, plan="tp"),
        "meshwright tp sp=on": partial(meshwright, plan="tp sp=on"),
        "floor: no collectives": without_collectives,
        "floor: collectives alone": collectives_alone,
    }


# Measuring


def _measure(section: str, rounds: int, few: bool) -> dict[str, Any]:
    job = Job(CONFIGS[section], "cpu", sync_loss=True, micro_batch=ROWS)
    steps, absent, losses, peaks = {}, {}, {}, {}
    for name, build in _contenders(section).items():
        if few and ("hand-written TP" not in name and name != "meshwright tp"):
            continue
        try:
            step = build(job)
        except Exception as error:
            if "hand" in name or "meshwright" in name:
                raise
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        groups = 2 if section == "2d" or name == "hand-written DDP" else 1
        batches = _batches(job, groups)
        losses[name] = [step(next(batches)) for _ in range(WARMUP_STEPS)]
        peaks[name] = _peak(lambda step=step, batches=batches: step(next(batches)))
        steps[name] = partial(_once, step, batches)
    times = interleave(steps, rounds, 1, "cpu")
    return {
        "parameters": sum(parameter.numel() for parameter in Decoder(job.config).parameters()),
        "rounds": rounds,
        "absent": absent,
        "warmup_losses": losses,
        "peak_bytes": peaks,
        "seconds_per_step": {name: {"cpu": one.cpu_s, "wall": one.wall_s} for name, one in times.items()},
    }


def _once(step: Step, batches: Iterator[Batch]) -> None:
    step(next(batches))


def _batches(job: Job, groups: int) -> Iterator[Batch]:
    """Global batches, of which each of `groups` data ranks takes its rows."""
    group = dist.get_rank() * groups // dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    rows = ROWS // groups
    while True:
        tokens = torch.randint(0, job.config.vocab, (ROWS, job.config.sequence + 1), generator=generator)
        tokens = tokens[group * rows : (group + 1) * rows]
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class _Living(TorchDispatchMode):
    """Bytes of the storages made while it is on, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local ops come by themselves
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)

        def gone() -> None:
            self.known.discard(key)
            self.alive -= size

        weakref.finalize(storage, gone)


def _peak(step: Callable[[], float]) -> int:
    """The most bytes that one step makes beyond what was there before it."""
    gc.collect()
    living = _Living()
    with living:
        step()
    return living.most


# Reading


def _compare(raw: dict[str, Any]) -> dict[str, Any]:
    times = {name: Times(seconds["cpu"], seconds["wall"]) for name, seconds in raw["seconds_per_step"].items()}
    by_hand = [name for name in times if name.startswith("hand-written") and "DDP" not in name]
    best = min(by_hand, key=lambda name: statistics.median(times[name].cpu_s))
    found = {"by_hand": best, "to_hand_written": {name: Ratio.of(one, times[best]).to_json() for name, one in times.items()}}
    if "hand-written DDP" in times:
        ddp = times["hand-written DDP"]
        found["to_ddp"] = {name: Ratio.of(one, ddp).to_json() for name, one in times.items()}
    floor = [times[name] for name in times if name.startswith("floor")]
    if len(floor) == 2:
        parts = Times(
            *([a + b for a, b in zip(*pair, strict=True)] for pair in zip(*[(f.cpu_s, f.wall_s) for f in floor], strict=True))
        )
        found["to_floor"] = {name: Ratio.of(one, parts).to_json() for name, one in times.items() if "meshwright" in name}
    return found


def _print(section: str, found: dict[str, Any]) -> None:
    best = found["by_hand"]
    lines = []
    for name in found["seconds_per_step"]:
        ratio, floor = found["to_hand_written"][name], found.get("to_floor", {}).get(name)
        ddp = found.get("to_ddp", {}).get(name)
        lines.append(
            [
                name,
                f"{statistics.median(found['seconds_per_step'][name]['cpu']):.3f}",
                f"{ratio['cpu_median']:.3f} [{ratio['cpu_quartiles'][0]:.3f} {ratio['cpu_quartiles'][1]:.3f}]",
                f"{ratio['wall_median']:.3f}",
                f"{ddp['cpu_median']:.3f}" if ddp else "",
                f"{floor['cpu_median']:.3f}" if floor else "",
                f"{found['peak_bytes'][name] / found['peak_bytes'][best]:.3f}",
                f"{found['warmup_losses'][name][-1]:.5f}",
            ]
        )
    header = ["who", "CPU s", f"CPU / {best}", "wall", "CPU / DDP", "CPU / floor", "peak bytes", "loss"]
    table(f"{section}: {found['parameters'] / 1e6:.1f}M parameters, target {TARGET} of the code by hand", header, lines)
    for name, why in found["absent"].items():
        print(f"left out: {name}: {why}")


if __name__ == "__main__":
    main()
