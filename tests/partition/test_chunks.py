"""The loss in parts of the tokens is the loss, for heads and losses of many forms; what can't be is refused by the op's name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
import ranks
from meshwright.blueprint import costs
from meshwright.errors import ConfigError, PlanError
from meshwright.models.decoder import Decoder, llama
from parity import assert_same_as_single_device

VOCAB, WIDTH, LENGTH = 37, 8, 10


class Head(nn.Module):
    """Something before the head, and a head; `after` is done to the logits."""

    def __init__(self, bias: bool, after: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        self.after = after
        if not bias:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.after(self.head(torch.tanh(self.inner(self.table(tokens)))))


def shifted(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].float().reshape(-1, VOCAB), tokens[:, 1:].reshape(-1), ignore_index=3)


def classes_second(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="sum") / tokens.numel()


def smoothed(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=0.1, ignore_index=5)


def weighted(logits: Tensor, tokens: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2, VOCAB, dtype=logits.dtype)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), weight=weight, ignore_index=5)


def masked(logits: Tensor, tokens: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    mask = (tokens % 3 > 0).to(losses.dtype)
    return (losses * mask).sum() / mask.sum()


def by_hand(logits: Tensor, tokens: Tensor) -> Tensor:
    picked = torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return -picked.mean() + 1e-3 * torch.logsumexp(logits, -1).pow(2).mean()


def soft_targets(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), F.one_hot(tokens.flatten(), VOCAB).to(logits.dtype) * 0.9 + 0.1 / VOCAB)


LOSSES = [shifted, classes_second, smoothed, weighted, masked, by_hand, soft_targets]
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda logits: logits,
    "capped": lambda logits: 30 * torch.tanh(logits / 30),
    "in place": lambda logits: logits.mul_(0.7),
    "masked": lambda logits: logits.masked_fill(torch.arange(VOCAB) == 4, -1e4),
}


def gradients(model: nn.Module, loss: Any, plan: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    if plan is None:
        value = loss(model(tokens), tokens)
        value.backward()
        return value.detach(), {name: p.grad for name, p in model.named_parameters()}
    rate = 1.0
    engine = mw.parallelize(
        model,
        plan,
        optimizer=lambda p: torch.optim.SGD(p, lr=rate),
        loss_fn=loss,
        example_batch=tokens,
        forward_fn=lambda m, b: m(b),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    value = engine.step(tokens).loss
    return torch.tensor(value), {name: before[name] - p.detach() for name, p in model.named_parameters()}


def made(bias: bool, after: str) -> nn.Module:
    torch.manual_seed(0)
    return Head(bias, AFTER[after]).double()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("bias", "after", "chunks"),
    [
        (True, "plain", 3),
        (False, "capped", 7),
        pytest.param(True, "in place", 2, marks=pytest.mark.slow),
        pytest.param(False, "masked", 30, marks=pytest.mark.slow),
    ],
)
def test_the_loss_and_its_gradients_are_the_same(loss: Any, bias: bool, after: str, chunks: int) -> None:
    expected, wanted = gradients(made(bias, after), loss, None)
    found, got = gradients(made(bias, after), loss, f"loss_chunks={chunks}")
    assert found == pytest.approx(expected.item(), rel=1e-6 if loss is shifted else 1e-10)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5 if loss is shifted else 1e-9, atol=1e-9)


def test_no_tensor_of_all_logits_is_made_and_no_part_outlives_its_turn() -> None:
    largest = alive = most = 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest, alive, most
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.is_floating_point():
                size = result.untyped_storage().nbytes() // result.element_size()
                largest = max(largest, size)
                if func is torch.ops.aten._log_softmax.default:
                    alive += size
                    most = max(most, alive)
                    weakref.finalize(result.untyped_storage(), gone, size)
            return result

    model = made(True, "plain")
    tokens = torch.randint(0, VOCAB, (20, LENGTH), generator=torch.Generator().manual_seed(0))
    engine = mw.parallelize(
        model, "loss_chunks=10", optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=smoothed, example_batch=tokens
    )
    engine.step(tokens)
    gc.collect()
    gc.disable()
    try:
        with Watch():
            engine.step(tokens)
    finally:
        gc.enable()
    assert largest < 20 * LENGTH * VOCAB / 4
    assert most <= 20 * LENGTH * VOCAB / 5


def decoder_engine(plan: str) -> tuple[Any, Any]:
    tokens = torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = (tokens, tokens.roll(-1, 1))
    engine = mw.parallelize(
        Decoder(llama(layers=2, hidden=32, heads=4, kv_heads=2, vocab=VOCAB, sequence=LENGTH)),
        plan,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss_fn=mw.losses.cross_entropy,
        example_batch=batch,
    )
    return engine, batch


def test_a_program_has_no_kernel_that_only_a_cpu_has() -> None:
    engine, batch = decoder_engine("loss_chunks=4")
    names = {costs.base_name(op.func) for op in engine._applied.partition.local(engine.compute_loss, batch, "loss").ops}
    assert "attention" in names
    assert not {name for name in names if "cpu" in name or "mkldnn" in name}


def test_what_runs_on_a_gpu_has_the_casts_of_autocast() -> None:
    engine, batch = decoder_engine("loss_chunks=4 precision=bf16")
    partition = engine._applied.partition
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = partition.traced(engine.compute_loss, batch)
    torch.set_autocast_enabled("cuda", True)  # as `torch.autocast("cuda")` where there is a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        found = partition.traced(engine.compute_loss, batch)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
    assert [op.func for op in found.ops] == [op.func for op in expected.ops]
    assert found.values[found.output_numbers()[0]].dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda logits, tokens: logits.softmax(1).square().mean(), "softmax"),
        (lambda logits, tokens: logits.cumsum(0).mean(), "cumsum"),
        (lambda logits, tokens: F.cross_entropy(F.dropout(logits, 0.5).flatten(0, 1), tokens.flatten()), "draws random numbers"),
        (lambda logits, tokens: (logits.roll(1, 0) * logits).mean(), "roll"),
    ],
)
def test_what_mixes_tokens_is_refused_by_name(loss: Any, reason: str) -> None:
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    with pytest.raises(PlanError, match=reason):
        mw.parallelize(made(True, "plain"), "loss_chunks=2", optimizer=torch.optim.SGD, loss_fn=loss, example_batch=tokens)


def test_an_example_is_needed() -> None:
    with pytest.raises(ConfigError, match="loss_chunks=2 needs example_batch="):
        mw.parallelize(made(True, "plain"), "loss_chunks=2", optimizer=torch.optim.SGD, loss_fn=smoothed)


@pytest.mark.parametrize(("name", "plan"), [("gpt-tied", "fsdp"), ("hf-llama", "tp"), ("gpt", "1f1b pp=2 microbatches=2")])
def test_on_ranks(name: str, plan: str) -> None:
    assert_same_as_single_device(name, f"{plan} loss_chunks=3", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "gpt-tied", "hf-gpt2", "encoder-decoder", "recurrent", "resnet", "lora", "hf-t5"])
def test_every_model(name: str) -> None:
    assert_same_as_single_device(name, "loss_chunks=3 recompute=selective", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "world_size"),
    [("ddp", 2), ("zero2", 2), ("cp", 2), ("tp sp=on", 2), ("zero_bubble pp=2 microbatches=2", 2), ("2d dp_shard=2 tp=2", 4)],
)
def test_with_every_axis(plan: str, world_size: int) -> None:
    assert_same_as_single_device("gpt-8", f"{plan} loss_chunks=3", world_size)


def evaluated(plan: str) -> float:
    """The loss of an evaluation, of the same batch on every rank."""
    torch.manual_seed(3)
    tokens = torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    return mw.parallelize(Head(False).double(), plan, loss_fn=shifted, example_batch=tokens).evaluate(tokens).loss


@pytest.mark.parametrize(("plan", "world_size"), [("single", 1), ("fsdp", 2), ("tp", 2)])
def test_an_evaluation_is_in_parts_too(plan: str, world_size: int) -> None:
    (expected,) = ranks.run(1, evaluated, "single")
    for found in ranks.run(world_size, evaluated, f"{plan} loss_chunks=3"):
        assert found == pytest.approx(expected, rel=1e-6)  # the loss is computed in float32
