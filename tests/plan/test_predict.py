"""Predictions hold to published formulas, to themselves, and say in one sentence what they refuse."""

import dataclasses
import math
from functools import cache

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.blueprint.record import Blueprint
from meshwright.plan.footprint import Elements, states, unit_bytes
from meshwright.plan.memory import state_bytes
from meshwright.plan.prediction import MEMORY, TIME, Prediction
from meshwright.plan.profile import UnitProfile, profile
from meshwright.plan.time import Split

LLAMA = "llama:layers=4,hidden=512,heads=8,kv_heads=4,ffn=1536,vocab=4096,sequence=512"


@cache
def llama(kernels: str = "eager") -> Blueprint:
    return mw.inspect(f"{LLAMA},kernels={kernels}", seq=512, dtype=torch.bfloat16, device="cuda")


def priced(plan: str, cluster: str = "8xH100-80GB", batch: int = 64) -> Prediction:
    return mw.predict(llama(), mw.Cluster.parse(cluster), plan, global_batch=batch)


@pytest.mark.parametrize(
    "plan",
    [
        "dp_replicate=8 precision=bf16",
        "dp_shard=8 zero=2 precision=bf16 microbatches=2",
        "dp_replicate=2 dp_shard=4 zero=3 precision=bf16 recompute=full",
        "dp_shard=2 zero=1 tp=4 sp=on precision=bf16",
        "dp_shard=2 tp=2 pp=2 microbatches=4 precision=fp8",
        "dp_shard=2 cp=4 precision=bf16 offload=optimizer:cpu",
        "pp=2 tp=4 virtual=2 schedule=interleaved microbatches=8",
        "pp=4 dp_shard=2 schedule=zero_bubble microbatches=4 recompute=selective compile=on",
    ],
)
def test_items_sum_up_and_everything_is_finite(plan: str) -> None:
    found = priced(plan)
    assert tuple(found.memory_bytes) == MEMORY or set(found.memory_bytes) == set(MEMORY)
    assert set(found.time_seconds) == set(TIME)
    assert sum(found.time_seconds.values()) == pytest.approx(found.step_seconds)
    together = sum(found.memory_bytes[name] for name in MEMORY[:-1])
    states = sum(found.memory_bytes[name] for name in MEMORY[:3])
    assert states <= found.memory_bytes["peak"] <= together * (1 + 1e-9)
    assert all(math.isfinite(v) and v >= -1e-12 for v in (*found.time_seconds.values(), *found.memory_bytes.values()))
    assert found.device_bytes >= found.reserved_bytes >= found.memory_bytes["peak"]
    assert 0 < found.mfu < 1
    assert found.tokens_per_second_per_device == pytest.approx(64 * 512 / found.step_seconds / 8)
    assert Prediction.from_json(found.to_json()) == found


def kept(unit: UnitProfile, tp: int, sp: bool, recompute: str) -> float:
    return unit_bytes(unit, Split(1, tp, sp, 1, 1, "bf16", recompute), 1.0).kept


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize(("hidden", "heads", "s"), [(1024, 16, 512), (2048, 16, 1024)])
def test_activation_bytes_are_those_of_korthikanti_table_2(tp: int, hidden: int, heads: int, s: int) -> None:
    """arXiv:2205.05198, from a captured graph: nothing of these formulas is in the package."""
    spec = f"gpt:layers=2,hidden={hidden},heads={heads},vocab=512,sequence={s},attention=eager,dropout=0.1,kernels=fused"
    (unit,) = profile(mw.inspect(spec, seq=s, dtype=torch.bfloat16, device="cuda"), "fused").kinds
    sbh, core = s * hidden, 5 * heads * s / hidden
    assert kept(unit, tp, False, "none") == pytest.approx(sbh * (10 + 24 / tp + core / tp), rel=0.01)
    assert kept(unit, tp, True, "none") == pytest.approx(sbh / tp * (34 + core), rel=0.01) or tp == 1
    assert kept(unit, tp, False, "selective") == pytest.approx(sbh * (10 + 24 / tp), rel=0.01)
    assert kept(unit, tp, True, "selective") == pytest.approx(sbh * 34 / tp, rel=0.01) or tp == 1
    assert kept(unit, tp, False, "full") == pytest.approx(2 * sbh, rel=0.01)


def test_a_fused_llama_block_keeps_what_fused_stacks_keep() -> None:
    """sb(10h + 2(h + 2k) + 4a + 6f) bytes with fused kernels (shared/field/planner_formulas.md 3.1)."""
    (unit,) = profile(llama("fused"), "fused").kinds
    h, k, a, f, s = 512, 256, 8, 1536, 512
    assert kept(unit, 1, False, "none") == pytest.approx(s * (10 * h + 2 * (h + 2 * k) + 4 * a + 6 * f), rel=0.01)
    modes = {mode: profile(llama(), mode).kinds[0] for mode in ("eager", "fused", "compiled")}
    saved = {mode: kept(unit, 1, False, "none") for mode, unit in modes.items()}
    launches = {mode: unit.forward.launches for mode, unit in modes.items()}
    assert saved["fused"] < saved["compiled"] < saved["eager"]
    assert launches["compiled"] < launches["fused"] < launches["eager"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_are_divided_as_zero_promises(stage: int) -> None:
    parameters = llama().n_parameters
    found = priced(f"dp_shard=8 zero={stage} precision=bf16").memory_bytes
    states = found["parameters"] + found["gradients"] + found["optimizer"]
    promised = {1: 2 + 4 + 12 / 8, 2: 2 + 4 / 8 + 12 / 8, 3: 16 / 8}[stage]
    assert states == pytest.approx(promised * parameters, rel=0.01)


def test_more_of_an_axis_costs_less_memory_and_recompute_costs_time() -> None:
    plans = [f"dp_shard={8 // tp} zero=1 tp={tp} microbatches={2 * tp} precision=bf16" for tp in (1, 2, 4)]
    peaks = [priced(plan).memory_bytes["peak"] for plan in plans]  # micro-batches of 4
    assert peaks == sorted(peaks, reverse=True)
    plain, full = (priced(f"dp_shard=8 zero=3 precision=bf16 recompute={r}", batch=512) for r in ("none", "full"))
    assert full.memory_bytes["activations"] < plain.memory_bytes["activations"]
    assert full.step_seconds > plain.step_seconds
    budget = priced("dp_shard=8 zero=3 precision=bf16 recompute=budget=20GB", batch=512)
    assert budget.memory_bytes["activations"] <= max(20e9, full.memory_bytes["activations"])
    assert full.step_seconds >= budget.step_seconds >= plain.step_seconds - 1e-9


def test_a_slower_network_never_helps() -> None:
    plan = "dp_shard=4 zero=1 tp=4 sp=on precision=bf16"
    fast = priced(plan, "2x8xH100-80GB,inter=50")
    slow = priced(plan, "2x8xH100-80GB,inter=5")
    assert slow.step_seconds > fast.step_seconds
    assert slow.time_seconds["tp_comm"] == pytest.approx(fast.time_seconds["tp_comm"])  # inside a node


def test_a_convolutional_network_is_priced_too() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(4)))
    blueprint = mw.inspect(model, torch.randn(2, 16, 32, 32), loss_fn=lambda out, batch: out.float().mean())
    found = mw.predict(blueprint, mw.Cluster.parse("4xA100-80GB"), "ddp", global_batch=32)
    assert found.step_seconds > 0
    assert found.memory_bytes["activations"] > 4 * 16 * 32 * 32 * 8 * 4


def test_expert_parallelism_divides_experts() -> None:
    spec = "llama:layers=2,hidden=256,heads=4,vocab=512,experts=8,moe_ffn=512,stacked=on"
    blueprint = mw.inspect(spec, seq=256, dtype=torch.bfloat16, device="cuda")
    cluster = mw.Cluster.parse("8xH100-80GB")
    one, eight = (mw.predict(blueprint, cluster, f"dp_replicate=8 ep={ep} precision=bf16", global_batch=64) for ep in (1, 8))
    assert eight.memory_bytes["parameters"] < one.memory_bytes["parameters"] / 2
    assert eight.time_seconds["ep_comm"] > 0 == one.time_seconds["ep_comm"]


@pytest.mark.parametrize(
    ("plan", "batch", "part"),
    [
        ("dp_shard=8", 30, "nearest that can is 32"),
        ("dp_shard=4", 32, "needs 4 ranks"),
        ("dp_shard=8 ep=2", 32, "has none"),
        ("pp=8 microbatches=4", 32, "the model has 4"),
        ("dp_shard=4 pp=2 virtual=2 microbatches=4", 32, "virtual=2: schedule=1f1b has one stage on each rank"),
        ("dp_shard=8 sp=on", 32, "needs tp"),
    ],
)
def test_mistakes_cost_one_sentence(plan: str, batch: int, part: str) -> None:
    with pytest.raises(mw.PlanError) as caught:
        priced(plan, batch=batch)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_blueprint_for_another_device_is_captured_again() -> None:
    elsewhere = mw.inspect(LLAMA, seq=512)  # float32, CPU kernels
    plan, cluster = "dp_shard=8 zero=3 precision=bf16", mw.Cluster.parse("8xH100-80GB")
    again = mw.predict(elsewhere, cluster, plan, global_batch=64)
    assert again.memory_bytes == priced(plan).memory_bytes


SIZES = {
    "gpt:layers=12,hidden=768,heads=12,vocab=50304,kernels=fused": ("8xA100-40GB", "ddp microbatches=8", 512),
    "llama3-8b": ("8xH100-80GB", "fsdp recompute=full", 64),
    "gpt3-175b": ("48x8xA100-80GB", "dp_replicate=6 tp=8 sp=on pp=8 microbatches=64 recompute=selective", 384 * 4),
    "gpt-1t": ("64x8xA100-80GB", "tp=8 sp=on pp=64 microbatches=512 recompute=selective", 512),
}


@pytest.mark.parametrize("model", SIZES)
def test_utilisation_of_sensible_plans_is_neither_absurd_nor_helped_by_slower_links(model: str) -> None:
    where, plan, batch = SIZES[model]
    blueprint = mw.inspect(model, seq=2048, dtype=torch.bfloat16, device="cuda")
    steps = []
    for overrides in ("", ",intra=50", ",intra=50,inter=2", ",intra=50,inter=2,inter_us=100", ",intra=50,inter=2,peer_us=300"):
        found = mw.predict(blueprint, mw.Cluster.parse(where + overrides), f"{plan} precision=bf16", batch)
        steps.append(found.step_seconds)
        assert 0 < found.mfu < 0.75
        if not overrides:
            assert found.mfu > 0.15
    assert steps[:3] == sorted(steps[:3])
    assert min(steps[3:]) >= steps[2]


def test_a_fixed_split_is_priced_as_it_says() -> None:
    even = priced("pp=2 tp=4 microbatches=4 split=2,2 precision=bf16")
    skewed = priced("pp=2 tp=4 microbatches=4 split=3,1 precision=bf16")
    assert skewed.memory_bytes["parameters"] > even.memory_bytes["parameters"]
    found = mw.search(llama(), mw.Cluster.parse("8xH100-80GB"), 64, fixed={"pp": 2, "split": "3,1", "virtual": 1})
    assert "split=3,1" in str(found.best)


def test_offloaded_activations_are_on_the_host() -> None:
    """The executor sends all of what blocks save, so a host that can't hold it is too small."""
    cluster = mw.Cluster.parse("8xH100-80GB")
    small = dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, host_memory_bytes=1e9))
    plan = "dp_shard=8 zero=3 precision=bf16"
    here = mw.predict(llama(), cluster, plan, 1024)
    away = mw.predict(llama(), cluster, f"{plan} offload=activations:cpu", 1024)
    assert away.host_bytes == pytest.approx(here.memory_bytes["activations"] - away.memory_bytes["activations"])
    assert away.fits
    short = mw.predict(llama(), small, f"{plan} offload=activations:cpu", 1024)
    assert not short.fits
    assert f"{(away.host_bytes - 1e9) / 1e9:,.1f} GB too many" in str(short)
    disk = mw.predict(llama(), small, f"{plan} offload=activations:nvme=/scratch@0.75,activations:cpu@0.25", 1024)
    assert disk.disk_bytes == pytest.approx(0.75 * away.host_bytes)
    assert disk.host_bytes == pytest.approx(0.25 * away.host_bytes)
    states = mw.predict(llama(), small, f"{plan} offload=optimizer:nvme=/scratch", 1024)
    assert states.disk_bytes == pytest.approx(here.memory_bytes["optimizer"])
    assert states.fits


def test_a_plan_that_does_not_fit_says_by_how_much_and_where() -> None:
    small = "8xH100-80GB,memory=2"
    found = priced("ddp precision=bf16", small)
    short = f"{(found.device_bytes - 2e9) / 1e9:,.1f} GB too many for the 2 GB of each device"
    assert not found.fits
    assert short in str(found)
    assert "too many" not in str(priced("ddp precision=bf16"))


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(
    "fields",
    [
        "",
        "optimizer_state=int8",
        "optimizer_state=bf16 master=kahan",
        "master=stochastic",
        "update=backward",
        "offload=optimizer:cpu@0.25",
        "offload=optimizer:nvme=/scratch@0.5,optimizer:cpu@0.25",
    ],
)
def test_the_planner_counts_the_states_that_a_run_is_held_to(zero: int, fields: str) -> None:
    plan = mw.Plan.parse(f"dp_shard=4 zero={zero} precision=bf16 {fields}")
    formula = state_bytes(plan, 10**6)
    found = states(plan, Elements(1e6, 0, 0, 0), 4)
    assert found.parameters == formula.parameters
    assert found.gradients == formula.gradients
    assert found.optimizer == pytest.approx(formula.optimizer)
    assert found.host == pytest.approx(formula.host)


def test_the_host_holds_what_it_can() -> None:
    """405B parameters' states are 12 bytes each, 608 GB for each of 8 devices; their host has 128 GB for each."""
    model = mw.inspect("llama3-405b", seq=128, dtype=torch.bfloat16, device="cuda")
    roomy = "8xH100-80GB,memory=2000"
    full = mw.predict(model, mw.Cluster.parse(roomy), "fsdp precision=bf16 offload=optimizer:cpu", 8)
    assert not full.fits
    assert "128 GB of its host" in str(full)  # the device is not what is short
    assert f"{full.host_bytes / 1e9:.0f} GB of offloaded states" in str(full)
    assert full.candidate()["host_bytes"] == full.host_bytes > full.host_capacity_bytes
    assert mw.predict(model, mw.Cluster.parse(roomy), "fsdp precision=bf16 offload=optimizer:cpu@0.2", 8).fits


def test_loss_chunks_and_a_second_pass_cost_what_they_do() -> None:
    """A part of the logits at a time, made twice; a pass for the norm is as long as the first."""
    whole, parts = priced("ddp precision=bf16"), priced("ddp precision=bf16 loss_chunks=8")
    logits = 8 * 512 * 4096 * 4
    assert whole.memory_bytes["peak"] - parts.memory_bytes["peak"] > logits
    assert whole.step_seconds < parts.step_seconds < 1.2 * whole.step_seconds
    once, twice = (priced(f"fsdp precision=bf16 update=backward clip={clip}") for clip in ("delayed", "two_pass"))
    assert twice.time_seconds["compute"] == pytest.approx(2 * once.time_seconds["compute"])
    assert twice.time_seconds["optimizer"] == once.time_seconds["optimizer"]


def test_frozen_parameters_have_no_states() -> None:
    def build(frozen: int) -> nn.Module:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(8)))
        for block in model[:frozen]:
            block.requires_grad_(False)
        return model

    few, all_ = (
        mw.predict(mw.inspect(build(n), torch.zeros(4, 256)), mw.Cluster.parse("1xA100-40GB"), "single", 4).memory_bytes
        for n in (6, 0)
    )
    assert few["optimizer"] == pytest.approx(all_["optimizer"] / 4)
    assert few["parameters"] == all_["parameters"]
