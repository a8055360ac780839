"""A decoder-only transformer, written for one device: the GPT and Llama families as one configurable module.

`DecoderConfig` holds the sizes; `gpt(...)` and `llama(...)` fill in what makes each family. Inputs are token ids `[B,
S]` (batch, sequence), outputs are logits `[B, S, V]` (vocabulary). Nothing here knows of ranks or meshes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("rms", "layer"),
    "positions": ("rotary", "learned"),
    "activation": ("swiglu", "geglu", "gelu", "sqrelu"),
    "attention": ("flash", "eager"),
    "kernels": ("eager", "fused"),
}
"""The values of the sizes that are names."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and family of a decoder.

    `kv_heads < heads` is grouped-query attention, `experts > 0` a mixture of experts, `latent_kv > 0` latent attention.
    """

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 512
    vocab: int = 256
    sequence: int = 256
    tied: bool = True
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rotary", "learned"] = "rotary"
    activation: Literal["swiglu", "geglu", "gelu", "sqrelu"] = "swiglu"
    bias: bool = False
    attention: Literal["flash", "eager"] = "flash"
    dropout: float = 0.0
    experts: int = 0
    topk: int = 2
    moe_ffn: int = 0
    rope_theta: float = 10000.0
    head_dim: int = 0
    """0: `hidden / heads`."""
    kernels: Literal["eager", "fused"] = "eager"
    """`fused`: for predicting runs of stacks with single kernels for norms, activations, rotary, loss and experts (these are
    stacked then; the rest runs here as it is).
    """
    shared_experts: int = 0
    """Experts (as one of `shared_experts * moe_ffn`) that every token visits besides its `topk`."""
    stacked: bool = False
    """All experts' weights in one tensor per matrix, multiplied in groups (one kernel), in place of a module per
    expert.
    """
    dense_layers: int = 0
    """The first layers have a plain feed-forward in place of the experts."""
    latent_query: int = 0
    latent_kv: int = 0
    rotary_dim: int = 0
    """Multi-head latent attention if `latent_kv > 0`: the ranks of query and of key and value, and the rotary part of a
    head.
    """

    @property
    def width(self) -> int:
        """Features of one head."""
        return self.head_dim or self.hidden // self.heads


def gpt(**sizes: Any) -> DecoderConfig:
    """The GPT-2 / GPT-3 family: LayerNorm, learned positions, GELU, biases, tied embedding, `ffn = 4 * hidden`."""
    hidden = sizes.get("hidden", 128)
    heads = sizes.get("heads", 4)
    family: dict[str, Any] = {
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "tied": True,
        "ffn": 4 * hidden,
        "kv_heads": heads,
    }
    return DecoderConfig(**(family | sizes))


def llama(**sizes: Any) -> DecoderConfig:
    """The Llama family: RMSNorm, rotary positions, SwiGLU, no bias, untied; `ffn` rounds `8/3 * hidden` up to 64."""
    hidden = sizes.get("hidden", 128)
    heads = sizes.get("heads", 4)
    family: dict[str, Any] = {
        "norm": "rms",
        "positions": "rotary",
        "activation": "swiglu",
        "bias": False,
        "tied": False,
        "ffn": 64 * math.ceil(8 * hidden / 3 / 64),
        "kv_heads": heads,
    }
    return DecoderConfig(**(family | sizes))


def _norm(config: DecoderConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden, eps=1e-5)
    return nn.LayerNorm(config.hidden, bias=config.bias)


def _rotary(sequence: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(sequence).float(), frequencies)
    return angles.cos(), angles.sin()  # [S, D/2] each


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)  # [B, heads, S, D/2]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention over `heads` queries and `kv_heads` keys and values."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.width
        self.query = nn.Linear(config.hidden, config.heads * self.head_dim, bias=config.bias)
        self.key = nn.Linear(config.hidden, config.kv_heads * self.head_dim, bias=config.bias)
        self.value = nn.Linear(config.hidden, config.kv_heads * self.head_dim, bias=config.bias)
        self.output = nn.Linear(config.heads * self.head_dim, config.hidden, bias=config.bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, sequence, _ = x.shape
        q = self.query(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)  # [B, heads, S, D]
        k = self.key(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        v = self.value(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        if rotary is not None:
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        groups = self.config.heads // self.config.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if self.config.attention == "eager":
            y = self._eager(q, k, v)
        else:
            dropout = self.config.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out: Tensor = self.output(y.transpose(1, 2).reshape(batch, sequence, -1))
        return out

    def _eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)  # [B, heads, S, S]
        sequence = q.shape[-2]
        mask = torch.ones(sequence, sequence, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(dim=-1)
        return F.dropout(weights, self.config.dropout, self.training) @ v


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434): key and value from one low-rank vector per token, a shared rotary
    key.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config, self.head_dim, self.rotary = config, config.width, config.rotary_dim
        full = self.head_dim + self.rotary
        self.query_down = nn.Linear(config.hidden, config.latent_query, bias=False) if config.latent_query else None
        self.query_norm = nn.RMSNorm(config.latent_query, eps=1e-5) if config.latent_query else None
        self.query = nn.Linear(config.latent_query or config.hidden, config.heads * full, bias=False)
        self.kv_down = nn.Linear(config.hidden, config.latent_kv + self.rotary, bias=False)
        self.kv_norm = nn.RMSNorm(config.latent_kv, eps=1e-5)
        self.kv = nn.Linear(config.latent_kv, config.heads * 2 * self.head_dim, bias=False)
        self.output = nn.Linear(config.heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, sequence, _ = x.shape
        parts = (self.head_dim, self.rotary)
        latent = x if self.query_down is None or self.query_norm is None else self.query_norm(self.query_down(x))
        q = self.query(latent).view(batch, sequence, -1, sum(parts)).transpose(1, 2)  # [B, heads, S, D + R]
        q_plain, q_turned = q.split(parts, dim=-1)
        latent_kv, k_turned = self.kv_down(x).split((self.config.latent_kv, self.rotary), dim=-1)
        kv = self.kv(self.kv_norm(latent_kv)).view(batch, sequence, -1, 2 * self.head_dim).transpose(1, 2)
        k_plain, v = kv.split(self.head_dim, dim=-1)
        k_turned = k_turned[:, None]  # one rotary key for all heads
        if rotary is not None:
            q_turned, k_turned = _rotate(q_turned, *rotary), _rotate(k_turned, *rotary)
        q = torch.cat([q_plain, q_turned], dim=-1)
        k = torch.cat([k_plain, k_turned.expand(-1, q.shape[1], -1, -1)], dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.output(y.transpose(1, 2).reshape(batch, sequence, -1))
        return out


class FeedForward(nn.Module):
    """Two matrices and a GELU or squared ReLU, or three matrices and a gated SiLU (SwiGLU) or GELU (GeGLU)."""

    def __init__(self, config: DecoderConfig, ffn: int) -> None:
        super().__init__()
        self.activation = config.activation
        gated = config.activation in ("swiglu", "geglu")
        self.gate = nn.Linear(config.hidden, ffn, bias=config.bias) if gated else None
        self.up = nn.Linear(config.hidden, ffn, bias=config.bias)
        self.down = nn.Linear(ffn, config.hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            gate = self.gate(x)
            inner = (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate)) * self.up(x)
        else:
            inner = F.gelu(self.up(x)) if self.activation == "gelu" else F.relu(self.up(x)).square()
        out: Tensor = self.down(inner)
        return out


class MixtureOfExperts(nn.Module):
    """Each token goes to its `topk` experts of `experts`, weighted by the softmax of the chosen router logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.topk = config.topk
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        ffn = config.moe_ffn or config.ffn
        self.experts = nn.ModuleList(FeedForward(config, ffn) for _ in range(config.experts))
        self.shared = FeedForward(config, config.shared_experts * ffn) if config.shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        weights, chosen = self.router(tokens).float().softmax(dim=-1).topk(self.topk, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(tokens[token]) * weights[token, slot, None])
        if self.shared is not None:
            out = out + self.shared(tokens)
        return out.view_as(x)


class StackedExperts(nn.Module):
    """The same mixture with grouped products: tokens sorted by expert meet `[experts, in, out]` weights in one kernel."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.topk, self.n_experts = config.topk, config.experts
        ffn = config.moe_ffn or config.ffn
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.experts, config.hidden, 2 * ffn))
        self.down = nn.Parameter(torch.empty(config.experts, ffn, config.hidden))
        self.shared = FeedForward(config, config.shared_experts * ffn) if config.shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        weights, chosen = self.router(tokens).float().softmax(dim=-1).topk(self.topk, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        order = chosen.flatten().argsort(stable=True)  # slots [T * topk] by expert
        ends = torch.bincount(chosen.flatten(), minlength=self.n_experts).cumsum(0).to(torch.int32)
        token = order // self.topk
        gate, up = F.grouped_mm(tokens[token], self.gate_up, offs=ends).chunk(2, dim=-1)
        visited = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends) * weights.flatten()[order, None]
        out = torch.zeros_like(tokens).index_add(0, token, visited)
        if self.shared is not None:
            out = out + self.shared(tokens)
        return out.view_as(x)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: DecoderConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = LatentAttention(config) if config.latent_kv else Attention(config)
        self.ffn_norm = _norm(config)
        routed = config.experts > 0 and layer >= config.dense_layers
        mixture = StackedExperts if config.stacked or config.kernels == "fused" else MixtureOfExperts
        self.ffn = mixture(config) if routed else FeedForward(config, config.ffn)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary))
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out


class Decoder(nn.Module):
    """Embedding, `layers` blocks, norm, head; token ids `[B, S]` to logits `[B, S, V]`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.position = nn.Embedding(config.sequence, config.hidden) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        if config.positions == "rotary":
            cos, sin = _rotary(config.sequence, config.rotary_dim or config.width, config.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                into_residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * self.config.layers) if into_residual else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        sequence = tokens.shape[1]
        x = self.embedding(tokens)  # [B, S, H]
        rotary = None
        if self.position is not None:
            x = x + self.position(torch.arange(sequence, device=tokens.device))
        else:
            rotary = (self.get_buffer("cos")[:sequence], self.get_buffer("sin")[:sequence])
        for block in self.blocks:
            x = block(x, rotary)
        out: Tensor = self.head(self.norm(x))
        return out
