"""A pipeline computes what one device computes: every schedule, models of every kind, together with the other axes.

The whole matrix, and 35 Hugging Face families, are `benchmarks/pipeline_parity.py`'s; here is a choice of it.
"""

import pytest
import torch

import families
import ranks
import zoo
from parity import assert_same_as_single_device

SCHEDULES = [
    "layerwise",
    "gpipe microbatches=4",
    "1f1b microbatches=3",
    "interleaved microbatches=4",
    "looped_bfs microbatches=3",
    "zero_bubble microbatches=4",
    "zero_bubble virtual=2 microbatches=4",
    "zbv microbatches=4",
    "dualpipev microbatches=4",
]
CUTTABLE = [name for name in zoo.CASES if name not in ("recurrent", "rows")]


DEEP = ["gpt-8", "encoder-decoder-8", "unet-8", "hf-llama-8", "hf-t5-8"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_on_two_ranks(schedule: str) -> None:
    assert_same_as_single_device("gpt-8", f"{schedule} pp=2", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP[1:])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_on_other_models(name: str, schedule: str) -> None:
    assert_same_as_single_device(name, f"{schedule} pp=2", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP[:3])
@pytest.mark.parametrize("schedule", [*SCHEDULES[:-1], "dualpipev microbatches=8"])
def test_every_schedule_on_four_ranks(name: str, schedule: str) -> None:
    assert_same_as_single_device(name, f"{schedule} pp=4", 4, rows=9)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUTTABLE)
def test_every_model_with_two_cut_points(name: str) -> None:
    assert_same_as_single_device(name, "1f1b pp=2 microbatches=3", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_architectures_of_hugging_face(name: str) -> None:
    found = ranks.run(2, families.parity, name, "1f1b pp=2 microbatches=3", 4)[0]
    assert "refused" not in found, found
    assert not found["missing"]
    bound = 1e-5 if name in families.SINGLE_PRECISION_INSIDE else 1e-9
    assert max(found["loss"], found["norm"], found["gradients"]) < bound, found["worst"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "encoder-decoder-8", "hf-t5"])
def test_messages_that_jump_over_stages(name: str) -> None:
    assert_same_as_single_device(name, "1f1b pp=4 microbatches=3", 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize(
    "plan",
    [
        "1f1b pp=2 dp_replicate=2 microbatches=2",
        "1f1b pp=2 dp_shard=2 zero=1 microbatches=2",
        "zero_bubble pp=2 dp_shard=2 zero=2 microbatches=2",
        "interleaved pp=2 dp_shard=2 zero=3 microbatches=2",
        "1f1b pp=2 tp=2 microbatches=2",
        "zero_bubble pp=2 tp=2 sp=on microbatches=2",
    ],
)
def test_with_another_axis(name: str, plan: str) -> None:
    assert_same_as_single_device(name, plan, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_three_axes_on_eight_ranks(name: str) -> None:
    assert_same_as_single_device(name, "3d dp_shard=2 tp=2 pp=2 microbatches=2", 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-8", "encoder-decoder-8", "hf-t5-8"])
def test_with_context_parallelism(name: str) -> None:
    assert_same_as_single_device(name, "1f1b pp=2 cp=2 microbatches=2", 4)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["split=1,7", "split=blocks.6"])
def test_cut_where_the_user_says(split: str) -> None:
    assert_same_as_single_device("gpt-8", f"1f1b pp=2 microbatches=2 {split}", 2)


@pytest.mark.slow
def test_in_float32() -> None:
    assert_same_as_single_device("gpt-tied", "zero_bubble pp=2 microbatches=4", 2, torch.float32)
