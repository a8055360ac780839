"""`auto` takes a plan that the executor runs on the model at hand, the same on every rank."""

from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
import ranks
import zoo
from meshwright.blueprint.sample import reading
from meshwright.parallel.auto import choose, choose_here, divides
from meshwright.plan import Plan


def _loss(case: zoo.Case) -> Any:
    def reading(module: nn.Module) -> Any:
        return lambda batch: case.loss(module(batch[0]), batch)

    return reading


@pytest.mark.parametrize(
    ("name", "plan", "can"),
    [
        ("gpt-tied", "tp=2", True),
        ("gpt-tied", "cp=2", True),
        ("gpt-tied", "pp=2 microbatches=2", True),
        ("gpt-tied", "pp=64 microbatches=64", False),
        ("resnet", "cp=2", False),
    ],
)
def test_a_model_is_asked_whether_it_can_be_cut(name: str, plan: str, can: bool) -> None:
    case = zoo.find(name)
    works = divides(zoo.build(name, torch.float64), zoo_batch(case), _loss(case))
    assert works(Plan.parse(plan)) == can


def zoo_batch(case: zoo.Case) -> Any:
    batch = case.batch(0, 4)
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)


def test_a_plan_that_the_model_refuses_is_not_taken() -> None:
    blueprint = mw.inspect("gpt:layers=2,hidden=64,heads=4,vocab=256", seq=64)
    held = "auto tp=2 dp_replicate=1 dp_shard=1"
    assert choose(blueprint, held, 2, 4, lambda plan: True)[0].tp == 2
    asked: list[Plan] = []
    plan, prediction = choose(blueprint, held, 2, 4, lambda plan: bool(asked.append(plan)))
    assert asked
    assert prediction is None
    assert plan.tp == 2  # what was asked for is left to the executor to refuse


def steps() -> tuple[str, float]:
    case = zoo.find("gpt-tied")
    engine = mw.parallelize(
        zoo.build("gpt-tied", torch.float64),
        "auto",
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        loss_fn=case.loss,
        count_fn=case.count,
        example_batch=case.batch(0, 4),
    )
    return str(engine.plan), float(engine.step(case.batch(0, 4)).loss)


def test_all_ranks_get_one_plan_and_train() -> None:
    found = ranks.run(2, steps)
    assert len({plan for plan, _ in found}) == 1
    assert mw.Plan.parse(found[0][0]).degree_product() == 2
    assert found[0][1] == found[1][1] > 0


def test_the_model_is_read_as_it_will_be_called() -> None:
    read: list[bool] = []

    def forward_fn(model: Any, batch: Any) -> torch.Tensor:
        read.append(True)
        return model(batch["left"], batch["right"])

    batch = {"left": torch.randn(4, 3), "right": torch.randn(4, 3)}
    choose_here(nn.Bilinear(3, 3, 2), "auto", batch, forward_fn, lambda output, _: output.square().mean())
    assert read
    works = divides(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), torch.randn(4, 4), reading(lambda m, b: m(b), lambda o, _: o.mean())
    )
    assert works(Plan.parse("tp=2"))
