"""A checkpoint that was saved under one plan continues the run exactly under any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import meshwright as mw
import parity
import ranks
import zoo
from meshwright.checkpoint import latest, prune, step_folder

PLANS = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "hsdp": 4, "zero3 precision=bf16": 2}
PLANS |= {"tp": 2, "2d tp=2": 4, "tp=2 cp=2": 4}


def _engine(plan: str, optimizer: str = "AdamW") -> mw.Engine:
    case = zoo.CASES["gpt-tied"]

    def build(params: Any) -> torch.optim.Optimizer:
        return parity.adamw(params) if optimizer == "AdamW" else getattr(torch.optim, optimizer)(params, lr=0.01)

    return mw.parallelize(
        zoo.build("gpt-tied"),
        plan,
        optimizer=build,
        loss_fn=case.loss,
        clip_grad_norm=0.5,
        lr_schedule=lambda s: 1 / (1 + s),
        example_batch=case.batch(0, 8),
    )


def _steps(engine: mw.Engine, first: int, last: int) -> list[float]:
    case = zoo.CASES["gpt-tied"]
    return [engine.step(parity.share(case.batch(step, 8), engine.data_rank, engine.data_ranks)).loss for step in range(first, last)]


def through(plan: str, folder: str, optimizer: str = "AdamW") -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = _engine(plan, optimizer)
    losses = _steps(engine, 0, 2)
    engine.save(Path(folder) / "half", {"position": 12})
    losses += _steps(engine, 2, 4)
    return losses, engine.full_state_dict()


def onward(plan: str, folder: str, optimizer: str = "AdamW") -> tuple[list[float], dict[str, torch.Tensor], Any]:
    engine = _engine(plan, optimizer)
    _steps(engine, 7, 8)  # whatever it did before is forgotten
    extra = engine.load(Path(folder) / "half")
    return _steps(engine, 2, 4), engine.full_state_dict(), (extra, engine.steps)


@pytest.mark.parametrize("before", ["single", "ddp", "zero2", "zero3", "hsdp", "tp", "2d tp=2"])
def test_any_plan_to_any_plan(before: str, tmp_path: Path) -> None:
    losses, weights = ranks.run(PLANS[before], through, before, str(tmp_path))[0]
    for after in ("single", "ddp", "zero1", "zero3", "hsdp", "tp", "2d tp=2", "tp=2 cp=2"):
        found, resumed, (extra, steps) = ranks.run(PLANS[after], onward, after, str(tmp_path))[0]
        assert extra == {"position": 12}
        assert steps == 4
        assert found == pytest.approx(losses[2:], rel=1e-9)
        for name, value in weights.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_resuming_under_the_same_plan_is_bit_equal(plan: str, tmp_path: Path) -> None:
    losses, weights = ranks.run(PLANS[plan], through, plan, str(tmp_path))[0]
    found, resumed, _ = ranks.run(PLANS[plan], onward, plan, str(tmp_path))[0]
    assert found == losses[2:]
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


@pytest.mark.parametrize(("before", "after"), [("zero3", "single"), ("single", "zero2"), ("zero1", "zero3")])
def test_optimizers_of_whole_matrices_travel_too(before: str, after: str, tmp_path: Path) -> None:
    losses, weights = ranks.run(PLANS[before], through, before, str(tmp_path), "Adafactor")[0]
    found, resumed, _ = ranks.run(PLANS[after], onward, after, str(tmp_path), "Adafactor")[0]
    assert found == pytest.approx(losses[2:], rel=1e-9)
    for name, value in weights.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-9, atol=1e-12)


def test_a_tied_weight_is_in_a_checkpoint_once(tmp_path: Path) -> None:
    ranks.run(2, through, "zero3", str(tmp_path))
    state = json.loads((tmp_path / "half" / "state.json").read_text())
    assert state["names"]["embedding.weight"] == ["embedding.weight", "head.weight"]
    assert "head.weight" not in state["names"]


def refuse(folder: str) -> list[str]:
    messages = []
    engine = _engine("single", "SGD")
    for path in (Path(folder) / "nothing", Path(folder) / "half"):
        try:
            engine.load(path)
        except mw.CheckpointError as error:
            messages.append(str(error))
    other = mw.parallelize(zoo.build("gpt"), "single", optimizer=parity.adamw)
    try:
        other.load(Path(folder) / "half")
    except mw.CheckpointError as error:
        messages.append(str(error))
    return messages


def test_what_is_no_checkpoint_of_this_run_is_refused_in_a_sentence(tmp_path: Path) -> None:
    ranks.run(1, through, "single", str(tmp_path))
    nothing, optimizer, model = ranks.run(1, refuse, str(tmp_path))[0]
    assert "not a complete checkpoint" in nothing
    assert "SGD" in optimizer
    assert "another model" in model
    assert all("\n" not in message for message in (nothing, optimizer, model))


def test_an_incomplete_folder_is_never_the_latest_and_is_cleaned_up(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder = step_folder(tmp_path, step)
        folder.mkdir()
        (folder / "state.json").write_text("{}")
    step_folder(tmp_path, 40).mkdir()
    (tmp_path / "step-50.partial").mkdir()
    assert latest(tmp_path) == tmp_path / "step-30"
    prune(tmp_path, keep=2)
    assert not (tmp_path / "step-10").exists()
    assert not (tmp_path / "step-50.partial").exists()
    assert latest(tmp_path) == tmp_path / "step-30"


class Counting(torch.optim.Optimizer):
    """A user's optimizer whose states are a Python number and a tensor of another shape than its parameter."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": torch.tensor(lr)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                mean = parameter.grad.reshape(-1, parameter.shape[-1]).mean(0)
                state["means"] = mean + state.get("means", 0.0)
                parameter.sub_((state["means"] / state["count"]).to(parameter.dtype), alpha=float(group["lr"]))


def custom(plan: str, folder: str, resume: bool) -> dict[str, torch.Tensor]:
    case = zoo.CASES["gpt"]
    engine = mw.parallelize(zoo.build("gpt"), plan, optimizer=Counting, loss_fn=case.loss)
    if resume:
        engine.load(folder)
    else:
        for step in range(2):
            engine.step(parity.share(case.batch(step, 8), engine.data_rank, engine.data_ranks))
        engine.save(folder)
    engine.step(parity.share(case.batch(2, 8), engine.data_rank, engine.data_ranks))
    return engine.full_state_dict()


@pytest.mark.parametrize(("before", "after"), [("single", "zero3"), ("zero2", "single"), ("zero3", "ddp")])
def test_a_users_own_optimizer_travels_with_its_numbers(before: str, after: str, tmp_path: Path) -> None:
    expected = ranks.run(PLANS[before], custom, before, str(tmp_path / "c"), False)[0]
    found = ranks.run(PLANS[after], custom, after, str(tmp_path / "c"), True)[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def save_badly(folder: str) -> list[str]:
    engine = mw.parallelize(zoo.build("gpt"), "ddp", optimizer=parity.adamw)
    messages = []
    for path, extra in (("results", {}), ("new", {("a", 1): 2}), ("/", {})):
        try:
            engine.save(Path(folder) / path, extra)
        except mw.CheckpointError as error:
            messages.append(str(error))
    (Path(folder) / "fine.old.partial").mkdir(exist_ok=True)
    engine.save(Path(folder) / "fine")
    engine.save(Path(folder) / "fine")
    return messages


def test_a_save_that_cannot_be_is_refused_by_every_rank_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("years of work")
    for messages in ranks.run(2, save_badly, str(tmp_path), limit_s=60):
        assert len(messages) == 3
    assert (tmp_path / "results" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "results"]


def load_damaged(folder: str) -> list[str]:
    engine = _engine("single")
    messages = []
    for path in sorted(Path(folder).iterdir()):
        try:
            engine.load(path)
        except mw.CheckpointError as error:
            messages.append(str(error))
    return messages


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    import shutil

    ranks.run(1, through, "single", str(tmp_path / "good"))
    bad = tmp_path / "bad"
    for name in ("list", "metadata", "shard", "state"):
        shutil.copytree(tmp_path / "good" / "half", bad / name)
    (bad / "list" / "state.json").write_text("[]")
    (bad / "state" / "state.json").write_text("{")
    (bad / "metadata" / "tensors" / ".metadata").write_bytes(b"garbage")
    for file in (bad / "shard" / "tensors").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:200])
    messages = ranks.run(1, load_damaged, str(bad))[0]
    assert len(messages) == 4
    assert all("\n" not in message for message in messages)


@pytest.mark.parametrize("inner", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("unexpected pos 7")])
def test_what_ends_a_save(inner: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is a failure, said in words; Ctrl-C is Ctrl-C. What was saved before stays."""
    engine = _engine("single")
    engine.save(tmp_path / "before")

    def fails(*_: object, **__: object) -> None:
        raise dcp.CheckpointException("write", {0: (inner, None)})  # type: ignore[arg-type, dict-item]

    monkeypatch.setattr(dcp, "save", fails)
    if isinstance(inner, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            engine.save(tmp_path / "after")
    else:
        with pytest.raises(mw.CheckpointError) as error:
            engine.save(tmp_path / "after")
        assert error.value.exit_code == 1
        assert str(inner.args[-1]) in str(error.value)
        assert "dict_keys" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["before"]
    _engine("single").load(tmp_path / "before")
