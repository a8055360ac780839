"""Which collectives run: as many as Megatron's count, and exactly those that the preview names."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

import meshwright as mw
import parity
import ranks
import zoo
from meshwright import _torch
from meshwright.models.decoder import Decoder, gpt
from meshwright.parallel.preview import preview
from meshwright.plan import Plan

ROWS, SEQUENCE, HIDDEN, LAYERS = 4, 16, 32, 3


def _build() -> Decoder:
    torch.manual_seed(0)
    return Decoder(gpt(layers=LAYERS, hidden=HIDDEN, heads=4, vocab=64, sequence=SEQUENCE))


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 64, (ROWS, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def really_ran(plan: str) -> list[tuple[str, int]]:
    """(collective, bytes) of everything between the start of a forward and the end of its backward on this rank."""
    engine = mw.parallelize(
        _build(), plan, optimizer=parity.adamw, loss_fn=mw.losses.cross_entropy, example_batch=_batch(), clip_grad_norm=None
    )
    engine.step(_batch())
    seen: list[tuple[str, int]] = []
    kept = (dist.all_reduce, _torch.all_gather, _torch.reduce_scatter, dist.all_to_all_single, dist.batch_isend_irecv)

    def watch(name: str, function: Any, size: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, size(*args)))
            return function(*args, **kwargs)

        return run

    try:
        dist.all_reduce = watch("all_reduce", kept[0], lambda t, *_: t.nbytes)
        _torch.all_gather = watch("all_gather", kept[1], lambda out, *_: out.nbytes)
        _torch.reduce_scatter = watch("reduce_scatter", kept[2], lambda out, source, *_: source.nbytes)
        dist.all_to_all_single = watch("all_to_all", kept[3], lambda out, *_: out.nbytes)
        dist.batch_isend_irecv = watch("send_receive", kept[4], lambda ops: ops[0].tensor.nbytes)
        loss = engine._loss_of(_batch())
        loss.backward()
    finally:
        dist.all_reduce, _torch.all_gather, _torch.reduce_scatter, dist.all_to_all_single, dist.batch_isend_irecv = kept
    return seen


def _named(plan: str) -> list[tuple[str, int]]:
    model = _build()
    found = preview(model, Plan.parse(plan), lambda batch: mw.losses.cross_entropy(model(batch[0]), batch), _batch())
    return [(transfer.collective, transfer.bytes) for transfer in found.transfers]


@pytest.mark.parametrize("plan", ["tp=2", "tp=2 sp=on", *(f"cp=2 cp_attention={m}" for m in ("allgather", "ring", "ulysses"))])
def test_what_is_named_is_what_runs(plan: str) -> None:
    assert Counter(ranks.run(2, really_ran, plan)[0]) == Counter(_named(plan))


def test_what_is_named_is_what_runs_on_two_axes() -> None:
    assert Counter(ranks.run(4, really_ran, "tp=2 cp=2 sp=on")[0]) == Counter(_named("tp=2 cp=2 sp=on"))


def test_a_megatron_block_reduces_twice_forward_and_twice_backward() -> None:
    activation = ROWS * SEQUENCE * HIDDEN * 4
    model = _build()
    found = preview(model, Plan.parse("tp=2"), lambda batch: mw.losses.cross_entropy(model(batch[0]), batch), _batch())
    inside = [t for t in found.transfers if t.module.startswith("blocks.")]
    assert Counter((t.phase, t.collective, t.bytes) for t in inside) == {
        ("forward", "all_reduce", activation): 2 * LAYERS,
        ("backward", "all_reduce", activation): 2 * LAYERS,
    }
    largest = max(t.bytes for t in found.transfers)
    assert largest == activation, "the logits never travel"


def test_position_tables_stay_whole_and_the_vocabulary_is_cut() -> None:
    model = zoo.build("gpt-learned")
    case = zoo.CASES["gpt-learned"]
    found = preview(model, Plan.parse("tp=2"), lambda batch: case.loss(model(batch[0]), batch), case.batch(0, 4))
    assert "embedding.weight" in found.cuts
    assert "position.weight" in found.whole
