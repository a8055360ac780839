"""Chains are runs of blocks that feed each other; what is alive at a cut is what later code really reads."""

import pytest
import torch
from blueprint_zoo import CASES
from torch import nn

from meshwright.blueprint.blocks import block_names
from meshwright.blueprint.inspection import inspect
from meshwright.models import decoder


def blueprint_of(case: str):  # type: ignore[no-untyped-def]
    return inspect(*CASES[case]())


@pytest.mark.parametrize(
    ("case", "lengths"),
    [
        ("gpt", [3]),
        ("resnet", [4]),
        ("encoder-decoder", [3, 2]),
        ("vision", [3]),
        ("diffusion", [3]),
        ("shared", [3]),
        ("u-net", [5]),
        ("recurrent", []),
    ],
)
def test_chain_lengths(case: str, lengths: list[int]) -> None:
    assert [chain.stop - chain.start for chain in blueprint_of(case).chains] == lengths


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("shared",)])
def test_execution_agrees_with_structure(case: str) -> None:
    model, batch = CASES[case]()
    blueprint = inspect(model, batch)
    assert sorted(blueprint.blocks) == sorted(block_names(model))
    assert {call.name for call in blueprint.calls} == set(blueprint.blocks)


def test_a_module_called_three_times_is_three_calls_of_one_kind() -> None:
    blueprint = blueprint_of("shared")
    assert [call.name for call in blueprint.calls] == ["layer"] * 3
    assert len(blueprint.kinds) == 1
    model, _ = CASES["shared"]()
    assert blueprint.n_parameters == sum(p.numel() for p in model.parameters())


def test_a_decoder_sends_the_hidden_state_only() -> None:
    blueprint = blueprint_of("gpt")
    for boundary in blueprint.boundaries:
        assert [tensor.bytes.at(4) for tensor in boundary.flows] == [4 * 24 * 32 * 4]
        assert not [tensor for tensor in boundary.alive if not tensor.recomputable]


def test_skip_connections_are_alive_across_the_cut() -> None:
    boundaries = blueprint_of("u-net").boundaries
    first, second = boundaries[0], boundaries[1]
    assert sum(t.bytes.at(1) for t in (*first.flows, *first.alive)) >= 8 * 16 * 16 * 4
    # After the second block its own result and the first block's are both read later.
    channels = sorted(tensor.shape[1].at(1) for tensor in (*second.flows, *second.alive) if not tensor.recomputable)
    assert channels == [8, 16]


def test_the_encoders_output_stays_alive_in_the_decoder() -> None:
    blueprint = blueprint_of("encoder-decoder")
    sizes = [[t.bytes.at(1) for t in (*b.flows, *b.alive) if not t.recomputable] for b in blueprint.boundaries]
    hidden, bias = 24 * 32 * 4, 4 * 24 * 24 * 4
    assert sizes[3].count(hidden) == 2  # after the first decoder layer: its result and the encoder's output
    assert any(bias in alive for alive in (sizes[0], [t.bytes.at(1) for t in blueprint.boundaries[0].alive]))


def test_two_kinds_where_layers_differ() -> None:
    config = decoder.llama(layers=4, hidden=32, heads=4, vocab=64, experts=4, dense_layers=1)
    blueprint = inspect(decoder.Decoder(config), torch.zeros(2, 8, dtype=torch.long))
    assert [call.kind for call in blueprint.calls] == [0, 1, 1, 1]


class Indexed(nn.Module):
    """Layers told apart by a number only: every third one works on a window, the others differ in nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index) for index in range(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.a, self.b = index, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(x).tanh() if self.index % 3 == 0 else self.a(x).relu())


def test_kinds_are_told_apart_by_what_they_compute() -> None:
    blueprint = inspect(Indexed(), torch.randn(2, 5, 8))
    # The first layer's input needs no gradient, so its backward is shorter than that of the layers that compute the
    # same.
    assert [call.kind for call in blueprint.calls] == [0, 1, 1, 2, 1, 1, 2, 1, 1]
