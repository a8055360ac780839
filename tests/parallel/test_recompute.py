"""Recompute changes what is kept and nothing else: the same numbers, draws, statistics and counters as without it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
import ranks
from meshwright.cli.train import check
from meshwright.errors import PlanError
from meshwright.models.decoder import Decoder, gpt
from meshwright.train.config import Config, DataTable, ModelTable, PlanTable
from meshwright.train.data import Samples
from parity import assert_same_as_single_device

MODES = ["full", "selective", "budget=1M"]


class Odd(nn.Module):
    """A block that writes to its input (when told to), draws, keeps statistics (some in every second call), counts its calls, fills
    a cache, and returns several things.
    """

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.calls = 0
        self.register_buffer("power", torch.ones(4))
        self.register_buffer("even", torch.ones(4))

    def forward(self, x: Tensor, cache: list[Tensor], *, scale: float, write: bool) -> dict[str, Any]:
        self.calls += 1
        self.power = self.power * 0.9 + 0.1 * self.calls
        if self.calls % 2 == 0:
            self.even.mul_(0.9).add_(0.1 * self.calls)
        write = write and self.in_place
        x = x.mul_(scale).add_(0.01 * self.calls) if write else x * scale + 0.01 * self.calls
        hidden = F.dropout(F.gelu(self.norm(self.first(x))), 0.3, self.training)
        cache.append(hidden.mean())
        out = self.second(hidden) + F.dropout(x * sum(cache), 0.2, self.training) * (self.power + self.even)[:, None, None]
        return {"x": out, "cache": cache, "sizes": (out.shape, None)}


class Net(nn.Module):
    """A block is called twice; the blocks' input has a gradient that goes elsewhere too."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(Odd(in_place) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, cache = self.stem(x), []
        for number, block in enumerate([*self.blocks, self.blocks[1]]):
            given = x + 0.0
            found = block(given, cache, scale=0.9, write=number != 1)
            x, cache = found["x"] + given, found["cache"]
        return self.head(x.mean((2, 3)))


class Drop(nn.Module):
    """Attention and products with dropout, for programs."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True, norm_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(16, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained(kind: str, plan: str) -> tuple[list[float], dict[str, Tensor], list[int]]:
    """Three steps of a model, each rank with its own rows."""
    torch.manual_seed(3)
    model = (Drop() if kind == "drop" else Net(in_place="fsdp" not in plan)).double()  # FSDP2's units can't be written into
    pixels = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(8) % 5
    tokens = torch.randint(0, 40, (8, 6), generator=torch.Generator().manual_seed(1))
    whole = pixels if kind == "net" else (tokens, tokens.roll(1, 1))
    engine = mw.parallelize(
        model,
        plan,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        loss_fn=lambda out, batch: F.cross_entropy(out.flatten(0, -2), batch[1].flatten()),
        example_batch=whole,
    )
    rows = slice(engine.data_rank * 4, engine.data_rank * 4 + 4) if engine.data_ranks > 1 else slice(0, 8)
    losses = [engine.step(tuple(part[rows] for part in whole)).loss for _ in range(3)]
    calls = [block.calls for block in model.blocks] if kind == "net" else []
    return losses, engine.full_state_dict(), calls


def assert_nothing_changes(kind: str, plan: str, mode: str, world_size: int) -> None:
    for (losses, state, calls), (losses_0, state_0, calls_0) in zip(
        ranks.run(world_size, trained, kind, f"{plan} recompute={mode}"), ranks.run(world_size, trained, kind, plan), strict=True
    ):
        assert losses == losses_0
        assert calls == calls_0
        assert {k for k in state_0 if not torch.equal(state[k], state_0[k])} == set()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "plan"), [("net", "single microbatches=2"), ("drop", "single")])
def test_draws_statistics_and_side_effects_happen_once(kind: str, plan: str, mode: str) -> None:
    assert_nothing_changes(kind, plan, mode, 1)


@pytest.mark.parametrize("mode", ["selective", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", ["zero2", "fsdp", "tp", "cp", "1f1b pp=2 microbatches=2", "zero_bubble pp=2 microbatches=2"])
def test_the_same_draws_on_ranks(plan: str, mode: str) -> None:
    assert_nothing_changes("drop", plan, mode, 2)


@pytest.mark.parametrize("mode", ["full"])
def test_side_effects_under_fsdp(mode: str) -> None:
    assert_nothing_changes("net", "fsdp", mode, 2)


class Penalised(nn.Module):
    """Differentiates in its forward, so that its backward goes through it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.tanh(self.first(x)).square().sum()
        return x + self.second(torch.autograd.grad(energy, x, create_graph=True)[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_differentiates_inside_is_repeated_for_each_backward(mode: str) -> None:
    norms = []
    for plan in ("single", f"recompute={mode}"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), *(Penalised() for _ in range(3)))
        engine = mw.parallelize(
            model, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=lambda out, _: out.square().mean()
        )
        norms.append([engine.step(torch.ones(4, 8)).grad_norm for _ in range(3)])
    assert norms[0] == norms[1]


@pytest.mark.parametrize(("plan", "precision"), [("ddp", "fp16"), ("fsdp", "bf16")])
def test_low_precision_is_the_same(plan: str, precision: str) -> None:
    assert_nothing_changes("drop", f"{plan} precision={precision}", "selective", 2)


def test_without_blocks_a_sentence_says_so() -> None:
    with pytest.warns(UserWarning, match="no repeated blocks"):
        mw.parallelize(nn.Linear(3, 3), "recompute=full", optimizer=torch.optim.SGD, loss_fn=lambda out, _: out.mean())


def test_a_budget_below_the_minimum_says_the_minimum() -> None:
    with pytest.raises(PlanError, match=r"at least (\d+) bytes"):
        trained("drop", "recompute=budget=10K")


def refusal(plan: str) -> str:
    """Of a step in which rank 0 has six rows, and rank 1 two."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
    example = torch.ones(8, 8)
    optimizer, loss = lambda p: torch.optim.SGD(p, lr=0.1), lambda out, _: out.square().mean()
    engine = mw.parallelize(model, plan, optimizer=optimizer, loss_fn=loss, example_batch=example)
    rows = 8 if engine.data_ranks == 1 else 6 - 4 * engine.data_rank
    with pytest.raises(PlanError) as error:
        engine.step(example[:rows])
    return str(error.value)


@pytest.mark.parametrize("plan", ["ddp", "fsdp update=backward", "1f1b pp=2 microbatches=2"])
def test_a_budget_that_is_too_small_for_one_rank_is_refused_on_all(plan: str) -> None:
    first, second = ranks.run(2, refusal, f"{plan} recompute=budget=200", limit_s=20)
    least = re.search(r"at least (\d+) bytes", first)
    assert least is not None
    assert first == second
    first, second = ranks.run(2, refusal, f"{plan} recompute=budget={int(least[1]) - 1}", limit_s=20)
    assert "bytes" in first
    assert first == second


def test_a_budget_that_no_row_fits_in_is_refused_before_anything_starts() -> None:
    """With a batch to read the model on; the minimum that is said will do."""
    config = gpt(layers=2, hidden=32, heads=2, vocab=64, sequence=16)
    row = torch.zeros(1, 16, dtype=torch.int64)

    def start(budget: int) -> mw.Engine:
        optimizer, loss = lambda p: torch.optim.SGD(p, lr=0.1), mw.losses.cross_entropy
        return mw.parallelize(
            Decoder(config), f"recompute=budget={budget}", optimizer=optimizer, loss_fn=loss, example_batch=(row, row)
        )

    with pytest.raises(PlanError, match=r"at least (\d+) bytes") as error:
        start(1000)
    least = re.search(r"at least (\d+)", str(error.value))
    assert least is not None
    assert start(int(int(least[1]) * 1.03)).step((row, row)).loss > 0
    settings = Config(model=ModelTable("gpt:layers=2,hidden=32,heads=2,vocab=256"), plan=PlanTable("recompute=budget=1K"))
    with pytest.raises(PlanError, match="at least"):
        check(settings, 1)


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_minimum_that_is_said_is_accepted(chunks: int) -> None:
    """To the byte, for rows that are views of a longer batch too; and less of the logits makes it smaller, not larger."""
    tokens = torch.zeros(4, 17, dtype=torch.int64)

    def start(budget: int) -> mw.Engine:
        return mw.parallelize(
            Decoder(gpt(layers=2, hidden=32, heads=2, vocab=256, sequence=16)),
            f"recompute=budget={budget} loss_chunks={chunks} microbatches=2",
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            loss_fn=mw.losses.cross_entropy,
            example_batch=(tokens[:2, :-1], tokens[:2, 1:]),
        )

    def least(budget: int) -> int:
        with pytest.raises(PlanError, match=r"at least (\d+) bytes") as error:
            start(budget).step((tokens[:, :-1], tokens[:, 1:]))
        return int(re.search(r"at least (\d+)", str(error.value))[1])  # type: ignore[index]

    said = least(26_000 if chunks == 1 else 9000)  # more than one row needs, which is refused earlier
    assert said < 2 * 2 * 16 * (32 + 256 // chunks) * 4
    assert start(said).step((tokens[:, :-1], tokens[:, 1:])).loss > 0


def test_the_minimum_that_the_command_says_is_accepted_by_the_run() -> None:
    settings = Config(
        model=ModelTable("gpt:layers=2,hidden=32,heads=2,vocab=256"),
        data=DataTable(sequence_length=32, global_batch=4),
        plan=PlanTable("recompute=budget=1K"),
    )
    with pytest.raises(PlanError, match=r"at least (\d+) bytes") as error:
        check(settings, 1)
    said = re.search(r"at least (\d+)", str(error.value))
    assert said is not None
    engine = mw.parallelize(
        Decoder(gpt(layers=2, hidden=32, heads=2, vocab=256, sequence=32)),
        f"recompute=budget={said[1]}",
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        loss_fn=mw.losses.cross_entropy,
    )
    assert engine.step(Samples(np.arange(2048, dtype=np.uint8), 32).batch([0, 1, 2, 3])).loss > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("name", ["gpt", "hf-gpt2", "encoder-decoder", "resnet", "unused", "lora"])
@pytest.mark.parametrize(("plan", "world_size"), [("single", 1), ("ddp", 2), ("zero2", 2), ("fsdp", 2)])
def test_same_as_single_device(name: str, plan: str, world_size: int, mode: str) -> None:
    assert_same_as_single_device(name, f"{plan} recompute={mode}", world_size)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("name", ["gpt-8", "hf-llama"])
@pytest.mark.parametrize(
    ("plan", "world_size"),
    [("tp", 2), ("cp", 2), ("1f1b pp=2 microbatches=3", 2), ("zero_bubble pp=2 microbatches=3", 2), ("2d dp_shard=2 tp=2", 4)],
)
def test_same_with_every_axis(name: str, plan: str, world_size: int, mode: str) -> None:
    assert_same_as_single_device(name, f"{plan} recompute={mode}", world_size)
