"""A search returns what brute force returns, keeps the reason of every rejection, and says what would do where nothing fits."""

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright as mw
from meshwright.blueprint.record import Blueprint
from meshwright.plan import pipeline
from meshwright.plan.predict import Pricer
from meshwright.plan.prediction import Prediction
from meshwright.plan.recompute import budget_bytes
from meshwright.plan.space import Space

SPECS = {
    "dense": "llama:layers=4,hidden=512,heads=8,kv_heads=4,ffn=1536,vocab=4096,sequence=512",
    "wide": "llama:layers=8,hidden=1024,heads=8,ffn=8192,vocab=1024,sequence=128",
    "experts": "llama:layers=4,hidden=256,heads=4,vocab=1024,sequence=256,experts=4,moe_ffn=512,stacked=on",
}


@cache
def blueprint(kind: str) -> Blueprint:
    return mw.inspect(SPECS[kind], dtype=torch.bfloat16, device="cuda")


def brute_force(kind: str, cluster: mw.Cluster, batch: int) -> tuple[int, list[float]]:
    """Price every plan of the space, one by one; the number of plans and the seconds of those that fit, fastest first."""
    return enumerated(Pricer.of(blueprint(kind), cluster, "bf16"), cluster.devices, batch, {})


def enumerated(pricer: Pricer, devices: int, batch: int, fixed: dict) -> tuple[int, list[float]]:
    """`brute_force` where fields are held."""
    space = Space(pricer.shape, devices, batch, "bf16", fixed=tuple(fixed.items()))
    count, seconds = 0, []
    for family in space.families():
        for member in space.members(family):
            count += 1
            plan = mw.Plan.parse(str(space.plan(family, member)))
            spared, found = by_trial(pricer, plan, batch) if space.fractions else (False, pricer.price(plan, batch))
            if spared:
                continue
            if not found.fits and space.budgets(family) and (less := pricer.budgeted(plan, family.items)) is not None:
                found = pricer.price(less, batch)
                assert found.fits
            if found.fits:
                seconds.append(found.step_seconds)
    return count, sorted(seconds)


def by_trial(pricer: Pricer, plan: mw.Plan, batch: int) -> tuple[bool, Prediction]:
    """Whether a plan fits that moves one state less; else the first of all hundredths of its last state that fits."""
    whole = pricer.price(plan, batch)
    state = next((s for s in ("params", "optimizer") if s in plan.offload), None)
    if state is None:
        return False, whole
    less = ",".join(part for part in plan.offload.split(",") if not part.startswith(state)) or "none"
    spared, found = by_trial(pricer, dataclasses.replace(plan, offload=less), batch)
    if spared or found.fits:
        return True, found
    for hundredths in range(1, 101) if whole.device_bytes <= whole.capacity_bytes else ():
        part = plan.offload.replace(f"{state}:cpu", f"{state}:cpu@{hundredths / 100}")
        found = pricer.price(dataclasses.replace(plan, offload=part), batch)
        if found.fits:
            return False, found
    return False, whole


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize(
    ("cluster", "batch"),
    [("4xH100-80GB", 8), ("2x2xA100-40GB,inter=2,memory=2.05", 12), ("2x4xV100-16GB,intra=5,memory=2.03", 8)],
)
def test_search_returns_what_brute_force_returns(kind: str, cluster: str, batch: int) -> None:
    where = mw.Cluster.parse(cluster)
    count, seconds = brute_force(kind, where, batch)
    found = mw.search(blueprint(kind), where, batch, top=7)
    assert [c.step_seconds for c in found.candidates] == pytest.approx(seconds[: len(found.candidates)])
    assert len(found.candidates) == min(7, len(seconds))
    assert found.searched == count
    assert sum(found.rejected.values()) + len(found.candidates) == count
    assert all(c.fits for c in found.candidates)


@settings(max_examples=8, deadline=None)
@given(
    nodes=st.sampled_from([1, 2]),
    batch=st.sampled_from([4, 6, 12]),
    memory=st.floats(1.9, 2.3),
    inter=st.floats(0.5, 50.0),
)
def test_search_is_exact_on_other_hardware(nodes: int, batch: int, memory: float, inter: float) -> None:
    where = mw.Cluster.parse(f"{nodes}x2xA100-40GB,memory={memory:.3f},inter={inter:.3f}")
    _, seconds = brute_force("dense", where, batch)
    if not seconds:
        with pytest.raises(mw.PlanError):
            mw.search(blueprint("dense"), where, batch, top=1, advise=False)
        return
    assert mw.search(blueprint("dense"), where, batch, top=1).candidates[0].step_seconds == pytest.approx(seconds[0])


def test_fixed_fields_and_an_executor_narrow_the_space() -> None:
    where = mw.Cluster.parse("8xH100-80GB")
    held = mw.search(blueprint("dense"), where, 32, fixed={"tp": 4, "recompute": "none"})
    assert all("tp=4" in c.plan for c in held.candidates)
    data_only = mw.search(blueprint("dense"), where, 32, accepts=lambda p: p.tp == p.pp == p.cp == 1 and p.offload == "none")
    assert all(not {"tp", "pp", "cp", "offload"} & {i.split("=")[0] for i in c.plan.split()} for c in data_only.candidates)


def test_a_budget_is_the_largest_that_fits() -> None:
    """Where nothing recomputed does not fit, the search recomputes as little as it must: less than in whole settings."""
    where = mw.Cluster.parse("1xA100-40GB,memory=10")
    held = {"offload": "none", "microbatches": 1}
    best = mw.search(blueprint("wide"), where, 64, top=1, fixed=held).candidates[0]
    plan = mw.Plan.parse(best.plan)
    budget = budget_bytes(plan.recompute)
    assert budget is not None
    block = best.memory_bytes["activations"] / 8
    more = mw.predict(blueprint("wide"), where, dataclasses.replace(plan, recompute=f"budget={int(budget + block)}"), 64)
    assert best.fits
    assert not more.fits
    for setting in ("none", "selective", "full"):
        whole = mw.predict(blueprint("wide"), where, dataclasses.replace(plan, recompute=setting), 64)
        assert not whole.fits or whole.step_seconds > best.step_seconds


def test_objectives() -> None:
    where = mw.Cluster.parse("2x8xA100-40GB")
    smallest = mw.search(blueprint("dense"), where, 16, objective="smallest")
    assert smallest.cluster.devices == 1
    cheapest = mw.search(blueprint("dense"), where, 16, objective="cheapest")
    fastest = mw.search(blueprint("dense"), where, 16)
    cost = [c.candidates[0].step_seconds * c.cluster.devices for c in (cheapest, fastest)]
    assert cost[0] <= cost[1]
    longest = mw.search(blueprint("dense"), mw.Cluster.parse("1xA100-40GB,memory=1.6"), 1, objective="longest")
    assert longest.model["sequence"] >= 1024
    spec = SPECS["dense"].replace("sequence=512", f"sequence={2 * longest.model['sequence']}")
    twice = mw.inspect(spec, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(mw.PlanError):
        mw.search(twice, mw.Cluster.parse("1xA100-40GB,memory=1.6"), 1)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"cluster": "1xA100-40GB,memory=1.7", "batch": 8}, "would do"),
        ({"cluster": "7xH100-80GB", "batch": 5, "fixed": {"tp": 1, "pp": 1, "cp": 1}}, "leave one of them out"),
        ({"cluster": "7xH100-80GB", "batch": 5}, "the nearest that works is 7"),
        ({"cluster": "8xH100-80GB", "batch": 8, "fixed": {"tp": 3}}, "the nearest that works is tp=2"),
    ],
)
def test_nothing_found_says_what_would_do(options: dict, part: str) -> None:
    kind = "wide" if part == "would do" else "dense"
    with pytest.raises(mw.PlanError) as caught:
        mw.search(blueprint(kind), mw.Cluster.parse(options["cluster"]), options["batch"], fixed=options.get("fixed"))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_arguments() -> None:
    where = mw.Cluster.parse("8xH100-80GB")
    for bad in ({"objective": "best"}, {"top": 0}, {"fixed": {"width": 3}}):
        with pytest.raises(mw.ConfigError):
            mw.search(blueprint("dense"), where, 8, **bad)
    with pytest.raises(mw.PlanError, match="the nearest is precision=bf16"):
        mw.search(blueprint("dense"), where, 8, precision="bf61")
    for subjects in (("gpt2", where, 8), (blueprint("dense"), "8xH100", 8), (blueprint("dense"), where, "8")):
        with pytest.raises(mw.ConfigError, match="must be"):
            mw.search(*subjects)
    with pytest.raises(mw.ConfigError, match="global_batch=0"):
        mw.predict(blueprint("dense"), where, "fsdp", 0)


def test_schedules_against_arithmetic() -> None:
    """1F1B fills and drains once over p ranks; v virtual stages divide that; in-flight is what the papers say."""
    p, m = 4, 8
    equal = [1.0] * p, [1.0] * p, [1.0] * p
    assert pipeline.step("1f1b", 1, m, *equal) == pytest.approx(3.0 * (m + p - 1))
    assert pipeline.step("interleaved", 2, m, *equal) == pytest.approx(3.0 * (m + (p - 1) / 2))
    assert pipeline.step("zero_bubble", 1, m, *equal) == pytest.approx(3.0 * m + (p - 1) * 1.0)
    assert pipeline.step("layerwise", 1, m, *equal) == pytest.approx(3.0 * m * p)
    assert [pipeline.in_flight("1f1b", 1, p, m, r) for r in range(p)] == [4, 3, 2, 1]
    assert pipeline.in_flight("gpipe", 1, p, m, 0) == m
    assert pipeline.in_flight("interleaved", 2, p, m, 0) == pytest.approx(4 * (1 + (p - 1) / (p * 2)))


@pytest.mark.parametrize(("p", "m"), list(itertools.product([1, 2, 3], [1, 2, 5])))
def test_1f1b_of_unequal_stages_against_a_simulation(p: int, m: int) -> None:
    times = [1.0 + 0.5 * ((3 * r) % 2) for r in range(p)]
    predicted = pipeline.step("1f1b", 1, m, times, times, [0.0] * p)
    assert predicted == pytest.approx(simulated(times, m), rel=0.12)


def simulated(times: list[float], m: int) -> float:
    """Event by event: rank r does min(m, p - r) forwards, then one backward and one forward in turns."""
    p = len(times)
    done: dict[tuple[str, int, int], float] = {}
    orders = []
    for r in range(p):
        warm = min(m, p - r)
        order = [("F", i) for i in range(warm)]
        for i in range(m):
            order.append(("B", i))
            if warm + i < m:
                order.append(("F", warm + i))
        orders.append(order)
    clock, places = [0.0] * p, [0] * p
    while any(places[r] < len(orders[r]) for r in range(p)):
        for r in range(p):
            while places[r] < len(orders[r]):
                kind, i = orders[r][places[r]]
                before = ("F", r - 1, i) if kind == "F" else ("B", r + 1, i) if r + 1 < p else ("F", r, i)
                if not (kind == "F" and r == 0) and before not in done:
                    break
                clock[r] = max(clock[r], done.get(before, 0.0)) + times[r]
                done[kind, r, i] = clock[r]
                places[r] += 1
    return max(clock)


@pytest.mark.parametrize(
    "fields",
    [
        {"offload": "params:cpu,optimizer:cpu", "update": "backward"},
        {"master": "stochastic", "optimizer_state": "int8", "update": "backward"},
        {"recompute": "budget=100M"},
        {"schedule": "gpipe", "loss_chunks": 4},
    ],
)
def test_fields_that_are_held_are_priced_as_brute_force_prices_them(fields: dict) -> None:
    """Fields that the search does not vary change what fits, so its bounds must know them."""
    where = mw.Cluster.parse("2xA100-40GB,memory=1.75")
    _, seconds = enumerated(Pricer.of(blueprint("dense"), where, "bf16"), 2, 4, fields)
    assert seconds
    found = mw.search(blueprint("dense"), where, 4, top=3, fixed=fields)
    assert [c.step_seconds for c in found.candidates] == pytest.approx(seconds[:3])
