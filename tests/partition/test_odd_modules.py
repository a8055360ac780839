"""Odd modules compute under tensor and context parallelism what they compute on one device, or are refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from odd import compare
from odd_modules import CASES

import meshwright as mw
import ranks

pytestmark = pytest.mark.slow

WITHOUT_SEQUENCE = {"cumulativeaverage", "cutstatistics"}


def under(name: str, plan: str) -> dict[str, float] | str:
    return compare(CASES[name], plan)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", ["tp=2", "cp=2"])
def test_same_as_single_device(name: str, plan: str) -> None:
    found = ranks.run(2, under, name, plan)[0]
    if plan == "cp=2" and name in WITHOUT_SEQUENCE:
        assert isinstance(found, str)
        assert found.startswith("PlanError: cp=2: the batch has no sequence")
    else:
        assert not found


@pytest.mark.parametrize("name", ["plain", "setfirst", "slots", "scaledproduct", "every_second"])
def test_same_under_sequence_parallelism(name: str) -> None:
    assert not ranks.run(2, under, name, "tp=2 sp=on")[0]


@pytest.mark.parametrize("name", ["hooksonblocks", "returnsitsparameters"])
def test_same_with_parameters_sharded_too(name: str) -> None:
    assert not ranks.run(4, under, name, "dp_shard=2 tp=2 zero=3")[0]


def drawn(plan: str) -> tuple[float, float]:
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
    model, batch = torch.nn.Sequential(*layers), torch.randn(6, 8)
    engine = mw.parallelize(model, plan, loss_fn=lambda output, batch: output.square().mean(), example_batch=batch)
    torch.manual_seed(torch.distributed.get_rank())
    return engine(batch).sum().item(), engine(batch).sum().item()


def test_ranks_of_tp_draw_the_same_by_hand_whatever_their_generators() -> None:
    first, second = ranks.run(2, drawn, "tp=2")
    assert first == second
    assert first[0] != first[1]
