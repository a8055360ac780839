"""Small modules with one oddity each, as users write them; none is known to the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from odd import Odd
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, LENGTH, ROWS = 24, 16, 8, 4
CASES: dict[str, Odd] = {}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(*lengths: int) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        shapes = [(ROWS, length) for length in lengths]
        return [
            tuple(torch.randint(0, VOCAB, shape, generator=_generator(2 * i + k)) for k in (0, 1)) for i, shape in enumerate(shapes)
        ]

    return make


def _vectors(*shape: int) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        labels = [torch.randint(0, 5, (ROWS,), generator=_generator(50 + i)) for i in range(2)]
        return [(torch.randn(ROWS, *shape, generator=_generator(i)).double(), label) for i, label in enumerate(labels)]

    return make


def _tokens_loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), batch[1].flatten())


def _class_loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.inner(x).chunk(3, -1))
        return self.outer(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Model(nn.Module):
    """Two blocks with `middle` between them."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.middle = middle or nn.Identity()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.middle(self.blocks[0](self.embedding(tokens)))))


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def between(*lengths: int) -> Callable[[Any], Any]:
    """The case of a `Model` with the decorated module (class or function) in its middle."""

    def note(what: Any) -> Any:
        def build() -> nn.Module:
            return Model(what() if isinstance(what, type) else Applied(what))

        CASES[what.__name__.lower().strip("_")] = Odd(build, _tokens(*(lengths or (LENGTH, LENGTH))), _tokens_loss)
        return what

    return note


def whole(batches: Callable[[], list[Any]], loss: Callable[[Any, Any], Tensor] = _tokens_loss) -> Callable[[Any], Any]:
    """The case of the decorated class as the whole model."""

    def note(what: Any) -> Any:
        CASES[what.__name__.lower()] = Odd(what, batches, loss)
        return what

    return note


# Positions and features that move


@between()
class SpectralNorm(nn.Module):
    """Views of a weight that are made without a gradient, and buffers that ops on them write to by `out=`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


@between(6, 6)
def _flip(x: Tensor) -> Tensor:
    return x.flip(1)


@between()
def _roll(x: Tensor) -> Tensor:
    return x.roll(1, 1)


@between()
def _shift_by_padding(x: Tensor) -> Tensor:
    return x + F.pad(x, (0, 0, 1, -1))


@between(12, 12)
def _every_second(x: Tensor) -> Tensor:
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


@between(6, 6)
def _pairs_of_positions(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, 2 * WIDTH).cumsum(-1).view(x.shape)


@between()
def _gather_with_a_shorter_index(x: Tensor) -> Tensor:
    return x + x.gather(2, torch.zeros(x.shape[0], 2, 1, dtype=torch.long)).sum(1, keepdim=True)


# Written into


@between()
class SetFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = self.first
        return x


@between()
class Slots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(LENGTH + 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        slots = self.memory.expand(x.shape[0], -1, -1).clone()
        slots[:, 2:] = x
        return (slots * slots.sigmoid())[:, 1:-1]


@between()
class IntoZeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = x.new_zeros(x.shape)
        made[:, ::2] = self.layer(x[:, ::2])
        made[:, 1::2] += x[:, 1::2]
        return made


@between()
def _scale_some_features(x: Tensor) -> Tensor:
    x = x * 1.0
    x[:, :, :4].mul_(2.0)
    return x


@between()
class AddsAWiderDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.gain.detach().float()
        narrow += self.gain.detach() / 3  # rounded to float32
        return x * narrow.double() * self.gain


# Products


@between()
class ConvolutionOverPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(LENGTH, 32, 1), nn.Conv1d(32, LENGTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


@between()
class ScaledProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Linear(WIDTH, 32), nn.Parameter(torch.randn(WIDTH))
        self.down = nn.Parameter(torch.randn(32, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, F.gelu(self.up(x)).flatten(0, 1), self.down, beta=0.5, alpha=2.0).view_as(x)


@whole(_tokens(LENGTH, LENGTH))
class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.common, self.rare = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return torch.cat([self.common(x), self.rare(x)], -1)


@between()
class CausalOverFewerKeys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (self.query(x), self.key(x[:, :4])))
        return x + F.scaled_dot_product_attention(query, key, key, is_causal=True).transpose(1, 2).flatten(2)


# Without a gradient


@whole(_tokens(LENGTH, LENGTH))
class LookedUpWithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.model.embedding(tokens)
        return self.model(tokens) + (self.model.embedding(tokens) * target).sum(-1, keepdim=True)


@whole(_tokens(LENGTH, LENGTH))
class ByFrequency(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, scale_grad_by_freq=True, padding_idx=3)
        self.block, self.head = Block(), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


@whole(_tokens(LENGTH, LENGTH))
class ShortRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, max_norm=1.0)
        self.block, self.head = Block(), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


# What a model keeps, and decides by


@between(LENGTH, LENGTH, LENGTH)
class CountsItsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) if self.calls > 1 else x


@between(LENGTH, LENGTH, LENGTH)
class AssignsABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return x - self.mean


@between(LENGTH, 4, 12, LENGTH)
class GrowsACache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cosine", None, persistent=False)
        self.sines: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.cosine is None or self.cosine.shape[0] < length:
            self.cosine = torch.arange(length).to(x.dtype).cos()[:, None]
        if length not in self.sines:
            self.sines[length] = torch.arange(length).to(x.dtype).sin()[:, None]
        return x * self.cosine[:length] + self.sines[length]


def _some_equal() -> list[Any]:
    batches = _tokens(LENGTH, LENGTH, LENGTH)()
    batches[1][0][1] = batches[1][0][0]
    return batches


@whole(_some_equal)
class ComparesRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.last = Model(), nn.Linear(VOCAB, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens)
        return self.last(logits) if torch.equal(tokens[0], tokens[1]) else logits


@whole(_tokens(LENGTH, LENGTH))
class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens.add_(1).remainder_(VOCAB)
        if (tokens > 20).any():
            tokens[tokens > 20] = 0
        return self.model(tokens)


@whole(_vectors(3, 6, 6), _class_loss)
class CumulativeAverage(nn.Module):
    """Statistics whose weight is a number that Python reads from a buffer, and differs in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.second, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.norm(self.first(x)))).mean((2, 3)))


@whole(_vectors(WIDTH), _class_loss)
class CutStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@between()
def _hook_on_an_activation(x: Tensor) -> Tensor:
    x = x * 1.0
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * 0.5)
    return x


@between(LENGTH, LENGTH, LENGTH)
class CountsInPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.also = 0, torch.zeros((), dtype=torch.double)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.also += 1
        return x * self.calls + 0.1 * self.also


@between(LENGTH, LENGTH, LENGTH)
class RemembersInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.counts = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        self.counts["calls"] += 1
        return x * len(self.seen) + 0.1 * self.counts["calls"]


@dataclass
class Output:
    logits: Tensor
    size: Tensor


@whole(_tokens(LENGTH, LENGTH), lambda output, batch: _tokens_loss(output.logits, batch) + output.size)
class ReturnsADataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, tokens: Tensor) -> Output:
        logits = self.model(tokens)
        return Output(logits, logits.square().mean())


@between()
class FollowsItsOwnGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return x - slope


def _returned_loss(output: Any, batch: Any) -> Tensor:
    return _tokens_loss(output["logits"] * output["scale"] * output["fixed"], batch) + 0.1 * output["weight"].square().sum()


@whole(_tokens(LENGTH, LENGTH), _returned_loss)
class ReturnsItsParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.scale = Model(), nn.Parameter(torch.tensor(1.3))
        self.register_buffer("fixed", torch.tensor([2.0]))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(tokens), "scale": self.scale, "weight": self.model.head.weight, "fixed": self.fixed}


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 0.5


class OwnFunctionBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + Backwards.apply(x)


@whole(_tokens(LENGTH, LENGTH))
class HooksOnBlocks(Model):
    """Hooks that change what goes into one block and comes out of another, which also has a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = OwnFunctionBlock()
        self.blocks[0].register_forward_hook(lambda module, given, made: made * 1.5)
        self.blocks[1].register_forward_pre_hook(lambda module, given: (given[0] * 0.5,))


CASES["plain"] = Odd(Model, _tokens(LENGTH, LENGTH), _tokens_loss)
