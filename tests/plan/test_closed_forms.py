"""The planner's closed forms of pipelines agree with the simulator of the lists that the executor runs."""

import random

import pytest

from meshwright.plan import pipeline
from meshwright.plan.schedule import Schedule, build
from meshwright.plan.simulate import StageCost, in_flight_bytes, simulate

SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("looped_bfs", 2), ("zero_bubble", 1), ("zbv", 2), ("dualpipev", 2)]
SIZES = [(2, 4), (4, 8), (4, 16), (8, 16)]


def closed(schedule: Schedule, costs: list[StageCost]) -> float:
    held = [[costs[stage] for stage in schedule.stages_of(rank)] for rank in range(schedule.ranks)]
    parts = [
        [sum(getattr(c, name) for c in mine) for mine in held] for name in ("forward_s", "input_gradient_s", "weight_gradient_s")
    ]
    return pipeline.step(schedule.name, schedule.virtual, schedule.microbatches, *parts)


@pytest.mark.parametrize(("name", "virtual"), SCHEDULES)
@pytest.mark.parametrize(("ranks", "micro"), SIZES)
def test_equal_stages(name: str, virtual: int, ranks: int, micro: int) -> None:
    schedule = build(name, ranks, virtual, micro)
    for cost in (StageCost(1, 1, 1, 1 / virtual), StageCost(1, 1.25, 0.75, 1 / virtual)):
        costs = [cost] * schedule.stages
        assert closed(schedule, costs) == pytest.approx(simulate(schedule, costs).step_s, rel=0.01)
        flights = [pipeline.in_flight(name, virtual, ranks, micro, rank) for rank in range(ranks)]
        assert flights == pytest.approx(in_flight_bytes(schedule, costs)[1])


@pytest.mark.parametrize(("name", "virtual"), SCHEDULES)
def test_unequal_stages_come_within_a_tenth(name: str, virtual: int) -> None:
    draw = random.Random(0)
    for ranks, micro in SIZES:
        schedule = build(name, ranks, virtual, micro)
        costs = [StageCost(*(draw.uniform(0.7, 1.3) for _ in range(3))) for _ in range(schedule.stages)]
        assert closed(schedule, costs) == pytest.approx(simulate(schedule, costs).step_s, rel=0.1)
