"""What a model keeps or changes beside its parameters, cut into stages: as on one device, or refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
import parity
import ranks


class Odd(nn.Module):
    """Four blocks, and one of several habits that only matter once they lie on different stages."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit, self.calls = habit, 0
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        habit = self.habit
        if habit == "a counter in Python":
            self.calls += 1
            x = x * (1 + 0.1 * self.calls)
        if habit == "a counter read on every stage":
            self.count += 1
        if habit == "Python that decides by what it counts":
            self.steps += 1
            x = x * 2 if self.steps > 1 else x
        if habit == "an average that is assigned":
            x = x + self.average
            self.average = self.average * 0.5 + x.detach().mean(0) * 0.5
        if habit == "an average read first and written last":
            x = x + self.average
        side = x * 1
        for number, layer in enumerate(self.layers):
            x = x + layer(x)
            if habit == "one norm for all blocks":
                x = self.norm(x)
            if habit == "a counter read on every stage":
                x = x / (1 + 0.1 * self.count)
            if habit == "written in place later" and number == 2:
                side.mul_(2.0)
            if habit == "a view of what is written later" and number == 0:
                part = side[:, :4]
            if habit == "a view of what is written later" and number == 2:
                side.mul_(2.0)
                x = torch.cat([x[:, :4] + part, x[:, 4:]], 1)
        if habit == "an average read first and written last":
            with torch.no_grad():
                self.average.mul_(0.5).add_(x.detach().mean(0))
        return {"x": x + side, "more": (x.sum(1), 3)}


def _model(habit: str) -> nn.Module:
    torch.manual_seed(0)
    return Odd(habit).double()


def _batch(step: int, rows: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(step)).double()


def _loss(output: Any, _: Any) -> Tensor:
    return (output["x"].square().mean(1) + 0.1 * output["more"][0]).mean()


def train(habits: tuple[str, ...], plan: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for habit in habits:
        try:
            engine = mw.parallelize(
                _model(habit), plan, optimizer=parity.adamw, loss_fn=_loss, example_batch=_batch(0, 8), clip_grad_norm=0.5
            )
            losses = [engine.step(_batch(step, rows)).loss for step, rows in enumerate((8, 7, 5))]
            losses.append(engine.evaluate(_batch(9, 8)).loss)
            output = engine.infer(_batch(9, 6))
            found[habit] = (losses, engine.full_state_dict(), engine.module.calls, output["x"], output["more"][1])
        except mw.MeshwrightError as error:
            found[habit] = str(error)
    return found


WORKS = ("a counter in Python", "a counter read on every stage", "an average that is assigned", "written in place later")
REFUSED = {
    "one norm for all blocks": "norm",
    "an average read first and written last": "the buffer average",
    "a view of what is written later": "under another name",
    "Python that decides by what it counts": "the buffer steps",
}


@pytest.mark.parametrize("plan", ["gpipe pp=2 microbatches=3", "interleaved pp=2 microbatches=3", "zbv pp=2 microbatches=3"])
def test_what_micro_batches_leave_in_the_model_is_as_on_one_device(plan: str) -> None:
    expected = ranks.run(1, train, WORKS, "single microbatches=3")[0]
    found = ranks.run(2, train, WORKS, plan)
    for habit in WORKS:
        assert not isinstance(found[0][habit], str), found[0][habit]
        losses, state, calls, output, number = expected[habit]
        assert found[0][habit][0] == pytest.approx(losses, rel=1e-9), habit
        for name, value in state.items():
            torch.testing.assert_close(found[0][habit][1][name], value, rtol=1e-9, atol=1e-12)
        for rank in found:
            assert (rank[habit][2], rank[habit][4]) == (calls, number), habit
            torch.testing.assert_close(rank[habit][3], output, rtol=1e-9, atol=1e-12)


def test_what_stages_can_not_share_is_refused_on_every_rank_before_the_first_step() -> None:
    for found in ranks.run(2, train, tuple(REFUSED), "1f1b pp=2 microbatches=2 split=2,2"):
        for habit, words in REFUSED.items():
            assert isinstance(found[habit], str), habit
            assert words in found[habit]
            assert "pp=1" in found[habit]
            assert "\n" not in found[habit]
