"""What can't be stored or updated so is refused in one sentence that says what to do."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import meshwright as mw
import ranks


def _engine(plan: str, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **keywords: object) -> mw.Engine:
    return mw.parallelize(
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)),
        plan,
        optimizer=lambda params: optimizer(params, lr=0.01),
        loss_fn=lambda output, batch: output.square().mean(),
        **keywords,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("plan", "part"),
    [
        ("single offload=optimizer:nvme=/nowhere/at/all", "no such directory"),
        ("master=kahan", "precision=bf16"),
        ("clip=delayed", "update=backward"),
        ("pp=2 update=backward microbatches=4", "pp=1"),
        ("update=backward precision=fp16", "two_pass"),
        ("zero1 offload=params:nvme={dir}", "zero=3"),
        ("dp_replicate=2 offload=params:nvme={dir}", "zero=3"),
        ("precision=fp8", "compute capability"),
    ],
)
def test_plans(plan: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(mw.PlanError) as error:
        _engine(plan.format(dir=tmp_path))
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_clipping_by_a_norm_that_comes_too_late() -> None:
    with pytest.raises(mw.PlanError, match=r"clip=two_pass.*clip=delayed"):
        _engine("update=backward", clip_grad_norm=1.0)


@pytest.mark.parametrize("plan", ["update=backward", "optimizer_state=int8", "offload=optimizer:nvme={dir}"])
def test_optimizers_that_may_read_a_whole_matrix(plan: str, tmp_path: Path) -> None:
    with pytest.raises(mw.ConfigError, match="elementwise"):
        _engine(plan.format(dir=tmp_path), torch.optim.Adafactor)


def test_a_loop_by_hand_does_not_say_which_backward_is_the_last() -> None:
    engine = _engine("update=backward")
    for call in (lambda: engine(torch.ones(2, 8)), engine.optimizer_step, engine.full_gradients):
        with pytest.raises(mw.ConfigError, match=r"engine\.step"):
            call()


@pytest.mark.parametrize("plan", ["update=backward", "update=backward clip=two_pass"])
def test_what_is_not_finite(plan: str) -> None:
    """Two passes leave every weight; one pass leaves those from the first bad gradient on, and says so."""
    bad = torch.full((2, 8), float("nan"))
    stops = _engine(plan)
    before = stops.full_state_dict()
    with pytest.raises(mw.TrainingError) as error:
        stops.step(bad)
    assert ("resume from the last checkpoint" in str(error.value)) == ("two_pass" not in plan)
    after = stops.full_state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # the first gradient was bad already
    skips = _engine(plan, on_nonfinite="skip")
    assert skips.step(bad).skipped
    assert not skips.step(torch.ones(2, 8)).skipped
    assert skips.steps == 1


def full_disk(folder: str) -> str:
    """What a run says whose disk refuses a write in mid-run."""
    engine = _engine(f"single offload=optimizer:nvme={folder}")
    engine.step(torch.ones(2, 8))
    engine.save(Path(folder) / "kept")
    shelf = engine.bound.shelf  # type: ignore[union-attr]
    disk = next(iter(shelf._disks.values()))

    move = disk._whole

    def refuse(call: Any, *where: int) -> None:
        if call is os.pwritev:
            raise OSError(28, os.strerror(28))
        move(call, *where)

    disk._whole = refuse
    try:
        for _ in range(3):
            engine.step(torch.ones(2, 8))
    except mw.TrainingError as error:
        again = _engine(f"single offload=optimizer:nvme={folder}")
        again.load(Path(folder) / "kept")
        assert again.steps == 1
        again.step(torch.ones(2, 8))
        return str(error)
    return ""


def test_a_disk_that_fills_up_stops_the_run_with_its_checkpoint_whole(tmp_path: Path) -> None:
    message = ranks.run(1, full_disk, str(tmp_path))[0]
    assert "is full" in message
    assert "\n" not in message
