"""Tensor, sequence and context parallelism compute what one device computes, or refuse by name."""

import re

import pytest

import families
import ranks
import zoo
from parity import assert_same_as_single_device

NO_SEQUENCE = "has no sequence that 2 ranks can divide"
REFUSED = {
    ("rows", "tp"): "tp=2 does not divide the 7 units of first.weight",
    ("recurrent", "cp"): r"lstm \(LSTM\) needs every position before the next",
    ("resnet", "cp"): NO_SEQUENCE,
    ("unused", "cp"): NO_SEQUENCE,
    ("rows", "cp"): NO_SEQUENCE,
    ("unet", "cp"): NO_SEQUENCE,
}
PLANS = [("tp", 2), ("tp sp=on", 2), ("cp=2 cp_attention=allgather", 2), ("2d tp=2", 4)]
WITH_ATTENTION = ["gpt", "gpt-learned", "hf-gpt2", "hf-llama", "encoder-decoder"]


def _refusal(name: str, plan: str) -> str | None:
    axes = [axis for axis in ("tp", "cp") if re.search(rf"\b{axis}\b", plan)]
    return next((REFUSED[name, axis] for axis in axes if (name, axis) in REFUSED), None)


@pytest.mark.parametrize("name", zoo.CASES)
@pytest.mark.parametrize(("plan", "world_size"), PLANS)
def test_same_as_single_device(name: str, plan: str, world_size: int) -> None:
    refusal = _refusal(name, plan)
    if refusal is None:
        assert_same_as_single_device(name, plan, world_size)
    else:
        with pytest.raises(ranks.RankFailed, match=f"PlanError: .*{refusal}"):
            assert_same_as_single_device(name, plan, world_size)


@pytest.mark.parametrize("name", WITH_ATTENTION)
@pytest.mark.parametrize(
    ("plan", "world_size"), [("cp=2 cp_attention=ring", 2), ("cp=2 cp_attention=ulysses", 2), ("tp=2 cp=2", 4)]
)
def test_same_with_every_attention(name: str, plan: str, world_size: int) -> None:
    assert_same_as_single_device(name, plan, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-tied", "hf-llama"])
@pytest.mark.parametrize(
    ("plan", "world_size"),
    [
        ("tp=4", 4),  # more ranks than key heads
        ("tp=4 sp=on", 4),
        ("cp=4", 4),
        ("dp_replicate=2 tp=2 microbatches=2", 4),
        ("dp_shard=2 zero=1 tp=2 sp=on", 4),
        ("dp_shard=2 zero=2 tp=2 microbatches=2", 4),
        ("dp_shard=2 zero=3 cp=2", 4),
        ("dp_shard=2 zero=2 cp=2 cp_attention=ring", 4),
        ("tp=2 cp=2 sp=on cp_attention=ring", 4),
    ],
)
def test_same_with_other_axes(name: str, plan: str, world_size: int) -> None:
    assert_same_as_single_device(name, plan, world_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "plan"),
    [*((family, "tp=2") for family in families.FAMILIES), *((family, "cp=2") for family in families.FAMILIES[:16])],
)
def test_families(family: str, plan: str) -> None:
    found = ranks.run(2, families.parity, family, plan)[0]
    if (family, plan) == ("vit", "cp=2"):
        assert NO_SEQUENCE in found["refused"]
        return
    single = family in families.SINGLE_PRECISION_INSIDE
    assert found["loss"] < (1e-7 if single else 1e-9), found
    assert found["norm"] < (1e-6 if single else 1e-9), found
    assert found["gradients"] < (5e-6 if single else 1e-9), found
    assert not found["missing"]
    assert plan == "cp=2" or found["cut"] > 0
