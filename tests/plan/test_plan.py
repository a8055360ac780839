"""A plan's text round-trips, resolves to the ranks at hand, and refuses in one sentence."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan import AUTO, NAMED_PLANS, Plan

degrees = st.integers(0, 64)


def legal(schedule: str, virtual: int, **fields) -> Plan:
    virtual = {"interleaved": virtual, "zbv": 2}.get(schedule, 1)
    return Plan(schedule=schedule, virtual=virtual, **fields)


plans = st.builds(
    legal,
    dp_replicate=degrees,
    dp_shard=degrees,
    zero=st.integers(1, 3),
    tp=degrees,
    sp=st.booleans(),
    cp=degrees,
    pp=degrees,
    ep=degrees,
    schedule=st.sampled_from(["1f1b", "gpipe", "interleaved", "zbv"]),
    virtual=st.integers(1, 8),
    microbatches=st.integers(0, 64),
    recompute=st.sampled_from(["none", "selective", "full", "budget=8GB"]),
    offload=st.sampled_from(
        ["none", "optimizer:cpu", "optimizer:nvme=/scratch/x,params:cpu", "activations:cpu@0.5,activations:nvme=/s@.25"]
    ),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    compile=st.booleans(),
)


@given(plans)
def test_text_and_json_round_trip(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    assert Plan.from_json(json.dumps(plan.to_json())) == Plan.from_json(plan.to_json()) == plan


@given(plans, st.randoms())
def test_order_of_items_does_not_matter(plan: Plan, random) -> None:
    items = str(plan).split()
    random.shuffle(items)
    assert Plan.parse(" ".join(items)) == plan


@given(plans, st.integers(1, 4096))
def test_resolving_fills_every_degree_or_refuses(plan: Plan, world_size: int) -> None:
    try:
        resolved = plan.resolve(world_size)
    except PlanError:
        fixed = math.prod(d for n in ("dp_replicate", "dp_shard", "tp", "cp", "pp") if (d := getattr(plan, n)) != AUTO)
        open_degrees = AUTO in (plan.dp_replicate, plan.dp_shard, plan.tp, plan.cp, plan.pp)
        assert world_size % fixed or (not open_degrees and fixed != world_size)
        return
    assert resolved.degree_product() == world_size
    assert resolved.resolve(world_size) == resolved


@pytest.mark.parametrize("name", NAMED_PLANS)
def test_named_plans_round_trip_and_resolve(name: str) -> None:
    plan = Plan.parse(name)
    assert Plan.parse(str(plan)) == plan
    ranks = 1 if name in ("single", "dp") else 4
    assert plan.resolve(ranks).degree_product() == ranks


def test_named_plans_mean_what_the_field_means() -> None:
    assert Plan.parse("ddp", 4) == Plan(dp_replicate=4)
    assert Plan.parse("zero1", 4) == Plan(dp_shard=4, zero=1)
    assert Plan.parse("zero2", 4) == Plan(dp_shard=4, zero=2)
    assert Plan.parse("fsdp", 4) == Plan.parse("zero3", 4) == Plan(dp_shard=4, zero=3)
    assert Plan.parse("hsdp", 8) == Plan(dp_replicate=2, dp_shard=4)
    assert Plan.parse("fsdp precision=bf16 microbatches=2", 2) == Plan(dp_shard=2, precision="bf16", microbatches=2)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("fsd", ["'fsd'", "'fsdp'"]),
        ("dp fsdp", ["takes no other axis"]),
        (3, ["not 3"]),  # type: ignore[list-item]
        ("dp_shrad=2", ["'dp_shrad'", "'dp_shard'"]),
        ("dp_shard=x", ["dp_shard=x"]),
        ("dp_shard=0", ["dp_shard=0"]),
        ("zero=4", ["zero=4", "1, 2 or 3"]),
        ("precision=fp31", ["fp31", "fp32"]),
        ("sp=yes", ["sp=yes", "on nor off"]),
        ("offload=disk", ["offload=disk"]),
        ("offload=optimizer:cpu@1.5", ["@1.5", "up to 1"]),
        ("offload=optimizer:cpu@0.0", ["above 0"]),
        ("offload=optimizer:nvme=/with space", ["no space", "link"]),
        ("offload=optimizer:nvme=/a,b", ["no space, comma or @", "link"]),
        ("offload=optimizer:nvme=/a@b", ["up to 1"]),
        ("recompute=budget=1.5G", ["1500M"]),
        ("recompute=budget=\u0967", ["1500M"]),
        ("offload=params:cpu@0.7,params:nvme=/s@0.4", ["1.1 of params"]),
        ("recompute=all", ["recompute=all"]),
    ],
)
def test_wrong_text_is_refused_with_the_value_and_the_nearest(text: str, names: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message


@pytest.mark.parametrize(
    ("text", "ranks", "hint"), [("dp_shard=3", 4, "dp_shard=4"), ("single", 2, "ddp"), ("tp=3 dp_shard=auto", 4, "3")]
)
def test_a_plan_that_does_not_fit_names_the_nearest_that_does(text: str, ranks: int, hint: str) -> None:
    with pytest.raises(PlanError, match=hint):
        Plan.parse(text, ranks)


def test_experts_take_the_data_axes() -> None:
    assert Plan.parse("ep", 8) == Plan(dp_shard=8, ep=8)
    assert Plan.parse("ep tp=2", 8).ep == 4


def test_there_must_be_ranks() -> None:
    with pytest.raises(PlanError, match="0 ranks"):
        Plan.parse("fsdp", 0)


def test_what_is_no_saved_plan_is_refused() -> None:
    for data in ({"width": 3}, "[", {"tp": "2"}):
        with pytest.raises(PlanError):
            Plan.from_json(data)  # type: ignore[arg-type]


def test_plans_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().tp = 2  # type: ignore[misc]


def test_named_pipelines_expand_for_the_ranks_at_hand() -> None:
    assert Plan.parse("1f1b", 4) == Plan(pp=4, microbatches=16)
    assert Plan.parse("gpipe microbatches=6", 2) == Plan(pp=2, schedule="gpipe", microbatches=6)
    assert Plan.parse("layerwise", 3) == Plan(pp=3, schedule="layerwise")
    assert Plan.parse("interleaved", 2) == Plan(pp=2, schedule="interleaved", virtual=2, microbatches=8)
    assert Plan.parse("virtual=3 interleaved", 2).virtual == 3
    assert Plan.parse("zbv dp_replicate=2", 4) == Plan(dp_replicate=2, pp=2, schedule="zbv", virtual=2, microbatches=8)
    assert Plan.parse("3d", 8) == Plan(dp_shard=2, tp=2, pp=2, microbatches=8)
    assert Plan.parse("3d", 12) == Plan(dp_shard=3, tp=2, pp=2, microbatches=8)
    assert Plan.parse("1f1b", 1) == Plan()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("pp=4 schedule=zbv microbatches=8", ["virtual=1", "virtual=2"]),
        ("pp=4 schedule=gpipe virtual=2 microbatches=8", ["virtual=2", "virtual=1", "looped_bfs"]),
        ("pp=4 schedule=1f1b virtual=2", ["virtual=2", "virtual=1", "interleaved"]),
        ("pp=2 schedule=layerwise microbatches=4", ["microbatches=4", "microbatches=1", "gpipe"]),
        ("pp=4 schedule=dualpipev virtual=2 microbatches=7", ["microbatches=7", "microbatches=8", "zbv"]),
        ("pp=4 split=3,3,2 microbatches=4", ["split=3,3,2", "3 stages", "has 4"]),
        ("pp=2 split=3,", ["split=3,", "balanced"]),
    ],
)
def test_a_pipeline_that_its_schedule_cannot_run_is_refused_with_the_nearest_that_it_can(text: str, names: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert all(name in str(caught.value) for name in names), caught.value
    assert "\n" not in str(caught.value)


def test_a_schedule_that_fits_only_some_pipelines_is_refused_when_the_ranks_are_known() -> None:
    plan = Plan.parse("dualpipev microbatches=6")
    assert plan.resolve(3).pp == 3
    with pytest.raises(PlanError, match="microbatches=8"):
        plan.resolve(4)
