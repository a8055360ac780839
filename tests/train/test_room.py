"""What a plan asks of disks and optimizers is refused before any rank is started."""

import dataclasses
from pathlib import Path

import pytest

from meshwright.cli.train import check
from meshwright.errors import ConfigError, MeshwrightError, PlanError
from meshwright.parallel import disk
from meshwright.train.config import Config, DataTable, ModelTable, OptimizerTable, PlanTable

SMALL = Config(model=ModelTable("gpt:layers=2,hidden=32,heads=2,vocab=256"), data=DataTable(sequence_length=32, global_batch=8))


def refused(plan: str, ranks: int, optimizer: str = "AdamW") -> str:
    config = dataclasses.replace(SMALL, plan=PlanTable(plan), optimizer=OptimizerTable(optimizer))
    with pytest.raises(MeshwrightError) as error:
        check(config, ranks)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, PlanError | ConfigError)
    return str(error.value)


@pytest.mark.parametrize("plan", ["single", "ddp", "zero1", "fsdp"])
def test_a_disk_that_is_short_for_all_ranks_together(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """35,136 parameters: 281 kB of Adam's states, of which a rank of two may have half; room for one such half is not enough."""
    monkeypatch.setattr(disk, "_free_bytes", lambda _: 200_000)
    ranks = 1 if plan == "single" else 2
    text = f"{plan} offload=optimizer:nvme={tmp_path}"
    assert f"nvme={tmp_path}" in refused(text, ranks)
    monkeypatch.setattr(disk, "_free_bytes", lambda _: 600_000)
    check(dataclasses.replace(SMALL, plan=PlanTable(text)), ranks)


@pytest.mark.parametrize("optimizer", ["Adafactor", "LBFGS", "Muon"])
def test_an_optimizer_that_is_not_elementwise(optimizer: str) -> None:
    assert optimizer in refused("single optimizer_state=int8", 1, optimizer)


def test_a_schedule_that_holds_on_to_activations(tmp_path: Path) -> None:
    said = refused(f"zero_bubble pp=2 microbatches=4 offload=activations:nvme={tmp_path}", 2)
    assert "recompute=selective" in said
