"""Ranks may hold different shares, different numbers of batches, or nothing at all; every item counts once."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
import parity
import ranks
import zoo

PLANS = ["ddp", "zero1", "zero2", "zero3"]


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def _loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return (output**2).mean()


def _batch(step: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(step)).double()


def _engine(plan: str, **keywords: Any) -> mw.Engine:
    return mw.parallelize(
        _model(), plan, optimizer=parity.adamw, loss_fn=_loss, clip_grad_norm=0.5, example_batch=_batch(0, 1), **keywords
    )


def _reference(sizes: list[list[int]]) -> dict[str, torch.Tensor]:
    """Plain training on the rows of every rank that has any, step by step."""
    model = _model()
    optimizer = parity.adamw(model.parameters())
    for step, rows in enumerate(sizes):
        if not sum(rows):
            continue
        loss = _loss(model(_batch(step, sum(rows))), None)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def train_by_sizes(plan: str, sizes: list[list[int]], leave_early: bool) -> dict[str, torch.Tensor]:
    engine = _engine(plan)
    for step, rows in enumerate(sizes):
        first = sum(rows[: engine.data_rank])
        mine = _batch(step, sum(rows))[first : first + rows[engine.data_rank]]
        if leave_early and not any(later[engine.data_rank] for later in sizes[step:]):
            break  # this rank's loader is empty: it leaves the loop while others go on
        engine.step(mine if len(mine) else None)
    return engine.full_state_dict()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "sizes",
    [
        [[3, 1], [0, 4], [5, 0]],
        [[1, 0], [0, 1], [2, 2]],
    ],
)
def test_a_rank_may_have_nothing(plan: str, sizes: list[list[int]]) -> None:
    expected = _reference(sizes)
    found = ranks.run(2, train_by_sizes, plan, sizes, False)[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_loops_of_different_lengths_agree_when_to_stop(plan: str) -> None:
    """Seven batches against five: the shorter loop simply ends, and the next call of the engine joins the others' steps."""
    sizes = [[2, 3]] * 5 + [[2, 0]] * 2
    expected = _reference(sizes)
    found = ranks.run(2, train_by_sizes, plan, sizes, True, limit_s=60)[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def iterate(lengths: list[int]) -> list[float | None]:
    engine = _engine("ddp")
    loader = [_batch(i, 2) for i in range(lengths[engine.data_rank])]
    return [None if batch is None else float(batch.sum()) for batch in engine.batches(loader) if engine.step(batch)]


def test_batches_yields_none_on_a_rank_that_is_done() -> None:
    first, second = ranks.run(2, iterate, [1, 3])
    assert len(first) == len(second) == 3
    assert [value is None for value in first] == [False, True, True]
    assert None not in second


def zero_valid_items(plan: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Rank 1's labels are all padding: its mean loss is 0 / 0, and must not reach anybody's gradient."""
    case = zoo.CASES["gpt"]
    engine = mw.parallelize(zoo.build("gpt"), plan, optimizer=parity.adamw, loss_fn=mw.losses.cross_entropy)
    tokens, labels = case.batch(0, 4)
    mine = slice(0, 3) if engine.data_rank == 0 else slice(3, 4)
    metrics = engine.step((tokens[mine], labels[mine]))
    return metrics.loss, engine.full_state_dict()


@pytest.mark.parametrize("plan", PLANS)
def test_a_rank_without_valid_items_changes_nothing(plan: str) -> None:
    case = zoo.CASES["gpt"]
    model = zoo.build("gpt")
    tokens, labels = case.batch(0, 4)
    assert (labels[3] == mw.losses.IGNORED).all()
    optimizer = parity.adamw(model.parameters())
    loss = mw.losses.cross_entropy(model(tokens), (tokens, labels))
    loss.backward()
    optimizer.step()
    (found, weights), _ = ranks.run(2, zero_valid_items, plan)
    assert found == pytest.approx(loss.item(), rel=1e-9)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)


def nobody_has_data() -> str:
    engine = _engine("ddp")
    try:
        engine.step(None)
    except mw.DataError as error:
        return str(error)
    return "no error"


def test_a_step_without_any_item_is_refused_on_every_rank() -> None:
    assert all("no rank has an item" in message for message in ranks.run(2, nobody_has_data))


class Routed(nn.Module):
    """Each batch goes one of two ways by its sign; a norm keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(2))  # FSDP2 takes no scalars
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        way = int(x.sum() > 0)
        return self.norm(self.ways[way](x) * self.gains[way]).abs() * x.sum().sign()


def keep_company(plan: str) -> dict[str, torch.Tensor]:
    """Rank 1 goes the first way, then has nothing while rank 0 goes the other way; a batch in between is skipped."""
    torch.manual_seed(3)
    model = nn.Sequential(Routed(), Routed()).double()
    engine = mw.parallelize(model, plan, optimizer=parity.adamw, loss_fn=_loss, example_batch=_batch(0, 2), on_nonfinite="skip")
    first = _batch(1, 2).abs()
    for factor in (-1.0, 1.0, math.inf, 1.0):
        mine = first * factor if engine.data_rank == 0 or factor != 1.0 else None
        engine.step(mine)
    state = engine.full_state_dict()
    return {name: value for name, value in state.items() if value.is_floating_point() and value.isfinite().all()}


@pytest.mark.parametrize("plan", ["fsdp", "fsdp update=backward", "fsdp update=backward clip=two_pass"])
def test_a_rank_that_keeps_company_leaves_no_trace(plan: str) -> None:
    """No use of parameters that nobody used, no statistics, and not a NaN of a batch that was skipped."""
    expected, found = ranks.run(2, keep_company, "ddp")[0], ranks.run(2, keep_company, plan)[0]
    assert set(found) >= set(expected) > {"0.ways.0.weight", "0.gains.1"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


class Either(nn.Module):
    """Two blocks of one shape, of which a batch takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ways[int(x.sum() > 0)](x)


def different_blocks(plan: str) -> str:
    engine = mw.parallelize(Either().double(), plan, optimizer=parity.adamw, loss_fn=_loss)
    engine.step(torch.ones(2, 4).double())
    with pytest.raises(mw.MeshwrightError) as error:
        engine.step(torch.ones(2, 4).double() * (1 - 2 * engine.data_rank))
    return str(error.value)


@pytest.mark.parametrize("plan", ["fsdp", "fsdp microbatches=2"])
def test_ranks_that_run_different_blocks_of_one_shape_are_told(plan: str) -> None:
    assert all("ranks ran different blocks" in message for message in ranks.run(2, different_blocks, plan))


class Writes(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(super().forward(x.clone()))


def written(plan: str) -> str:
    model = nn.Sequential(nn.Linear(4, 4), *(nn.Sequential(Writes(4, 4)) for _ in range(3))).double()
    engine = mw.parallelize(model, plan, optimizer=parity.adamw, loss_fn=_loss)
    with pytest.raises(mw.ModelError) as error:
        engine.step(_batch(0, 2))
    return str(error.value)


def test_a_block_that_writes_to_its_input_is_one_sentence_under_zero_3() -> None:
    assert all("writes to a tensor that it is given" in message for message in ranks.run(2, written, "fsdp"))
