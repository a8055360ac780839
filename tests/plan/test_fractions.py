"""What a plan moves is the least that fits: one hundredth less does not, it is no slower than all of it, and hosts hold it."""

import dataclasses
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import SPECS, enumerated

import meshwright as mw
from meshwright.blueprint.record import Blueprint
from meshwright.plan.advice import OTHER, SAME
from meshwright.plan.fractions import PARAMETERS, WAYS, lighter, onto_disk, open_state, parted, settled, ways
from meshwright.plan.plan import Plan, offloads
from meshwright.plan.predict import Pricer


@cache
def blueprint(kind: str) -> Blueprint:
    return mw.inspect(SPECS[kind], dtype=torch.bfloat16, device="cuda")


def cluster(text: str, host: float = 128e9) -> mw.Cluster:
    where = mw.Cluster.parse(text)
    return dataclasses.replace(where, device=dataclasses.replace(where.device, host_memory_bytes=host))


LAYOUTS = [
    "microbatches=2",
    "dp_shard=4 zero=3 microbatches=2",
    "dp_shard=2 zero=1 tp=2 sp=on",
    "dp_shard=2 pp=2 microbatches=4",
    "dp_replicate=2 dp_shard=2 update=backward clip=delayed",
    "microbatches=2 master=stochastic optimizer_state=int8",
]


def devices(layout: str) -> int:
    return 4 if "2" in layout.replace("microbatches=2", "") or "4" in layout else 1


@settings(max_examples=80, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    way=st.sampled_from([*WAYS, *PARAMETERS]),
    recompute=st.sampled_from(["none", "full"]),
    room=st.floats(0.0, 1.0),
    host=st.sampled_from([0.2e9, 0.6e9, 1.5e9, 128e9]),
)
def test_the_least_fits_and_a_hundredth_less_does_not(layout: str, way: str, recompute: str, room: float, host: float) -> None:
    plan = Plan.parse(f"{layout} precision=bf16 recompute={recompute}")
    if open_state(way) is None or way not in ways(plan.pp, plan.dp_shard, plan.zero, devices(layout)):
        return
    where = cluster(f"{devices(layout)}xA100-40GB", host)

    def price(offload: str) -> mw.Prediction:
        return mw.predict(blueprint("wide"), where, dataclasses.replace(plan, offload=offload), 8)

    ends = price("none").device_bytes, price(way).device_bytes
    # Somewhere between what all of it and nothing of it take, and not to the byte where a hundredth would just fit.
    memory = min(ends) + (0.0047 + 0.99 * room) * abs(ends[0] - ends[1])
    where = dataclasses.replace(where, device=dataclasses.replace(where.device, memory_bytes=int(memory)))
    pricer = Pricer.of(blueprint("wide"), where, "bf16")
    whole = dataclasses.replace(plan, offload=way)
    found = settled(pricer, whole, pricer.items(plan, 8))
    tried = [parted(way, hundredths) for hundredths in range(1, 101)]
    if found is None:
        assert not any(price(text).fits for text in ("none", *tried))
        return
    assert price(found.offload).fits
    assert price(found.offload).step_seconds <= price(way).step_seconds
    if found.offload in tried:  # the first of them, and nothing fits with one state less
        place = tried.index(found.offload)
        assert not any(price(text).fits for text in (lighter(way), *tried[:place]))


def test_texts_of_ways() -> None:
    both = PARAMETERS[1]
    assert (open_state(both), lighter(both), parted(both, 7)) == (
        "params",
        "optimizer:cpu,activations:cpu",
        "optimizer:cpu,params:cpu@0.07,activations:cpu",
    )
    assert lighter("optimizer:cpu") == "none"
    assert open_state("activations:cpu") is None
    assert all(str(item) == text for text in ("optimizer:cpu@0.5", "params:nvme=/x") for item in offloads(text))
    assert ways(1, 1, 3, 1) == ways(1, 4, 3, 8) == WAYS + PARAMETERS
    assert ways(1, 1, 3, 8) == ways(1, 8, 2, 8) == ways(2, 4, 3, 8) == WAYS


@pytest.mark.parametrize("host", [0.15e9, 0.4e9, 128e9])
@pytest.mark.parametrize(("where", "memory"), [("1", 1.9), ("1", 2.3), ("2", 1.9), ("2", 2.1)])
def test_search_is_exact_where_hosts_are_small(where: str, memory: float, host: float) -> None:
    here = cluster(f"{where}xA100-40GB,memory={memory}", host)
    count, seconds = enumerated(Pricer.of(blueprint("dense"), here, "bf16"), int(where), 8, {})
    if not seconds:
        with pytest.raises(mw.PlanError):
            mw.search(blueprint("dense"), here, 8, advise=False)
        return
    found = mw.search(blueprint("dense"), here, 8, top=5)
    assert [c.step_seconds for c in found.candidates] == pytest.approx(seconds[:5])
    assert found.searched == count == sum(found.rejected.values()) + len(found.candidates)
    assert all(c.fits and c.host_bytes <= host for c in found.candidates)


def test_fixed_forms_of_states_are_searched_with_fractions() -> None:
    fixed = {"optimizer_state": "int8", "master": "stochastic", "update": "backward"}
    where = cluster("1xA100-40GB,memory=3")
    found = mw.search(blueprint("wide"), where, 64, fixed=fixed)
    for candidate in found.candidates:
        assert {"optimizer_state=int8", "master=stochastic", "update=backward"} <= set(candidate.plan.split())
        assert mw.predict(blueprint("wide"), where, candidate.plan, 64).fits
    assert any("@0." in candidate.plan for candidate in found.candidates)
    with pytest.raises(mw.PlanError, match="pp=2"):
        mw.search(blueprint("wide"), where, 64, fixed={"update": "backward", "pp": 2})


@pytest.mark.parametrize(("memory", "host"), [(1.75, 128e9), (2.1, 0.1e9), (2.6, 0.3e9), (1.8, 0.3e9)])
def test_what_would_do_is_predicted_to_fit(memory: float, host: float) -> None:
    where = cluster(f"1xA100-40GB,memory={memory}", host)
    with pytest.raises(mw.PlanError) as caught:
        mw.search(blueprint("wide"), where, 8)
    sentences = str(caught.value).split(". ")
    here = [sentence for sentence in sentences if sentence.startswith("Here")]
    assert len(sentences) > 1
    assert "\n" not in str(caught.value)
    for sentence in here:
        text = re.search(r": ([^:]*=.*) would do", sentence)
        assert text is not None
        found = mw.predict(blueprint("wide"), where, text[1], 8)
        assert found.fits
        assert ("with the same numbers" in sentence) != any(part in text[1] for part in ("optimizer_state", "master"))
        if "nvme" in text[1]:
            assert f"{found.disk_bytes / 1e9:,.1f} GB for each device on a disk at DIR" in sentence


def test_hosts_are_filled_before_disks() -> None:
    where = cluster("1xA100-40GB,memory=2.3", 0.3e9)
    pricer = Pricer.of(blueprint("wide"), where, "bf16")
    plan = Plan.parse("precision=bf16 recompute=full update=backward offload=optimizer:nvme=/x,params:nvme=/x")
    spread = onto_disk(pricer, plan, 8)
    found = mw.predict(blueprint("wide"), where, spread, 8)
    assert found.fits
    assert 0.9 * 0.3e9 < found.host_bytes <= 0.3e9
    assert found.disk_bytes > 0
    assert found.device_bytes > 0.95 * found.capacity_bytes
    assert found.host_bytes + found.disk_bytes < mw.predict(blueprint("wide"), where, plan, 8).disk_bytes


def test_changes_are_named_for_what_they_are() -> None:
    assert all(not {"optimizer_state", "master", "precision"} & fields.keys() for fields in SAME)
    assert all({"optimizer_state", "master"} & fields.keys() for _, fields in OTHER)
