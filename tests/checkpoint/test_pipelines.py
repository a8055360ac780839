"""A checkpoint of a pipeline continues under any plan, and the other way round; shared weights and buffers are in it once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
import parity
import ranks
import zoo

PLANS = {
    "single": 1,
    "zero2": 2,
    "1f1b pp=2 microbatches=2": 2,
    "zbv pp=2 microbatches=3": 2,
    "1f1b pp=2 dp_shard=2 zero=2 microbatches=2": 4,
}


class Statistics(nn.Module):
    """Buffers that the forward changes, on different stages."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(4)]
        self.embedding, self.layers = nn.Embedding(zoo.VOCAB, 16), nn.ModuleList(layers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x.flatten(0, 1)).view_as(x)
        return x @ self.embedding.weight.T


def _engine(plan: str, kind: str) -> mw.Engine:
    case = zoo.find("gpt-8")
    torch.manual_seed(1)
    model = zoo.build("gpt-8") if kind == "tied" else Statistics().double()
    keywords: dict[str, Any] = {"optimizer": parity.adamw, "loss_fn": case.loss, "clip_grad_norm": 0.5}
    return mw.parallelize(model, plan, example_batch=case.batch(0, 8), **keywords)


def _steps(engine: mw.Engine, first: int, last: int) -> list[float]:
    case = zoo.find("gpt-8")
    return [engine.step(parity.share(case.batch(step, 8), engine.data_rank, engine.data_ranks)).loss for step in range(first, last)]


def through(plan: str, folder: str, kind: str = "tied") -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = _engine(plan, kind)
    losses = _steps(engine, 0, 2)
    engine.save(Path(folder) / "half", {"position": 12})
    return losses + _steps(engine, 2, 4), engine.full_state_dict()


def onward(plan: str, folder: str, kind: str = "tied") -> tuple[list[float], dict[str, torch.Tensor], Any]:
    engine = _engine(plan, kind)
    _steps(engine, 7, 8)
    extra = engine.load(Path(folder) / "half")
    loss = engine.evaluate(parity.share(zoo.find("gpt-8").batch(9, 8), engine.data_rank, engine.data_ranks)).loss
    return _steps(engine, 2, 4), engine.full_state_dict(), (extra, loss)


SLOW = [pytest.param(before, marks=pytest.mark.slow) for before in list(PLANS)[3:]]


@pytest.mark.parametrize("before", ["single", list(PLANS)[2], *SLOW])
def test_any_plan_to_any_plan(before: str, tmp_path: Path) -> None:
    losses, weights = ranks.run(PLANS[before], through, before, str(tmp_path))[0]
    evaluated = []
    for after in PLANS:
        found, resumed, (extra, loss) = ranks.run(PLANS[after], onward, after, str(tmp_path))[0]
        assert extra == {"position": 12}
        assert found == pytest.approx(losses[2:], rel=1e-9)
        assert set(resumed) == set(weights)
        for name, value in weights.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-9, atol=1e-12)
        evaluated.append(loss)
    assert evaluated == pytest.approx([evaluated[0]] * len(evaluated), rel=1e-9)


def test_resuming_is_bit_equal_and_buffers_come_from_their_stage(tmp_path: Path) -> None:
    plan = "interleaved pp=2 microbatches=2"
    losses, state = ranks.run(2, through, plan, str(tmp_path), "statistics")[0]
    found, resumed, _ = ranks.run(2, onward, plan, str(tmp_path), "statistics")[0]
    assert found == losses[2:]
    assert all(torch.equal(resumed[name], value) for name, value in state.items())
    for layer in range(4):
        assert state[f"layers.{layer}.1.num_batches_tracked"] == 8
        assert not torch.equal(state[f"layers.{layer}.1.running_mean"], torch.zeros(16).double())


def test_a_weight_of_two_stages_is_in_the_checkpoint_once(tmp_path: Path) -> None:
    ranks.run(2, through, "1f1b pp=2 microbatches=2", str(tmp_path))
    names = json.loads((tmp_path / "half" / "state.json").read_text())["names"]
    assert names["embedding.weight"] == ["embedding.weight", "head.weight"]
    assert "head.weight" not in names
