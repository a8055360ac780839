"""What can't be is refused at once, in one sentence that names the number to change."""

from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.errors import ConfigError, MeshwrightError, PlanError
from meshwright.models.decoder import Decoder, gpt, llama
from meshwright.parallel.apply import refuse_unavailable
from meshwright.parallel.preview import preview
from meshwright.plan import Plan


def _preview(model: nn.Module, plan: str, batch: Any, loss: Any = None) -> Any:
    return preview(model, Plan.parse(plan), loss or (lambda b: model(b).float().square().mean()), batch)


def test_heads_that_do_not_divide() -> None:
    model = Decoder(gpt(layers=1, hidden=64, heads=8, vocab=96, sequence=12))
    batch = torch.zeros(2, 12, dtype=torch.long)
    with pytest.raises(PlanError, match=r"^tp=3 does not divide the 8 heads of blocks.0.attention.query.weight: .* is tp=4$"):
        _preview(model, "tp=3", batch)


def test_a_vocabulary_that_does_not_divide_is_cut_unevenly_and_said_so() -> None:
    model = Decoder(llama(layers=1, hidden=16, heads=4, vocab=41, sequence=8))
    found = _preview(model, "tp=2", torch.zeros(2, 8, dtype=torch.long))
    assert found.cuts["embedding.weight"] == (0, 21, 41)
    assert any(note.startswith("embedding.weight: 41 rows are cut unevenly, 21 on each rank and 20") for note in found.notes)


def test_nothing_to_split() -> None:
    with pytest.raises(PlanError, match=r"tp=2: no weight of this model can be split over ranks: leave tp out"):
        _preview(nn.LayerNorm(6), "tp=2", torch.randn(2, 6))


def test_a_recurrent_layer_under_cp() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.memory = nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.memory(self.embedding(tokens))[0]
            return found

    with pytest.raises(PlanError, match=r"^cp=2: memory \(GRU\) needs every position before the next: use cp=1"):
        _preview(Tagger(), "cp=2", torch.zeros(2, 8, dtype=torch.long))


def test_a_sequence_that_does_not_divide() -> None:
    model = Decoder(gpt(layers=1, hidden=16, heads=4, vocab=32, sequence=9))
    with pytest.raises(PlanError, match="cp=2: the batch has no sequence that 2 ranks can divide: use a length that is a multiple"):
        _preview(model, "cp=2", torch.zeros(2, 9, dtype=torch.long))


def test_an_example_is_asked_for() -> None:
    from meshwright.parallel.partitioned import needs_example

    with pytest.raises(ConfigError, match=r"^tp=2 needs example_batch=: the model is read from one batch"):
        needs_example(Plan(tp=2), None)


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    with pytest.raises(PlanError, match="sp=on divides activations over the ranks of tp: add tp="):
        refuse_unavailable(Plan.parse("sp=on dp_shard=2"))


def test_refusals_are_one_line() -> None:
    for plan in ("tp=3", "tp=5", "cp=5"):
        model = Decoder(gpt(layers=1, hidden=64, heads=8, vocab=96, sequence=12))
        with pytest.raises(MeshwrightError) as caught:
            _preview(model, plan, torch.zeros(2, 12, dtype=torch.long))
        assert "\n" not in str(caught.value)
    assert mw.errors.PlanError is PlanError
