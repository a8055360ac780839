"""A plan that no executor would run is not priced either: the same sentence from both."""

import pytest
import torch

import meshwright as mw
from meshwright.parallel.apply import refuse_storage
from meshwright.plan import Plan

BLUEPRINT = mw.inspect("gpt:layers=4,hidden=64,heads=4,vocab=256", seq=64, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize(
    "text",
    [
        "ddp offload=params:cpu",
        "1f1b pp=2 microbatches=8 update=backward clip=delayed",
        "fsdp precision=bf16 clip=two_pass",
        "fsdp precision=fp16 master=kahan",
        "fsdp precision=fp16 update=backward",
    ],
)
def test_contradictions(text: str) -> None:
    plan = Plan.parse(text, 2)
    with pytest.raises(mw.PlanError) as run:
        refuse_storage(plan)
    with pytest.raises(mw.PlanError) as predicted:
        mw.predict(BLUEPRINT, mw.Cluster.parse("2xA100-40GB"), plan, 8)
    assert str(run.value) == str(predicted.value)


def test_a_budget_below_the_minimum() -> None:
    with pytest.raises(mw.PlanError, match="at least"):
        mw.predict(BLUEPRINT, mw.Cluster.parse("2xA100-40GB"), "fsdp precision=bf16 recompute=budget=1K", 8)
