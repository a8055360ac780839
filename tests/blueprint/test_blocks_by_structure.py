"""Blocks are found from structure alone: never from names, for any kind of model, on meta, in milliseconds."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from meshwright.blueprint.blocks import block_names, structures
from meshwright.models import decoder


class Residual(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16), Residual(16, 16), Residual(16, 16))
        self.layer3 = nn.Sequential(Residual(16, 32))
        self.fc = nn.Linear(32, 10)


class DoubleConv(nn.Sequential):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(nn.Conv2d(width_in, width_out, 3), nn.ReLU(), nn.Conv2d(width_out, width_out, 3), nn.ReLU())


class Up(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width_in, width_out, 2, 2)
        self.conv = DoubleConv(width_in, width_out)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = DoubleConv(1, 8), DoubleConv(8, 16), DoubleConv(16, 32)
        self.up1, self.up2 = Up(32, 16), Up(16, 8)
        self.out = nn.Conv2d(8, 1, 1)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = lambda: nn.TransformerEncoderLayer(16, 2, 32)  # noqa: E731
        self.left = nn.Sequential(*(layer() for _ in range(3)))
        self.right = nn.Sequential(*(layer() for _ in range(3)))


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(100, 8) for _ in range(5))
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 1))


def names(stem: str, count: int) -> list[str]:
    return [f"{stem}{i}" for i in range(count)]


def mlp_of_units() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 8), *(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)), nn.Linear(8, 2))


CASES = {
    "decoder": (lambda: decoder.Decoder(decoder.gpt(layers=3)), names("blocks.", 3)),
    "experts stay inside": (lambda: decoder.Decoder(decoder.llama(layers=2, experts=8)), names("blocks.", 2)),
    "stages": (Stages, ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2", "layer3.0"]),
    "u-net": (UNet, ["down1", "down2", "down3", "up1", "up2"]),
    "two towers": (Towers, names("left.", 3) + names("right.", 3)),
    "encoder and decoder": (
        lambda: nn.Transformer(16, 2, 3, 2, 32),
        names("encoder.layers.", 3) + names("decoder.layers.", 2),
    ),
    "recommender": (Recommender, ["bottom.0", "bottom.2", "top.0", "top.2"]),
    "units between ends": (mlp_of_units, ["1", "2", "3", "4"]),
    "plain mlp": (lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), ["0", "1", "2"]),
    "recurrent": (lambda: nn.LSTM(8, 8, 3), []),
    "recurrent list": (lambda: nn.ModuleList(nn.LSTM(8, 8) for _ in range(3)), ["0", "1", "2"]),
    "nothing repeats": (lambda: nn.Linear(3, 3), []),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_the_outermost_repeated_units(case: str) -> None:
    build, expected = CASES[case]
    assert block_names(build()) == expected
    with torch.device("meta"):
        assert block_names(build()) == expected


@pytest.mark.parametrize("case", CASES)
def test_blocks_do_not_depend_on_attribute_names(case: str) -> None:
    """Renaming every unnumbered attribute changes the names found, not the modules."""
    build, _ = CASES[case]
    model = build()
    before = [id(model.get_submodule(name)) for name in block_names(model)]
    for module in list(model.modules()):
        children = list(module._modules.items())
        if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            module._modules.clear()
            module._modules.update({f"x_{''.join(reversed(name))}": child for name, child in children})
    assert [id(model.get_submodule(name)) for name in block_names(model)] == before


@pytest.mark.parametrize("case", CASES)
def test_no_block_lies_inside_another(case: str) -> None:
    found = block_names(CASES[case][0]())
    assert not any(a != b and a.startswith(b + ".") for a in found for b in found)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_layers_with_a_parametrization_count_as_the_layers_they_were(norm: Callable[[nn.Module], nn.Module]) -> None:
    """torch gives each of them a class of its own, and keeps what the weight is made from in a child module."""

    def build(wrap: Callable[[nn.Module], nn.Module]) -> list[nn.Module]:
        blocks = [nn.Sequential(wrap(nn.Linear(8, 16)), nn.GELU(), wrap(nn.Linear(16, 8))) for _ in range(3)]
        layers = [layer for _ in range(3) for layer in (wrap(nn.Linear(8, 8)), nn.ReLU())]
        normed = [nn.Sequential(wrap(nn.Conv1d(8, 8, 1)), nn.BatchNorm1d(8)) for _ in range(3)]
        return [nn.Sequential(*blocks), nn.Sequential(*layers), nn.Sequential(*normed)]

    for plain, wrapped in zip(build(lambda layer: layer), build(norm), strict=True):
        assert block_names(wrapped) == block_names(plain) != []
        kinds = structures(wrapped)
        blocks = [wrapped.get_submodule(name) for name in block_names(wrapped)]
        assert len({kinds[id(block)] for block in blocks}) == 1
