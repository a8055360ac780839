"""Activations on disk: the same numbers, to the bit, with every way of running a block; room is used again, and nothing stays."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recompute import trained
from torch import nn

import meshwright as mw
import ranks
from meshwright.errors import PlanError
from parity import assert_same_as_single_device

PLANS = [
    ("drop", "single", 1),
    pytest.param("drop", "single recompute=full", 1, marks=pytest.mark.slow),
    ("drop", "single recompute=selective", 1),
    pytest.param("net", "single microbatches=2", 1, marks=pytest.mark.slow),
    ("drop", "fsdp", 2),
    pytest.param("drop", "tp recompute=full", 2, marks=pytest.mark.slow),
    pytest.param("drop", "1f1b pp=2 microbatches=4", 2, marks=pytest.mark.slow),
    ("drop", "zero_bubble pp=2 microbatches=4 recompute=selective", 2),
]


@pytest.mark.parametrize(("kind", "plan", "world_size"), PLANS)
def test_the_numbers_are_the_same(tmp_path: Path, kind: str, plan: str, world_size: int) -> None:
    offloaded = f"{plan} offload=activations:nvme={tmp_path}"
    for (losses, state, _), (losses_0, state_0, _) in zip(
        ranks.run(world_size, trained, kind, offloaded), ranks.run(world_size, trained, kind, plan), strict=True
    ):
        assert losses == losses_0
        assert {k for k in state_0 if not torch.equal(state[k], state_0[k])} == set()
    assert not list(tmp_path.iterdir())


class Slow(nn.Module):
    """Makes storages that go at once, while the disk has time to write them: others come in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = torch.tanh(x @ self.weight) * x.sigmoid()
            time.sleep(0.005)
        return x


def test_a_storage_that_is_gone_is_not_taken_for_the_next_in_its_place(tmp_path: Path) -> None:
    losses = []
    for plan in ("single", f"offload=activations:nvme={tmp_path}"):
        torch.manual_seed(0)
        model = nn.Sequential(*(Slow() for _ in range(3)))
        engine = mw.parallelize(
            model, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=lambda out, _: out.square().mean()
        )
        losses.append([engine.step(torch.ones(50, 64)).loss for _ in range(3)])
    assert losses[0] == losses[1]


class Gates(nn.Module):
    """A recurrent layer writes its gates one after another into parts of one storage, and saves each part when it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(24, 24, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x)[0]


def test_parts_of_a_storage_that_are_written_one_after_another(tmp_path: Path) -> None:
    results = []
    for plan in ("single", f"offload=activations:nvme={tmp_path}"):
        torch.manual_seed(0)
        model = nn.Sequential(*(Gates() for _ in range(3)))
        engine = mw.parallelize(
            model, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=lambda out, _: out.square().mean()
        )
        results.append([engine.step(torch.ones(32, 6, 24)).grad_norm for _ in range(3)])
    assert results[0] == results[1]


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def engine_of(plan: str) -> Any:
    torch.manual_seed(0)

    def loss(out: torch.Tensor, _: Any) -> torch.Tensor:
        time.sleep(0.1)  # by then the disk is done
        return out.square().mean()

    return mw.parallelize(Wide(), plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=loss)


@pytest.mark.parametrize("fraction", ["", "@0.5"])
def test_each_storage_goes_out_once_and_its_room_is_used_again(tmp_path: Path, fraction: str) -> None:
    engine = engine_of(f"offload=activations:nvme={tmp_path}{fraction}")
    x = torch.randn(100, 64)
    engine.step(x)
    offload = engine._applied.recompute.offload
    disk = offload._ends[0][1].disk
    before, end = offload.written_bytes, disk._end
    engine.step(x)
    gc.collect()
    # A block saves its input, the GELU's and the second product's.
    each = 100 * (64 + 256 + 256) * 4
    assert offload.written_bytes - before == each * (3 if fraction else 6) - x.nbytes  # the batch stays
    assert disk._end == end
    assert disk.read_back > 0


def test_what_has_come_back_goes_when_its_block_is_done(tmp_path: Path) -> None:
    engine = engine_of(f"offload=activations:nvme={tmp_path}")
    alive = 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    disk = engine._applied.recompute.offload._ends[0][1].disk
    read = disk.read

    def counted(slot: Any, tensor: torch.Tensor) -> Any:
        nonlocal alive
        alive += tensor.nbytes
        weakref.finalize(tensor.untyped_storage(), gone, tensor.nbytes)
        return read(slot, tensor)

    disk.read = counted
    seen = []
    engine.module.blocks[0].register_full_backward_hook(lambda *_: seen.append(alive))
    engine.step(torch.randn(100, 64))
    each = 100 * (64 + 256 + 256) * 4
    assert 0 < seen[0] <= 3 * each  # of six blocks


def test_split_backwards_need_recompute(tmp_path: Path) -> None:
    with pytest.raises((PlanError, ranks.RankFailed), match="weights' gradients"):
        ranks.run(2, trained, "drop", f"zero_bubble pp=2 microbatches=4 offload=activations:nvme={tmp_path}")


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such directory"):
        engine_of(f"offload=activations:nvme={tmp_path}/none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host is elsewhere there")
def test_the_host_of_a_cpu_is_where_they_are() -> None:
    with pytest.warns(UserWarning, match="offload") as warned:
        engine_of("offload=activations:cpu").step(torch.randn(4, 64))
    (only,) = [str(each.message) for each in warned if "offload" in str(each.message)]
    assert "is there already and stays" in only


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "hf-gpt2", "encoder-decoder", "resnet", "unused"])
def test_same_as_single_device(tmp_path: Path, name: str) -> None:
    assert_same_as_single_device(name, f"ddp recompute=selective offload=activations:nvme={tmp_path}", 2)
