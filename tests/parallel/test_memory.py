"""Each ZeRO stage keeps on each rank what the paper's formula says, counted over the live tensors of the process."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
import ranks
from meshwright.plan import Plan
from meshwright.plan.memory import state_bytes

LAYER = 192 * 192 + 192


class Mlp(nn.Module):
    """24 equal layers whose activations are nothing beside their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(192, 192) for _ in range(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@contextmanager
def only_what_is_new() -> Iterator[None]:
    """Hide everything that this process already holds from the collector, so that counting is quick and starts at zero."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all new tensor storages that Python can reach, each once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            tensors = [thing.to_local()] if hasattr(thing, "to_local") else [thing]
            for tensor in tensors:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def settled_bytes() -> int:
    """`live_bytes` when nothing runs: gloo's thread lets go of a collective's tensors a moment after `wait` has returned."""
    counts = [live_bytes()]
    while len(counts) < 3 or counts[-1] < counts[-2]:
        time.sleep(0.02)
        counts.append(live_bytes())
    return counts[-1]


@only_what_is_new()
def measure(text: str) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = mw.parallelize(
        Mlp(),
        text,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        loss_fn=lambda output, batch: (output**2).mean(),
        example_batch=torch.ones(2, 192),
    )
    batch = torch.ones(engine.plan.microbatches, 192)
    at_update: list[int] = []
    engine.step(batch)
    between = settled_bytes()
    # An update has a call for each slice, and every gradient is there during all of them: the first few tell.
    engine.optimizer.register_step_pre_hook(lambda *_: at_update.append(settled_bytes()) if len(at_update) < 3 else None)
    engine.step(batch)
    engine.step(batch)
    count = sum(entry.shape.numel() for entry in engine.table)
    return {
        "between": between,
        "peak": at_update[-1],
        "after": settled_bytes(),
        "parameters": count,
        "plan": engine.plan.to_json(),
    }


PLANS = [
    ("single", 1),
    ("ddp", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero2", 4),
    ("zero3", 4),
    ("dp_replicate=2 dp_shard=2 zero=1", 4),
    ("dp_replicate=2 dp_shard=2 zero=2", 4),
    ("ddp microbatches=3", 2),
    ("zero1 microbatches=3", 2),
    ("zero2 microbatches=3", 2),
    ("zero3 microbatches=3", 2),
    ("single precision=bf16", 1),
    ("ddp precision=bf16", 2),
    ("zero1 precision=bf16", 2),
    ("zero2 precision=bf16 microbatches=2", 2),
    ("zero3 precision=bf16", 2),
    # Of what tensor parallelism leaves to each rank, the formulas hold as of the whole.
    ("tp", 2),
    ("dp_replicate=2 tp=2 precision=bf16", 4),
    ("dp_shard=2 zero=1 tp=2", 4),
    ("dp_shard=2 zero=2 tp=2 microbatches=2", 4),
    ("dp_shard=2 zero=3 tp=2", 4),
]


@pytest.mark.parametrize(("text", "world_size"), PLANS)
def test_live_bytes_match_the_formula(text: str, world_size: int) -> None:
    for found in ranks.run(world_size, measure, text):
        expected = state_bytes(Plan(**found["plan"]), found["parameters"])
        assert found["between"] == pytest.approx(expected.between_steps, rel=0.02)
        assert found["after"] == pytest.approx(expected.between_steps, rel=0.02)
        assert found["peak"] == pytest.approx(expected.peak, rel=0.02)


STORED = [
    ("single optimizer_state=bf16", 1),
    ("zero1 optimizer_state=int8", 2),
    ("zero2 optimizer_state=bf16 microbatches=2", 2),
    ("zero3 optimizer_state=int8", 2),
    ("single precision=bf16 master=kahan", 1),
    ("ddp precision=bf16 master=stochastic optimizer_state=int8", 2),
    ("zero1 precision=bf16 master=kahan optimizer_state=bf16", 2),
    ("zero2 precision=bf16 master=kahan", 2),
    ("zero3 precision=bf16 master=stochastic", 2),
    ("zero3 precision=bf16 master=kahan optimizer_state=bf16", 2),
    ("single offload=optimizer:cpu", 1),  # on a CPU it is there already
    ("single offload=optimizer:nvme={dir}", 1),
    ("zero1 offload=optimizer:nvme={dir}@0.5", 2),
    ("ddp precision=bf16 offload=optimizer:nvme={dir}", 2),
    ("zero2 precision=bf16 offload=optimizer:nvme={dir}", 2),
    ("zero3 precision=bf16 master=kahan offload=optimizer:nvme={dir}", 2),
    ("single offload=params:nvme={dir}", 1),
    ("zero3 offload=params:nvme={dir}", 2),
    ("zero3 offload=params:nvme={dir}@0.5,optimizer:nvme={dir}", 2),
]


_QUICK = ("single optimizer_state=bf16", "zero3 precision=bf16 master=kahan optimizer_state=bf16", STORED[-1][0])


@pytest.mark.parametrize(
    ("text", "world_size"), [pytest.param(*each, marks=() if each[0] in _QUICK else pytest.mark.slow) for each in STORED]
)
def test_live_bytes_of_stored_states_match_the_formula(text: str, world_size: int, tmp_path: Path) -> None:
    for found in ranks.run(world_size, measure, text.format(dir=tmp_path)):
        expected = state_bytes(Plan(**found["plan"]), found["parameters"], largest_unit=LAYER, on_host=True)
        assert found["between"] == pytest.approx(expected.between_steps, rel=0.03)
        assert found["after"] == pytest.approx(expected.between_steps, rel=0.03)
        assert found["peak"] == pytest.approx(expected.peak + expected.updating, rel=0.03)


@pytest.mark.parametrize(
    "text",
    [
        "zero1",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                "ddp",
                "zero2",
                "zero3",
                "zero3 offload=optimizer:nvme={dir},params:nvme={dir}",
                "zero1 precision=bf16",
                "ddp precision=bf16 master=stochastic",
                "zero2 precision=bf16 master=kahan optimizer_state=int8",
                "zero3 precision=bf16",
                "zero3 precision=bf16 master=kahan optimizer_state=bf16",
                "zero1 offload=optimizer:nvme={dir}",
            )
        ),
    ],
)
def test_gradients_are_gone_as_soon_as_they_are_used(text: str, tmp_path: Path) -> None:
    plan = text.format(dir=tmp_path) + " update=backward"
    for highest, parameters in ranks.run(2, highest_during_backward, plan):
        expected = state_bytes(Plan.parse(plan, 2), parameters, largest_unit=LAYER, largest_parameter=192 * 192, on_host=True)
        assert highest == pytest.approx(expected.highest, rel=0.03)


@only_what_is_new()
def highest_during_backward(text: str) -> tuple[int, int]:
    """(highest live bytes seen whenever a gradient is made, parameters)."""
    torch.manual_seed(0)
    model = Mlp()
    seen: list[int] = []
    engine = mw.parallelize(
        model,
        text,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        loss_fn=lambda output, batch: (output**2).mean(),
    )
    batch = torch.ones(engine.plan.microbatches, 192)
    engine.step(batch)
    for layer in engine.module.layers:
        layer.register_full_backward_hook(lambda *_: seen.append(live_bytes()))
    engine.step(batch)
    return max(seen), sum(entry.shape.numel() for entry in engine.table)


@pytest.mark.parametrize("text", ["zero2", "zero2 microbatches=3", "zero3", "zero3 microbatches=3"])
def test_no_more_travels_than_the_formula_says(text: str) -> None:
    for highest, parameters in ranks.run(2, highest_during_backward, text):
        assert highest <= state_bytes(Plan.parse(text, 2), parameters, largest_unit=LAYER).highest * 1.03


@only_what_is_new()
def left_behind(text: str) -> dict[str, float]:
    """The bytes beside model and states after the first step, over those of the parameters, and what stays without the engine."""
    model = Stack()
    engine = mw.parallelize(
        model,
        text,
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-3),
        loss_fn=lambda output, batch: (output**2).mean(),
        example_batch=torch.ones(512, 64),
    )
    weights = sum(entry.shape.numel() * 4 for entry in engine.table)
    engine.step(torch.ones(512, 64))
    after = settled_bytes()
    del engine, model
    return {"after": after / weights, "gone": settled_bytes() / weights}


class Stack(nn.Module):
    """Blocks whose activations are far larger than their weights, some of them results that their own op saves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Softmax(-1)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("text", "world_size"),
    [
        ("single recompute=full", 1),
        ("single recompute=selective precision=bf16", 1),
        ("update=backward", 1),
        ("ddp recompute=full", 2),
        ("zero2", 2),
        ("fsdp recompute=full", 2),
        ("tp recompute=selective", 2),
        ("1f1b pp=2 microbatches=2", 2),
    ],
)
def test_a_step_leaves_no_activation_and_an_engine_nothing(text: str, world_size: int) -> None:
    for found in ranks.run(world_size, left_behind, text):
        assert found["after"] < 6.0  # weights, masters, gradients and the batch; the activations are 24
        assert found["gone"] < 0.1
