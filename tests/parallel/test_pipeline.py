"""What a pipeline sends, holds, draws and refuses, beside computing the same numbers."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import meshwright as mw
import parity
import ranks
import zoo
from meshwright.blueprint.blocks import block_names
from meshwright.errors import ConfigError, ModelError, PlanError
from meshwright.parallel.pipeline import receipts
from meshwright.parallel.preview import preview
from meshwright.partition.arguments import is_random
from meshwright.partition.deferred import Queue, defer, settle
from meshwright.partition.program import Program
from meshwright.partition.stages import cut, edges
from meshwright.partition.trace import Subject, Trace, trace
from meshwright.plan import Plan
from meshwright.plan.lowering import direction
from meshwright.plan.orders import SCHEDULES
from meshwright.plan.schedule import build, chain
from meshwright.plan.simulate import StageCost, simulate

CPU = torch.device("cpu")


def traced(model: nn.Module, function: Any, batch: Any) -> Trace:
    shapes = {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)}
    return trace(Subject(model, shapes, tuple(block_names(model))), function, batch)


class Residual(nn.Module):
    """Blocks whose sum is outside, a mask made from the batch, a table read at both ends, and something computed before its use."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.bias = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens > 3).to(self.table.weight.dtype)[..., None]
        x = self.table(tokens)
        early = self.bias(x)  # needed by the last stage only
        for layer in self.layers:
            x = x + mask * layer(x)
        return F.linear(x + early, self.table.weight)


def test_what_crosses_a_cut_is_the_least_that_can() -> None:
    model, tokens = Residual(), torch.randint(0, 11, (3, 5))
    pieces = cut(traced(model, model, tokens), [1, 2, 3, 4])
    size = {n: tuple(pieces[0].trace.values[n].shape) for piece in pieces for n in piece.given}
    assert [len(piece.targets.get(piece.stage + 1, [])) for piece in pieces] == [1, 1, 1, 0], "the sum is made before it is sent"
    assert edges(pieces)[0] == ((0, 1), (0, 3), (1, 2), (2, 3)), "what only the last stage reads goes there directly"
    assert set(size.values()) == {(3, 5, 8)}, "the mask is computed where it is used"
    assert [piece.parameters() >= {"table.weight"} for piece in pieces] == [True, False, False, True]


@pytest.mark.parametrize("ends", [[1, 4], [2, 4], [1, 2, 3, 4]])
@pytest.mark.parametrize("apart", [False, True])
def test_pieces_one_after_another_are_the_model(ends: list[int], apart: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Residual().double(), torch.randint(0, 11, (3, 5))
    expected = model(tokens).sum().tanh()
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = traced(model, lambda batch: model(batch).sum().tanh(), tokens)
    values: dict[int, Tensor] = {}
    queue, result = Queue(), None
    for piece in cut(found, ends):
        program = Program(defer(piece.trace, queue, CPU) if apart else piece.trace, model, frozenset(), CPU)
        given, result = program([tokens, *(values[n] for n in piece.taken)])
        values.update(zip(piece.given, given, strict=True))
    assert isinstance(result, Tensor)
    assert torch.equal(result, expected)
    result.backward()
    if apart:
        assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("layers")), "weights wait"
        settle(queue.current)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-12, atol=1e-14)


def test_deferring_covers_convolutions_norms_embeddings_and_shared_weights() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(1), nn.LayerNorm(36), nn.Linear(36, 36, bias=False)]
    model = nn.Sequential(*layers, nn.GELU(), layers[-1], nn.PReLU()).double()
    batch = torch.randn(3, 2, 5, 5).double()
    model(batch).square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    queue = Queue()
    program = Program(defer(traced(model, lambda b: model(b).square().mean(), batch), queue, CPU), model, frozenset(), CPU)
    program([batch]).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    settle(queue.current)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


class Derived(nn.Module):
    """A weight computed from weights, used twice where it can wait and once where it can't (an op that works in place)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(8, 8) / 9)
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.linalg.matrix_exp(self.inner)
        x = F.linear(torch.tanh(F.linear(x, weight)), weight) + self.layer(self.layer(self.frozen(x)))
        return x.clone().mul_(weight[0].exp())


@pytest.mark.parametrize("recomputed", [False, True])
def test_weights_made_of_weights_get_whole_gradients_from_both_halves(recomputed: bool) -> None:
    torch.manual_seed(0)
    model, batch, queue = Derived().double(), torch.randn(3, 8).double(), Queue()
    model(batch).square().mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = traced(model, lambda b: model(b).square().mean(), batch)
    program = Program(defer(found, queue, CPU), model, frozenset(), CPU)
    assert queue.shared
    result = checkpoint(program, [batch], use_reentrant=False) if recomputed else program([batch])
    result.backward(retain_graph=queue.shared)
    assert queue.current.entries
    settle(queue.current)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-14)


def test_a_preview_names_the_stages_what_they_send_and_what_zero_3_gathers() -> None:
    case, model = zoo.find("gpt-8"), zoo.build("gpt-8")
    plan = Plan.parse("interleaved pp=2 dp_shard=2 zero=3 microbatches=4")
    found = preview(model, plan, lambda batch: case.loss(model(batch[0]), batch), case.batch(0, 3))
    assert [(s.rank, s.first, s.last) for s in found.stages] == [
        (rank, f"blocks.{2 * number}", f"blocks.{2 * number + 1}") for number, rank in enumerate((0, 1, 0, 1))
    ]
    assert [s.sends for s in found.stages] == [((n + 1, 1, 3 * 12 * 16 * 8),) for n in range(3)] + [()]
    tied = model.embedding.weight.numel() * 8
    assert sum(s.parameter_bytes for s in found.stages) == sum(p.numel() for p in model.parameters()) * 8 + tied
    held = max(found.stages[rank].parameter_bytes + found.stages[rank + 2].parameter_bytes for rank in (0, 1))
    assert f"once a step, for its 4 micro-batches, and holds up to {held:,} bytes" in found.notes[-1]
    assert "stage 0 on rank 0: blocks.0 to blocks.1" in str(found)


class Talks(nn.Module):
    """Blocks that hand on something beside a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        factor: Any = 1.0
        for layer in self.layers:
            x = torch.tanh(layer(x)) * factor
            if self.kind == "a float read from values":
                factor = float(x.abs().max())
            elif self.kind == "a sparse tensor":
                x = x + torch.sparse.mm((x.detach() > 0).to(x.dtype).to_sparse(), torch.eye(8, dtype=x.dtype))
        return x


@pytest.mark.parametrize("kind", ["a float read from values", "a sparse tensor"])
def test_what_is_no_plain_tensor_at_a_cut_is_refused_before_anything_starts(kind: str) -> None:
    model, batch = Talks(kind), torch.randn(4, 8)
    with pytest.raises(ModelError) as error:
        preview(model, Plan.parse("pp=2 microbatches=2"), lambda b: model(b).square().mean(), batch)
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(2, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_what_a_rank_has_sent_is_let_go_of_only_when_it_was_used(name: str, ranks: int, v: int, m: int, slow: int) -> None:
    v = 2 if name in ("zbv", "dualpipev") else 1 if name in ("1f1b", "gpipe", "layerwise") else v
    m = 1 if name == "layerwise" else max(m, 2 * ranks) if name == "dualpipev" else m
    edges = tuple(sorted({*chain(ranks * v), (0, ranks * v - 1)}))
    schedule = build(name, ranks, v, m, edges)
    costs = [StageCost(1 + (stage * slow) % 5, 2, 1 + slow % 3) for stage in range(schedule.stages)]
    when = {(s.action.stage, direction(s.action.kind), s.action.microbatch): s for s in simulate(schedule, costs).spans}
    for rank in range(ranks):
        named = [send for sends in receipts(schedule, rank).values() for send in sends]
        assert len(set(named)) == len(named)
        assert set(named) <= set(schedule.actions[rank])
        activations = {a for a in schedule.actions[rank] if a.kind == "SEND_F"}
        assert activations <= set(named), "their gradients come back"
        for receive, sends in receipts(schedule, rank).items():
            assert receive in schedule.actions[rank]
            made = when[receive.peer, receive.kind[-1], receive.microbatch]
            for send in sends:
                used = when[send.peer, send.kind[-1], send.microbatch]
                assert used.rank == made.rank
                assert used.start_s <= made.start_s


def holdings(plan: str) -> dict[str, Any]:
    case = zoo.find("gpt-8")
    engine = mw.parallelize(
        zoo.build("gpt-8"), plan, optimizer=parity.adamw, loss_fn=case.loss, example_batch=case.batch(0, 8), clip_grad_norm=1.0
    )
    engine.step(parity.share(case.batch(0, 8), engine.data_rank, engine.data_ranks))
    here = [entry for entry in engine.table if entry.here]
    return {
        "names": [name for name, _ in engine.module.named_parameters()],
        "here": {name for entry in here for name in entry.names},
        "elements": sum(entry.shape.numel() for entry in here),
        "live_bytes": sum(entry.live.untyped_storage().nbytes() for entry in here),
        "state_elements": sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"]),
        "meta": all(entry.live.is_meta for entry in engine.table if not entry.here),
    }


def test_a_rank_holds_its_stages_and_nothing_else_under_the_models_own_names() -> None:
    first, last = ranks.run(2, holdings, "1f1b pp=2 microbatches=2")
    model = zoo.build("gpt-8")
    total = sum(p.numel() for p in model.parameters())
    assert first["names"] == last["names"] == [name for name, _ in model.named_parameters()]
    assert first["here"] | last["here"] == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert first["here"] & last["here"] == {"embedding.weight", "head.weight"}, "the tied weight, on both"
    assert first["elements"] + last["elements"] == total + model.embedding.weight.numel()
    for rank in (first, last):
        assert rank["meta"]
        assert rank["state_elements"] == rank["elements"]


def test_zero_3_keeps_no_whole_parameters_between_steps() -> None:
    whole = ranks.run(4, holdings, "1f1b pp=2 dp_shard=2 zero=2 microbatches=2")
    apart = ranks.run(4, holdings, "1f1b pp=2 dp_shard=2 zero=3 microbatches=2")
    for kept, freed in zip(whole, apart, strict=True):
        assert kept["live_bytes"] >= 8 * kept["elements"]
        assert freed["live_bytes"] == 0


def dropout(plan: str) -> tuple[list[float], Tensor]:
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(4)]
    model = nn.Sequential(*layers).double()
    keywords: dict[str, Any] = {"optimizer": parity.adamw, "loss_fn": lambda output, batch: output.square().mean()}
    engine = mw.parallelize(model, plan, example_batch=torch.ones(8, 8).double(), **keywords)
    before = torch.get_rng_state()
    metrics = [engine.step(torch.ones(8, 8).double()).loss for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    return metrics, engine.infer(torch.ones(8, 8).double())


def test_dropout_repeats_and_every_rank_gets_the_output() -> None:
    one, two = (ranks.run(2, dropout, "1f1b pp=2 microbatches=2") for _ in range(2))
    assert one[0][0] == one[1][0] == two[0][0]
    assert one[0][0][0] != one[0][0][1]
    assert torch.equal(one[0][1], one[1][1])
    assert torch.equal(one[0][1], two[1][1])


def refusals() -> list[str]:
    case, messages = zoo.find("gpt-8"), []
    keywords: dict[str, Any] = {"optimizer": parity.adamw, "loss_fn": case.loss}

    def attempt(function: Any) -> None:
        try:
            function()
        except (PlanError, ConfigError, ModelError) as error:
            messages.append(str(error))

    example = case.batch(0, 4)
    attempt(lambda: mw.parallelize(zoo.build("gpt-8"), "1f1b pp=2 microbatches=2", **keywords))
    attempt(lambda: mw.parallelize(zoo.build("gpt-8"), "pp=2 virtual=5 schedule=interleaved", example_batch=example, **keywords))
    rows = keywords | {"loss_fn": zoo.CASES["rows"].loss, "example_batch": zoo.CASES["rows"].batch(0, 4)}
    attempt(lambda: mw.parallelize(zoo.build("rows"), "pp=2", **rows))
    attempt(lambda: mw.parallelize(zoo.build("gpt-8"), "pp=2 split=3,4", example_batch=example, **keywords))
    engine = mw.parallelize(zoo.build("gpt-8"), "pp=2", example_batch=example, **keywords)
    attempt(lambda: engine(example))
    return messages


def test_what_cannot_run_is_refused_in_one_sentence_with_what_can() -> None:
    began = time.perf_counter()
    missing, stages, blocks, split, by_hand = ranks.run(2, refusals)[0]
    assert time.perf_counter() - began < 60
    assert "pp=2 needs example_batch=" in missing
    assert "10 stages" in stages
    assert "8 blocks" in stages
    assert "pp=4" not in stages or "nearest" in stages
    assert "0 blocks" in blocks
    assert "split=4,4" in split
    assert "engine.step(batch)" in by_hand
    assert all("\n" not in message for message in (missing, stages, blocks, split, by_hand))


class Noisy(nn.Module):
    """Noise that is added before the blocks and taken away behind them; attention with dropout, drawn by its kernel."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), 4, 8, dtype=x.dtype)
        x = x + noise
        for layer in self.layers:
            heads = layer(x)[:, None]
            x = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=self.dropout)[:, 0]
        return x - noise


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_random_numbers_that_two_stages_use_are_drawn_once(dropout: float) -> None:
    model, batch = Noisy(dropout).double(), torch.randn(3, 4, 8, dtype=torch.float64)
    first, last = cut(traced(model, lambda b: model(b).square().mean(), batch), [2, 4])
    drawn = [sum(is_random(op) for op in piece.trace.ops) for piece in (first, last)]
    assert sum(drawn) == (1 if dropout == 0.0 else 5)
    assert drawn[0] > 0
