"""Checkpoints of states that are kept in another form or place: to and from any other plan."""

from pathlib import Path

import pytest
import torch

import ranks
from checkpoint.test_any_to_any import onward, through

EXACT = {
    "single offload=optimizer:nvme={dir}": 1,
    "zero1 offload=optimizer:nvme={dir}@0.5": 2,
    "fsdp offload=optimizer:nvme={dir}": 2,
    "fsdp update=backward clip=two_pass": 2,
    "ddp update=backward clip=two_pass": 2,
    "2d tp=2 update=backward clip=two_pass offload=optimizer:nvme={dir}": 4,
}
PLAIN = {"single": 1, "zero2": 2, "fsdp": 2}
SAME = EXACT | {
    "zero1 precision=bf16 master=kahan optimizer_state=bf16": 2,
    "fsdp precision=bf16 master=kahan": 2,
    "ddp precision=bf16 offload=optimizer:nvme={dir}": 2,
    "fsdp update=backward clip=delayed": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("before", EXACT)
def test_stored_to_plain_and_back(before: str, tmp_path: Path) -> None:
    plan, size = before.format(dir=tmp_path), EXACT[before]
    losses, weights = ranks.run(size, through, plan, str(tmp_path))[0]
    for after, world_size in (*PLAIN.items(), (plan, size)):
        found, resumed, _ = ranks.run(world_size, onward, after, str(tmp_path))[0]
        assert found == pytest.approx(losses[2:], rel=1e-9)
        for name, value in weights.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_plain_to_stored(tmp_path: Path) -> None:
    losses, weights = ranks.run(2, through, "zero2", str(tmp_path))[0]
    for after, world_size in EXACT.items():
        found, resumed, _ = ranks.run(world_size, onward, after.format(dir=tmp_path), str(tmp_path))[0]
        assert found == pytest.approx(losses[2:], rel=1e-9)
        for name, value in weights.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("text", SAME)
def test_resuming_under_the_same_plan_is_bit_equal(text: str, tmp_path: Path) -> None:
    plan = text.format(dir=tmp_path)
    losses, weights = ranks.run(SAME[text], through, plan, str(tmp_path))[0]
    found, resumed, _ = ranks.run(SAME[text], onward, plan, str(tmp_path))[0]
    assert found == losses[2:]
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "NAdam", "ASGD", "Rprop"])
def test_every_elementwise_optimizer_travels(optimizer: str, tmp_path: Path) -> None:
    losses, weights = ranks.run(2, through, f"fsdp offload=optimizer:nvme={tmp_path}", str(tmp_path), optimizer)[0]
    found, resumed, _ = ranks.run(1, onward, "single", str(tmp_path), optimizer)[0]
    assert found == pytest.approx(losses[2:], rel=1e-9)
    for name, value in weights.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-9, atol=1e-12)


def test_from_disk_to_memory_and_back(tmp_path: Path) -> None:
    away = f"fsdp update=backward clip=two_pass offload=params:nvme={tmp_path},optimizer:nvme={tmp_path}"
    losses, weights = ranks.run(2, through, away, str(tmp_path))[0]
    for plan, size in (("zero1", 2), (away, 2)):
        found, resumed, _ = ranks.run(size, onward, plan, str(tmp_path))[0]
        assert found == pytest.approx(losses[2:], rel=1e-9)
        for name, value in weights.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-9, atol=1e-12)
