"""A pipeline's step beside the parity matrix: batches of changing shape, half precision, when gradients leave, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
import parity
import ranks
import zoo
from meshwright.errors import DataError

SHAPES = ((8, 12), (5, 7), (3, 9), (8, 12), (1, 4))  # rows and positions of five batches in a row


def _varied(step: int) -> tuple[Tensor, Tensor]:
    rows, positions = SHAPES[step]
    tokens, labels = zoo.find("gpt-8").batch(step, rows)
    labels = labels.clone()
    labels[:, 0] = tokens[:, 0]  # no row without a label, so that each batch counts
    return tokens[:, :positions], labels[:, :positions]


def through_shapes(plan: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    engine = mw.parallelize(
        zoo.build("gpt-8"), plan, optimizer=parity.adamw, loss_fn=mw.losses.cross_entropy, example_batch=_varied(0)
    )
    metrics = [engine.step(parity.share(_varied(step), engine.data_rank, engine.data_ranks)) for step in range(len(SHAPES))]
    return [m.loss for m in metrics], [m.grad_norm for m in metrics], engine.full_state_dict()


@pytest.mark.parametrize(
    "plan", ["1f1b pp=2 microbatches=4", pytest.param("interleaved pp=2 microbatches=8", marks=pytest.mark.slow)]
)
def test_rows_and_lengths_change_from_batch_to_batch(plan: str) -> None:
    losses, norms, state = ranks.run(1, through_shapes, "single")[0]
    found = ranks.run(2, through_shapes, plan)
    for rank in found:
        assert rank[0] == pytest.approx(losses, rel=1e-9)
        assert rank[1] == pytest.approx(norms, rel=1e-9)
    for name, value in state.items():
        torch.testing.assert_close(found[0][2][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_data_rank_without_a_row_takes_part() -> None:
    losses, norms, _ = ranks.run(1, through_shapes, "single")[0]  # the last batch has one row, for one of two data ranks
    for rank in ranks.run(4, through_shapes, "1f1b pp=2 dp_shard=2 zero=3 microbatches=4"):
        assert rank[0] == pytest.approx(losses, rel=1e-9)
        assert rank[1] == pytest.approx(norms, rel=1e-9)


def in_half(plan: str) -> dict[str, Any]:
    """Gradients of eight micro-batches at once, and of each by itself; then steps at a scale that overflows at first."""
    case = zoo.find("hf-llama-8")
    batch = case.batch(0, 8)
    engine = mw.parallelize(
        zoo.build("hf-llama-8", torch.float32),
        plan,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        loss_fn=case.loss,
        example_batch=batch,
    )
    first = engine.loss_scale.value
    engine.loss_scale.value = min(first, 64.0)
    engine.accumulate(batch)
    together = engine.full_gradients()
    engine.zero_grad()
    items, apart = 0, {name: torch.zeros_like(g, dtype=torch.float64) for name, g in together.items()}
    for row in range(8):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        count = int((part["labels"] != mw.losses.IGNORED).sum())
        engine.accumulate(part)
        for name, gradient in engine.full_gradients().items():
            apart[name] += gradient.double() * count
        engine.zero_grad()
        items += count
    engine.loss_scale.value = 2.0**40 if first > 1 else 1.0
    before = engine.full_state_dict()
    metrics = engine.step(batch)
    after = engine.full_state_dict()
    kept = all(torch.equal(value, before[name]) for name, value in after.items())
    return {
        "errors": [((together[n] - g / items).norm() / g.norm() * items).item() for n, g in apart.items()],
        "skipped": (metrics.skipped, kept, engine.loss_scale.value == 2.0**39),
        "loss": engine.step(batch).loss if first == 1 else 0.0,
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zero_bubble", marks=pytest.mark.slow)])
def test_micro_batches_are_summed_in_full_precision_and_an_overflow_is_skipped(precision: str, schedule: str) -> None:
    first, last = ranks.run(2, in_half, f"{schedule} pp=2 microbatches=8 precision={precision}")
    # A sum of eight in the half itself would be off by its rounding, 2 to the -8 or -11.
    assert len(first["errors"]) > 0
    assert max(first["errors"]) < 1e-5
    overflows = precision == "fp16"
    assert first["skipped"] == (overflows, overflows, overflows)
    assert last["skipped"][::2] == (overflows, overflows)


class Wide(nn.Sequential):
    """Enough to fill several buckets."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(*(nn.Sequential(nn.Linear(600, 600), nn.Tanh()) for _ in range(8)))


def events(plan: str) -> list[str]:
    """Computations, and `sent` where a bucket leaves, in the order in which they begin on this rank."""
    batch = torch.ones(8, 600)
    engine = mw.parallelize(
        Wide(), plan, optimizer=parity.adamw, loss_fn=lambda output, _: output.square().mean(), example_batch=batch
    )
    assert engine.pipeline is not None
    assert engine._applied.buckets is not None
    engine.step(batch[engine.data_rank :: engine.data_ranks])
    seen: list[str] = []
    launch = engine._applied.buckets._launch

    def watch(action: Any) -> Any:
        seen.append(str(action))
        return torch.autograd.profiler.record_function("watched")

    def launched(bucket: Any) -> None:
        seen.append("sent")
        launch(bucket)

    engine.pipeline.watch, engine._applied.buckets._launch = watch, launched  # type: ignore[method-assign]
    engine.step(batch[engine.data_rank :: engine.data_ranks])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["interleaved", "looped_bfs", "zero_bubble virtual=2"])
def test_a_stage_that_is_done_is_reduced_while_another_works(schedule: str) -> None:
    for rank, seen in enumerate(ranks.run(4, events, f"{schedule} pp=2 dp_shard=2 zero=2 microbatches=4")):
        later = f"{2 + rank // 2}"
        sent = [at for at, what in enumerate(seen) if what == "sent"]
        last = max(at for at, what in enumerate(seen) if what[0] == later)
        assert last < sent[0] < len(seen) - len(sent), "after the later stage's last gradient, before the earlier's"


def short(plan: str) -> list[str]:
    case, messages = zoo.find("gpt-8"), []
    for rows in (3, 4):
        engine = mw.parallelize(zoo.build("gpt-8"), plan, optimizer=parity.adamw, loss_fn=case.loss, example_batch=case.batch(0, 8))
        try:
            engine.step(case.batch(0, rows))
            engine.step(case.batch(1, 2))  # an epoch's last batch may be shorter
            messages.append("")
        except DataError as error:
            messages.append(str(error))
    return messages


def test_a_first_batch_of_fewer_rows_than_micro_batches_is_refused_on_every_rank() -> None:
    for refused, taken in ranks.run(2, short, "1f1b pp=2 microbatches=4"):
        assert "microbatches=3" in refused
        assert "3 rows" in refused
        assert taken == ""
