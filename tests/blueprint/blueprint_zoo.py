"""Small models of many kinds, each with a batch, for comparing a blueprint with a real run on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.models import decoder

Case = Callable[[], tuple[nn.Module, Any]]


def tokens(batch: int = 4, sequence: int = 24, vocab: int = 96) -> Tensor:
    return torch.randint(0, vocab, (batch, sequence))


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
        )
        self.na, self.nb = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        same = stride == 1 and width_in == width
        self.skip = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(F.relu(self.na(self.a(x)), inplace=True)))
        return F.relu(y + self.skip(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.one = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.two = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(F.max_pool2d(self.stem(x), 2)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Double(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.first, self.second, self.norm = (
            nn.Conv2d(a, b, 3, padding=1),
            nn.Conv2d(b, b, 3, padding=1),
            nn.GroupNorm(2, b),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.second(F.silu(self.first(x)))))


class UNet(nn.Module):
    """Skip connections: what a down block makes is alive until the matching up block."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList([Double(3, 8), Double(8, 16), Double(16, 32)])
        self.ups = nn.ModuleList([Double(48, 16), Double(24, 8)])
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.interpolate(x, scale_factor=2)
        skips.pop()
        for up in self.ups:
            x = up(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.out(x)


class EncoderDecoder(nn.Module):
    """T5-like: relative position bias made once and shared by all layers, the encoder's output read by every decoder
    layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bias = nn.Embedding(96, 32), nn.Embedding(47, 4)
        self.encoder = nn.ModuleList(CrossLayer(cross=False) for _ in range(3))
        self.decoder = nn.ModuleList(CrossLayer(cross=True) for _ in range(2))
        self.norm = nn.LayerNorm(32)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        length = tokens.shape[1]
        places = torch.arange(length)
        bias = self.bias(places[:, None] - places[None] + length - 1).permute(2, 0, 1)[None]
        memory = self.embedding(tokens)
        for layer in self.encoder:
            memory = layer(memory, bias=bias)
        x = self.embedding(tokens.flip(1))
        for layer in self.decoder:
            x = layer(x, bias=bias, memory=memory)
        return {"logits": F.linear(self.norm(x), self.embedding.weight), "cache": None}


class CrossLayer(nn.Module):
    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.reads, self.query = (
            nn.ModuleList(nn.Linear(32, 64, bias=False) for _ in range(1 + cross)),
            nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(1 + cross)),
        )
        self.writes = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(1 + cross))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2 + cross))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def attend(self, which: int, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        q = self.query[which](x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.reads[which](memory).chunk(2, -1))
        scores = q @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return self.writes[which]((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attend(0, normed, normed, bias)
        if memory is not None:
            x = x + self.attend(1, self.norms[1](x), memory, None)
        return x + self.down(F.relu(self.up(self.norms[-1](x))))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 32)), nn.Parameter(torch.zeros(1, 17, 32))
        self.blocks = nn.Sequential(*(FusedLayer(32, 4) for _ in range(3)))
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.blocks(x)[:, 0])


class FusedLayer(nn.Module):
    """Query, key and value in one matrix, divided as [3, heads, dim]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.n1, self.n2 = heads, nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = self.qkv(self.n1(x)).reshape(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, h))
        return x + self.mlp(self.n2(x))


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 8) for n in (50, 70, 90))
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(6 + 8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = torch.stack([self.bottom(dense), *(table(sparse[:, i]) for i, table in enumerate(self.tables))], 1)
        pairs = torch.triu_indices(4, 4, 1)
        return self.top(torch.cat([x[:, 0], (x @ x.transpose(1, 2))[:, pairs[0], pairs[1]]], 1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cells, self.head = (
            nn.Embedding(96, 16),
            nn.GRU(16, 24, 2, batch_first=True),
            nn.Linear(24, 96),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cells(self.embedding(tokens))[0])


class LongShortTerm(Recurrent):
    """oneDNN's fused kernel: one op per layer and direction, with a private workspace."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(16, 24, 2, batch_first=True)


class DiffusionTransformer(nn.Module):
    """Blocks modulated by a condition that all of them read (adaLN-zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv2d(4, 32, 2, 2), nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.blocks = nn.ModuleList(Modulated() for _ in range(3))
        self.out = nn.Linear(32, 16)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(-torch.arange(8) / 8.0)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        x = self.patch(image).flatten(2).mT
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x)


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.modulation = FusedLayer(32, 4), nn.Linear(32, 6 * 32)
        self.inner.n1 = self.inner.n2 = nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b, c, d, e, f = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        y = F.layer_norm(x, (32,)) * (1 + a) + b
        x = x + c * self.inner(y)
        return x + f * self.inner.mlp(F.layer_norm(x, (32,)) * (1 + d) + e)


class Shared(nn.Module):
    """One layer called three times, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(96, 32), FusedLayer(32, 4), nn.Linear(32, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(3):
            x = self.layer(x)
            x += 1.0
        return self.head(x)


def ours(family: str, **sizes: Any) -> Case:
    config = {"gpt": decoder.gpt, "llama": decoder.llama}[family]
    return lambda: (decoder.Decoder(config(layers=3, hidden=32, heads=4, vocab=96, sequence=24, **sizes)), tokens())


def image(channels: int = 3) -> Tensor:
    return torch.randn(4, channels, 16, 16)


CASES: dict[str, Case] = {
    "gpt": ours("gpt"),
    "gpt with dropout": ours("gpt", dropout=0.1),
    "llama": ours("llama", kv_heads=2),
    "llama eager": ours("llama", attention="eager"),
    "mixture": ours("llama", experts=4, moe_ffn=48),
    "stacked mixture": ours("llama", experts=4, moe_ffn=48, stacked=True, shared_experts=1, dense_layers=1),
    "latent attention": ours("llama", head_dim=16, latent_query=24, latent_kv=16, rotary_dim=8),
    "resnet": lambda: (ResNet(), image()),
    "u-net": lambda: (UNet(), image()),
    "encoder-decoder": lambda: (EncoderDecoder(), tokens()),
    "vision": lambda: (VisionTransformer(), image()),
    "recommender": lambda: (Recommender(), {"dense": torch.randn(4, 4), "sparse": torch.randint(0, 50, (4, 3))}),
    "recurrent": lambda: (Recurrent(), tokens()),
    "diffusion": lambda: (DiffusionTransformer(), {"image": image(4), "time": torch.rand(4)}),
    "shared": lambda: (Shared(), tokens()),
    "transformer": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3, enable_nested_tensor=False),
        torch.randn(4, 12, 32),
    ),
}
