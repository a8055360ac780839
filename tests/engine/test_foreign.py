"""What other code does around the engine must not reach its numbers, and what it can't do right it refuses."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw
import parity
import ranks

PLANS = [("single", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]


def _square(output: Any, batch: Any) -> torch.Tensor:
    return (output**2).mean()


def _rows(engine: mw.Engine, rows: int = 4, features: int = 6) -> torch.Tensor:
    batch = torch.randn(rows, features, generator=torch.Generator().manual_seed(1)).double()
    return parity.share(batch, engine.data_rank, engine.data_ranks)


class Chain(nn.Module):
    """Blocks that are reached by another method than forward, a transposed parameter, and reentrant checkpointing."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Parameter(torch.randn(6, 8).t())
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.first.t()
        for _ in range(2):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True) if self.reentrant else block(x)
                x = torch.tanh(x)
        return x


def _chain(reentrant: bool = False) -> Chain:
    torch.manual_seed(2)
    return Chain(reentrant).double()


def train_chain(plan: str, kind: str) -> dict[str, torch.Tensor]:
    keywords: dict[str, Any] = {"forward_fn": lambda model, batch: model.run(batch)} if kind == "method" else {}
    engine = mw.parallelize(
        _chain(kind == "reentrant"),
        plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
        loss_fn=_square,
        **keywords,
    )
    for _ in range(3):
        engine.step(_rows(engine))
    return engine.full_state_dict()


@pytest.mark.parametrize(("plan", "world_size"), PLANS)
@pytest.mark.parametrize("kind", ["forward", "method", "reentrant"])
def test_any_way_through_the_module_gives_the_single_device_weights(plan: str, world_size: int, kind: str) -> None:
    if plan == "zero3" and kind == "reentrant":  # FSDP2 reduces the root when the first inner backward ends
        with pytest.raises(ranks.RankFailed, match="use_reentrant=False"):
            ranks.run(world_size, train_chain, plan, kind)
        return
    model = _chain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(3):
        _square(model(batch), None).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = ranks.run(world_size, train_chain, plan, kind)[0]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def interleaved(plan: str) -> tuple[float, float]:
    """A gradient that another model's loss leaves behind, and an evaluation between backward and update."""
    torch.manual_seed(4)
    engine = mw.parallelize(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double(), plan, optimizer=parity.adamw, loss_fn=_square)
    clean = engine.step(_rows(engine)).grad_norm
    torch.manual_seed(4)
    engine = mw.parallelize(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double(), plan, optimizer=parity.adamw, loss_fn=_square)
    if plan != "zero3":
        _square(engine.module(_rows(engine) * 3), None).backward()
    disturbed = engine.step(_rows(engine)).grad_norm
    assert disturbed == clean
    batch = _rows(engine)
    engine.backward(_square(engine(batch), None))
    with torch.no_grad():
        engine(batch)
    engine.optimizer_step()
    with torch.no_grad():
        after = _square(engine(batch), None)
    return float(after), engine.evaluate(batch).loss


@pytest.mark.parametrize(("plan", "world_size"), PLANS)
def test_foreign_gradients_and_evaluations_in_between_change_nothing(plan: str, world_size: int) -> None:
    found = ranks.run(world_size, interleaved, plan)
    assert sum(own for own, _ in found) / len(found) == pytest.approx(found[0][1], rel=1e-9)


def in_turn() -> list[str]:
    engine = mw.parallelize(nn.Linear(6, 2).double(), "ddp", optimizer=parity.adamw)
    messages = []
    loss = _square(engine(_rows(engine)), None)
    engine.backward(loss)
    for action in (lambda: engine.backward(loss), lambda: (engine.full_gradients(), engine(_rows(engine)))):
        try:
            action()
        except mw.ConfigError as error:
            messages.append(str(error))
    return messages


def test_calls_out_of_turn_are_refused() -> None:
    for messages in ranks.run(2, in_turn):
        assert "one after the other" in messages[0]
        assert "optimizer_step" in messages[1]


def odd_batches() -> list[str]:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    engine = mw.parallelize(Named().double(), "single", optimizer=parity.adamw, loss_fn=_square)
    engine.step(UserDict(x=torch.ones(2, 6).double()))  # a mapping that is no dict, as tokenizers return
    try:
        engine.step({"y": torch.ones(2, 6).double()})
    except mw.DataError as error:
        return [str(error)]
    return []


def test_any_mapping_is_a_batch_and_one_without_arguments_is_refused() -> None:
    (messages,) = ranks.run(1, odd_batches)
    assert "no entry of the batch (y)" in messages[0]


def counted(plan: str) -> int:
    engine = mw.parallelize(
        nn.Linear(6, 2),
        plan,
        optimizer=parity.adamw,
        loss_fn=lambda output, batch: (output**2).mean(),
        count_fn=lambda batch: 2**24 + 1,
    )
    engine.step(torch.ones(2, 6))
    return engine.step(torch.ones(2, 6)).items


def test_large_counts_are_exact() -> None:
    assert ranks.run(2, counted, "ddp") == [2**25 + 2] * 2


class Mixed(nn.Module):
    """A norm that a float32 buffer feeds, and a frozen norm: both meet another dtype under a 16-bit plan."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.LayerNorm(6).requires_grad_(False)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.layer(self.norm(x.float() + self.shift)))


def mixed(plan: str) -> float:
    torch.manual_seed(0)
    engine = mw.parallelize(Mixed(), plan, optimizer=parity.adamw, loss_fn=lambda o, b: (o.float() ** 2).mean())
    return engine.step(torch.ones(2, 6)).loss


@pytest.mark.parametrize("plan", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_norms_take_what_they_are_given_in_16_bits(plan: str, precision: str) -> None:
    exact = ranks.run(2, mixed, plan)[0]
    assert ranks.run(2, mixed, f"{plan} precision={precision}")[0] == pytest.approx(exact, rel=0.02)
