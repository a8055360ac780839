"""Every plan of this version computes what one device computes, on every model of the zoo."""

import pytest
import torch

import zoo
from parity import assert_same_as_single_device

PLANS = [
    ("single", 1),
    ("dp", 1),
    ("ddp", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("hsdp", 4),
]


@pytest.mark.parametrize("name", zoo.CASES)
@pytest.mark.parametrize(("plan", "world_size"), PLANS)
def test_same_as_single_device(name: str, plan: str, world_size: int) -> None:
    assert_same_as_single_device(name, plan, world_size)


@pytest.mark.parametrize("name", ["gpt", "rows", "unused", "lora"])
@pytest.mark.parametrize(
    ("plan", "world_size"),
    [
        ("microbatches=3", 1),
        ("dp_replicate=2 microbatches=3", 2),
        ("dp_shard=2 zero=1 microbatches=2", 2),
        ("dp_shard=2 zero=2 microbatches=3", 2),
        ("dp_shard=2 zero=3 microbatches=3", 2),
        ("dp_shard=4 zero=3", 4),
        ("dp_shard=4 zero=2", 4),
        ("dp_replicate=2 dp_shard=2 zero=1", 4),
        ("dp_replicate=2 dp_shard=2 zero=2 microbatches=2", 4),
        ("dp_replicate=2 dp_shard=2 zero=3 microbatches=2", 4),
    ],
)
def test_same_with_accumulation_and_both_axes(name: str, plan: str, world_size: int) -> None:
    assert_same_as_single_device(name, plan, world_size)


@pytest.mark.parametrize(("plan", "world_size"), [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_same_in_float32(plan: str, world_size: int) -> None:
    assert_same_as_single_device("gpt-tied", plan, world_size, torch.float32)
