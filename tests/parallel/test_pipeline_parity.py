"""A pipeline computes what one device computes: every schedule, models of every kind, together with the other axes."""

import pytest
import torch

import zoo
from parity import assert_same_as_single_device

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("name", ["gpt-8", "encoder-decoder-8", "unet"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_on_two_ranks(name: str, schedule: str) -> None:
    assert_same_as_single_device(name, f"{schedule} pp=2", 2)


@pytest.mark.parametrize("schedule", [*SCHEDULES[:-1], "dualpipev microbatches=8"])
def test_every_schedule_on_four_ranks(schedule: str) -> None:
    assert_same_as_single_device("gpt-8", f"{schedule} pp=4", 4)


@pytest.mark.parametrize("name", CUTTABLE)
def test_every_model_with_two_cut_points(name: str) -> None:
    assert_same_as_single_device(name, "1f1b pp=2 microbatches=3", 2)


@pytest.mark.parametrize("name", ["unet", "encoder-decoder-8", "hf-t5"])
def test_messages_that_jump_over_stages(name: str) -> None:
    assert_same_as_single_device(name, "1f1b pp=4 microbatches=3", 4)


@pytest.mark.parametrize("name", ["gpt-8", "encoder-decoder-8", "unet", "hf-llama"])
@pytest.mark.parametrize(
    "plan",
    [
        "1f1b pp=2 dp_replicate=2 microbatches=2",
        "1f1b pp=2 dp_shard=2 zero=1 microbatches=2",
        "zero_bubble pp=2 dp_shard=2 zero=2 microbatches=2",
        "1f1b pp=2 dp_shard=2 zero=3 microbatches=2",
    ],
)
def test_with_data_parallelism(name: str, plan: str) -> None:
    assert_same_as_single_device(name, plan, 4)


@pytest.mark.parametrize("name", ["gpt-8", "encoder-decoder-8", "hf-llama"])
@pytest.mark.parametrize("plan", ["1f1b pp=2 tp=2 microbatches=2", "zero_bubble pp=2 tp=2 sp=on microbatches=2"])
def test_with_tensor_parallelism(name: str, plan: str) -> None:
    assert_same_as_single_device(name, plan, 4)


@pytest.mark.parametrize("name", ["gpt-8", "encoder-decoder-8"])
def test_three_axes_on_eight_ranks(name: str) -> None:
    assert_same_as_single_device(name, "3d dp_shard=2 tp=2 pp=2 microbatches=2", 8)


def test_with_context_parallelism() -> None:
    assert_same_as_single_device("gpt-8", "1f1b pp=2 cp=2 microbatches=2", 4)


@pytest.mark.parametrize("split", ["split=1,7", "split=blocks.6"])
def test_cut_where_the_user_says(split: str) -> None:
    assert_same_as_single_device("gpt-8", f"1f1b pp=2 microbatches=2 {split}", 2)


def test_more_micro_batches_than_rows() -> None:
    assert_same_as_single_device("gpt-8", "1f1b pp=2 microbatches=16", 2)


def test_in_float32() -> None:
    assert_same_as_single_device("gpt-tied", "zero_bubble pp=2 microbatches=4", 2, torch.float32)
