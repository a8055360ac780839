"""States in other forms and places, and updates inside the backward: the same numbers where the arithmetic is the same."""

import pytest

from parity import assert_same_as_single_device

PLANS = [
    ("single update=backward clip=two_pass", 1),
    ("ddp update=backward clip=two_pass", 2),
    ("zero1 update=backward clip=two_pass", 2),
    ("zero2 update=backward clip=two_pass microbatches=2", 2),
    ("fsdp update=backward clip=two_pass", 2),
    ("single offload=optimizer:nvme={dir}", 1),
    ("fsdp offload=optimizer:nvme={dir}@0.5", 2),
    ("single offload=params:nvme={dir}", 1),
    ("fsdp offload=params:nvme={dir}", 2),
    ("fsdp update=backward clip=two_pass microbatches=2 offload=params:nvme={dir}@0.6,optimizer:nvme={dir}", 2),
]


@pytest.mark.parametrize("name", ["gpt-tied", "unused", "rows"])
@pytest.mark.parametrize(("plan", "world_size"), PLANS)
def test_same_as_single_device(name: str, plan: str, world_size: int, tmp_path) -> None:
    assert_same_as_single_device(name, plan.format(dir=tmp_path), world_size)
