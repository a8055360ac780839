"""What a step does beside arithmetic on finite numbers: non-finite values, precision, groups, schedules, dropout, BatchNorm."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
import parity
import ranks
import zoo

PLANS = ["ddp", "zero1", "zero2", "zero3"]


def _square(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return (output.float() ** 2).mean()


def _mlp(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 16, bias), nn.Tanh(), nn.Linear(16, 16, bias), nn.Tanh(), nn.Linear(16, 3, bias)).to(dtype)


def nan_on_one_rank(plan: str, policy: str) -> tuple[Any, bool, list[str]]:
    engine = mw.parallelize(_mlp(), plan, optimizer=parity.adamw, loss_fn=_square, on_nonfinite=policy, clip_grad_norm=1.0)
    engine.step(torch.ones(2, 8))
    before = engine.full_state_dict()
    bad = torch.full((2, 8), math.inf) if engine.data_rank == 1 else torch.ones(2, 8)
    messages: list[str] = []
    skipped = None
    try:
        skipped = engine.step(bad).skipped
    except mw.TrainingError as error:
        messages.append(str(error))
    after = engine.full_state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    last = engine.step(torch.ones(2, 8))
    return skipped, same and math.isfinite(last.loss), messages


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_nonfinite_gradient_is_one_decision_of_all_ranks(plan: str, policy: str) -> None:
    for skipped, unchanged, messages in ranks.run(2, nan_on_one_rank, plan, policy):
        assert unchanged
        assert (skipped is True) == (policy == "skip")
        assert bool(messages) == (policy == "stop")


def low_precision(plan: str) -> dict[str, Any]:
    engine = mw.parallelize(
        zoo.build("gpt", torch.float32), plan, optimizer=parity.adamw, loss_fn=mw.losses.cross_entropy, clip_grad_norm=1.0
    )
    case = zoo.CASES["gpt"]
    losses = []
    for step in range(6):
        losses.append(engine.step(parity.share(case.batch(step % 2, 4), engine.data_rank, engine.data_ranks)).loss)
    states = engine.optimizer.state.values()
    return {
        "losses": losses,
        "contract": str(engine.dtypes),
        "masters": {str(p.dtype) for group in engine.optimizer.param_groups for p in group["params"]},
        "states": {str(v.dtype) for state in states for v in state.values() if v.dim()},
        "weights": engine.full_state_dict(),
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_alike_under_every_plan(precision: str) -> None:
    single = ranks.run(1, low_precision, f"single precision={precision}")[0]
    exact = ranks.run(1, low_precision, "single")[0]
    low = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert single["losses"] == pytest.approx(exact["losses"], rel=0.03)
    for plan in PLANS:
        found = ranks.run(2, low_precision, f"{plan} precision={precision}")[0]
        assert found["losses"] == pytest.approx(single["losses"], rel=0.02), plan
        assert found["contract"] == f"storage float32, compute {low}, reduce float32, optimizer float32"
        assert found["masters"] == found["states"] == {"torch.float32"}
        assert {value.dtype for value in found["weights"].values()} == {torch.float32}


def tiny_updates(plan: str) -> float:
    """A learning rate of 1e-4 on weights of size 1 is lost in bfloat16, and must not be in its masters."""
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    engine = mw.parallelize(model, plan, optimizer=lambda p: torch.optim.SGD(p, lr=1e-4), loss_fn=lambda o, b: o.mean())
    for _ in range(3):
        engine.step(torch.ones(2, 4))
    weights = engine.full_state_dict()
    return float(weights["weight"].mean()) if weights else 0.0


@pytest.mark.parametrize("plan", PLANS)
def test_small_updates_are_not_lost_in_bf16(plan: str) -> None:
    assert ranks.run(2, tiny_updates, f"{plan} precision=bf16")[0] == pytest.approx(1 - 3 * 1e-4 / 4, abs=1e-7)


class TwoDtypes(nn.Module):
    """Weights that come in bfloat16 between weights that come in float32: one bucket holds both kinds of masters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(8, 8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x


def live_follow_masters(plan: str) -> list[str]:
    torch.manual_seed(6)
    engine = mw.parallelize(TwoDtypes(), plan, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), loss_fn=_square)
    before = engine.full_state_dict()
    for _ in range(2):
        engine.step(torch.ones(2, 8))
    masters = engine.full_state_dict()
    live = engine.module.state_dict()
    assert all(not torch.equal(before[name], value) for name, value in masters.items())
    return [name for name, value in masters.items() if not torch.equal(value.to(live[name].dtype), live[name])]


@pytest.mark.parametrize("plan", ["ddp", "zero1", "zero2"])
def test_live_parameters_follow_masters_of_every_dtype(plan: str) -> None:
    assert ranks.run(2, live_follow_masters, f"{plan} precision=bf16")[0] == []


def overflow(plan: str) -> tuple[list[bool], list[float], float]:
    engine = mw.parallelize(_mlp(), plan, optimizer=parity.adamw, loss_fn=lambda o, b: (o.float() ** 2).mean() * 100)
    metrics = [engine.step(torch.ones(2, 8)) for _ in range(4)]
    return [m.skipped for m in metrics], [m.loss_scale for m in metrics], metrics[-1].loss


@pytest.mark.parametrize("plan", ["ddp precision=fp16", "zero3 precision=fp16"])
def test_fp16_finds_its_loss_scale(plan: str) -> None:
    first, second = ranks.run(2, overflow, plan)
    assert first == second
    skipped, scales, loss = first
    assert math.isfinite(loss)
    for before, after, skip in zip(scales, scales[1:], skipped, strict=False):
        assert after == (before / 2 if skip else before)


def groups(plan: str, style: str) -> dict[str, torch.Tensor]:
    """Groups made from what the callable is given, or from the model's own parameters, held since before."""
    model = _mlp(torch.float64)
    held = dict(model.named_parameters())

    def build(params: Any) -> torch.optim.Optimizer:
        if style == "given":
            matrices, vectors = [p for p in params if p.dim() == 2], [p for p in params if p.dim() == 1]
        elif style == "held":
            matrices = [p for n, p in held.items() if n.endswith("weight")]
            vectors = [p for n, p in held.items() if n.endswith("bias")]
        else:
            matrices = [p for n, p in model.named_parameters() if n.endswith("weight")]
            vectors = [p for n, p in model.named_parameters() if n.endswith("bias")]
        return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "lr": 0.05}], lr=0.01)

    engine = mw.parallelize(model, plan, optimizer=build, loss_fn=lambda o, b: (o**2).mean())
    for step in range(3):
        engine.step(torch.full((2, 8), 1.0 + step).double())
    return engine.full_state_dict()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("style", ["given", "held", "late"])
def test_parameter_groups_keep_working(plan: str, style: str) -> None:
    model = _mlp(torch.float64)
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.5}, {"params": biases, "lr": 0.05}], lr=0.01)
    for step in range(3):
        (model(torch.full((2, 8), 1.0 + step).double()) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = ranks.run(2, groups, plan, style)[0]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr": 0.1, "initial_accumulator_value": 0.3},
    "RMSprop": {"lr": 0.01, "centered": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "Adafactor": {"lr": 0.01},
    "Muon": {"lr": 0.01},
    "Rprop": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
}


def with_optimizer(plan: str, name: str, steps: int = 3) -> dict[str, torch.Tensor]:
    engine = mw.parallelize(
        _mlp(torch.float64, bias=name != "Muon"),  # Muon takes matrices only
        plan,
        optimizer=lambda params: getattr(torch.optim, name)(params, **OPTIMIZERS[name]),
        loss_fn=lambda o, b: (o**2).mean(),
    )
    for step in range(steps):
        engine.step(torch.full((2, 8), 1.0 + step).double())
    return engine.full_state_dict()


@pytest.mark.parametrize("plan", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_torch_optimizer_updates_its_shards_like_the_whole(plan: str, name: str) -> None:
    model = _mlp(torch.float64, bias=name != "Muon")
    optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    for step in range(3):
        (model(torch.full((2, 8), 1.0 + step).double()) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = ranks.run(2, with_optimizer, plan, name)[0]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def rates(plan: str) -> list[float]:
    engine = mw.parallelize(
        _mlp(), plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=_square, lr_schedule=lambda s: 1 / (1 + s)
    )
    return [engine.step(torch.ones(2, 8)).lr for _ in range(4)]


def test_the_schedule_is_a_function_of_the_step_alone() -> None:
    expected = [0.1, 0.05, 0.1 / 3, 0.025]
    assert ranks.run(1, rates, "single")[0] == pytest.approx(expected)
    for found in ranks.run(2, rates, "zero2"):
        assert found == pytest.approx(expected)


def dropout(plan: str) -> tuple[float, list[float], torch.Tensor]:
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    torch.manual_seed(11)
    engine = mw.parallelize(model, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), loss_fn=lambda o, b: (o**2).mean(), seed=4)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    losses = [engine.step(torch.ones(2, 8)).loss for _ in range(2)]
    return 0.0, losses, torch.rand(3) - expected


def test_dropout_differs_by_step_and_leaves_the_callers_generator_alone() -> None:
    for _, losses, drift in ranks.run(2, dropout, "ddp"):
        assert losses[0] != losses[1]
        assert not drift.any()
    assert ranks.run(2, dropout, "ddp")[0][1] == ranks.run(2, dropout, "ddp")[1][1]


def batch_norm() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    import warnings

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = mw.parallelize(model, "ddp", optimizer=parity.adamw, loss_fn=_square)
    engine.step(torch.randn(6, 4, generator=torch.Generator().manual_seed(engine.data_rank)))
    said = [str(w.message) for w in caught if "BatchNorm" in str(w.message)]
    return said, engine.module[1].running_mean.clone(), engine.module[1].running_var.clone()


def test_batch_norm_warns_once_and_its_statistics_agree() -> None:
    (said, mean, variance), (silent, other_mean, other_variance) = ranks.run(2, batch_norm)
    assert len(said) == 1
    assert not silent
    assert torch.equal(mean, other_mean)
    assert torch.equal(variance, other_variance)


def bad_loss(kind: str) -> str:
    losses = {
        "vector": lambda o, b: o.mean(1),
        "number": lambda o, b: 3.0,
        "detached": lambda o, b: o.mean().detach(),
    }
    engine = mw.parallelize(_mlp(), "ddp", optimizer=parity.adamw, loss_fn=losses[kind])
    try:
        engine.step(torch.ones(2, 8))
    except mw.ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("kind", "words"), [("vector", "shape [2]"), ("number", "a float"), ("detached", "does not depend")])
def test_a_loss_that_is_no_differentiable_scalar_is_one_sentence(kind: str, words: str) -> None:
    for message in ranks.run(2, bad_loss, kind):
        assert words in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"plan": "tp=2"}, mw.PlanError, "tp=2"),
        ({"plan": "ddp precision=fp8"}, mw.PlanError, "fp8"),
        ({"plan": "dp_shard=3"}, mw.PlanError, "3 ranks"),
        ({"clip_grad_norm": 0.0}, mw.ConfigError, "clip_grad_norm=0.0"),
        ({"on_nonfinite": "ignore"}, mw.ConfigError, "'ignore'"),
        ({"model": 3}, mw.ConfigError, "int"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, mw.ModelError, "nothing to train"),
        ({"model": nn.Linear(2, 2, device="meta")}, mw.ModelError, "meta device"),
        ({"model": lambda: 5}, mw.ModelError, "int"),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, mw.ConfigError, "LBFGS"),
        (
            {"optimizer": lambda p: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1)},
            mw.ConfigError,
            "no trainable parameter of the model",
        ),
        ({"optimizer": lambda p: 5}, mw.ConfigError, "int"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    keywords: dict[str, Any] = {"plan": "single", "optimizer": parity.adamw, "loss_fn": _square} | arguments
    with pytest.raises(error) as caught:
        mw.parallelize(keywords.pop("model", None) or _mlp(), keywords.pop("plan"), **keywords)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [{"x": torch.ones(2, 8), "y": torch.ones(3)}, 5, {}])
def test_a_batch_of_the_wrong_shape_is_one_sentence(batch: Any) -> None:
    engine = mw.parallelize(_mlp(), "single", optimizer=parity.adamw, loss_fn=_square)
    with pytest.raises(mw.DataError):
        engine.step(batch)
