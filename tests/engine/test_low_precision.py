"""States in fewer bits and bfloat16 weights without a master: a stated bound, and the loss curve of full precision."""

import pytest
import torch

import meshwright as mw
from meshwright.parallel.forms import Form, remainder, stochastic_bf16

STEPS = 120


def _losses(plan: str, lr: float = 3e-3) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    engine = mw.parallelize(
        model,
        plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        loss_fn=lambda output, batch: torch.nn.functional.cross_entropy(output, batch[1]),
    )
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 64, (128,), generator=draw)
        losses.append(engine.step((tokens, (tokens * 7 + 3) % 64)).loss)
    return losses


@pytest.mark.parametrize(
    ("plan", "reference"),
    [
        ("single optimizer_state=bf16", "single"),
        ("single optimizer_state=int8", "single"),
        ("precision=bf16 master=kahan", "precision=bf16"),
        ("precision=bf16 master=stochastic", "precision=bf16"),
        ("precision=bf16 master=kahan optimizer_state=int8 update=backward", "precision=bf16"),
    ],
)
def test_the_loss_falls_as_in_full_precision(plan: str, reference: str) -> None:
    found, expected = _losses(plan), _losses(reference)
    assert expected[-1] < 0.2 * expected[0]
    area = sum(expected)
    assert sum(abs(a - b) for a, b in zip(found, expected, strict=True)) < 0.05 * area
    assert abs(found[-1] - expected[-1]) < 0.02 * expected[0]


def test_small_steps_are_not_lost_by_what_replaces_the_master() -> None:
    """Steps of a 512th of a bfloat16's quantum: plain bfloat16 weights would never move."""

    def moved(plan: str) -> float:
        model = torch.nn.Linear(256, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        engine = mw.parallelize(
            model,
            plan,
            optimizer=lambda params: torch.optim.SGD(params, lr=2.0**-16),
            loss_fn=lambda output, batch: output.float().mean(),
        )
        for _ in range(512):
            engine.step(torch.ones(1, 256))
        return 1.0 - next(iter(engine.full_state_dict().values())).mean().item()

    expected = 512 * 2.0**-16
    assert moved("precision=bf16 master=kahan") == pytest.approx(expected, rel=0.02)
    assert moved("precision=bf16 master=stochastic") == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(("name", "bound"), [("bf16", 2.0**-7), ("int8", 2.0**-3)])
@pytest.mark.parametrize("positive", [False, True])
def test_forms_keep_their_bound_and_their_mean(name: str, bound: float, positive: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3001, generator=draw) * 10 ** torch.linspace(-3, 3, 3001)
    values = values.square() if positive else values
    values[::100] = 0.0
    form, total = Form(name), torch.zeros_like(values)
    memory = torch.zeros(form.nbytes(len(values), values.dtype), dtype=torch.uint8)
    largest = torch.nn.functional.pad(values.abs(), (0, -len(values) % 256)).view(-1, 256).amax(1).repeat_interleave(256)[:3001]
    inside = values.abs() > largest * 1.25 * 2.0**-16
    for _ in range(300):
        form.encode(values, memory, draw)
        found = form.decode(memory, len(values), values.dtype)
        assert ((found - values).abs() <= bound * 1.001 * values.abs())[inside].all()
        assert (found[values == 0] == 0).all()
        if positive:
            assert (found[values > 0] > 0).all(), "a denominator vanished"
        total += found
    assert ((total / 300 - values).abs() <= bound * 0.35 * values.abs())[inside].all()
    form.encode(found, memory, draw)
    torch.testing.assert_close(form.decode(memory, len(values), values.dtype), found, rtol=1e-5, atol=0)


def test_a_sum_of_two_bfloat16_splits_again_into_the_same() -> None:
    values = torch.randn(10000)
    rounded = values.to(torch.bfloat16)
    left = remainder(values, rounded)
    again = rounded.float() + left.float()
    assert torch.equal(again.to(torch.bfloat16), rounded)
    assert torch.equal(remainder(again, rounded), left)
    assert ((again - values).abs() <= 2.0**-15 * values.abs()).all()


def test_stochastic_rounding_leaves_infinities_and_nan() -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 3.0])
    found = stochastic_bf16(values, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, values.to(torch.bfloat16), equal_nan=True)
