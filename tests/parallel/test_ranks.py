"""Ranks of `cp` hold what ranks of `dp_shard` hold: the mesh of a run and the planner's account of it agree."""

import math

import pytest

import ranks
from meshwright.parallel.ranks import build_ranks
from meshwright.plan import Plan


def sizes(text: str) -> dict[str, int]:
    found = build_ranks(Plan.parse(text))
    return {axis: found.size(axis) for axis in ("pp", "dp_replicate", "dp_shard", "tp", "cp", "data")}


@pytest.mark.parametrize(
    "text", ["dp_shard=2 cp=2", "dp_replicate=2 cp=2", "cp=2 tp=2", "cp=4", "cp=4 zero=1", "dp_replicate=2 dp_shard=2", "pp=2 cp=2"]
)
def test_the_planner_divides_states_over_the_ranks_that_do(text: str) -> None:
    plan = Plan.parse(text)
    for found in ranks.run(4, sizes, text):
        assert found["dp_shard"] == plan.shards
        assert found["cp"] == plan.cp
        assert math.prod(found[axis] for axis in ("pp", "dp_replicate", "dp_shard", "tp")) == 4
        assert found["data"] == found["dp_replicate"] * found["dp_shard"]
