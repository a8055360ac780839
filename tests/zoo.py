"""The models that every plan is judged on: small, plain, and of different kinds.

Each case gives a model (float64, seeded), global batches by step, and the loss. Nothing here knows of meshes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright import losses
from meshwright.models.decoder import Decoder, gpt, llama

VOCAB = 40
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]  # (step, rows) -> global batch
    loss: Loss
    count: Callable[[Any], int] | None = None


def _tokens(step: int, rows: int, sequence: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (rows, sequence + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    # Rows have different numbers of valid labels, and one row has none at all.
    for row in range(rows):
        labels[row, : (row * 5) % sequence] = losses.IGNORED
    labels[-1] = losses.IGNORED
    return tokens[:, :-1], labels


def _pixels(step: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2000 + step)
    return torch.randn(rows, 3, 8, 8, generator=generator).double(), torch.randint(0, 5, (rows,), generator=generator)


class EncoderDecoder(nn.Module):
    """Embedding shared by encoder, decoder and head; a dict batch; an output that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        hidden = self.transformer(self.embedding(source), self.embedding(target))
        return {"logits": self.head(hidden)}


class ResNet(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)) for _ in range(layers)
        )
        self.head = nn.Linear(8, 5)
        self.temperature = nn.Parameter(torch.tensor(1.5))  # a scalar
        self.nothing = nn.Parameter(torch.empty(0, 4))  # and an empty parameter

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = x + stage(x)
        return self.head(x.mean((2, 3))) * self.temperature + self.nothing.sum()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 12)
        self.lstm = nn.LSTM(12, 14, num_layers=2, batch_first=True)
        self.head = nn.Linear(14, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class LowRank(nn.Module):
    """A LoRA adapter around a frozen linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def _lora(layers: int = 2) -> nn.Module:
    model = Decoder(llama(layers=layers, hidden=16, heads=2, vocab=VOCAB, sequence=12)).requires_grad_(False)
    for block in model.blocks:
        block.attention.query = LowRank(block.attention.query)
        block.attention.value = LowRank(block.attention.value)
    return model


class Unused(nn.Module):
    """One parameter that is never used, one module that only some batches use, and a non-persistent buffer."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Parameter(torch.ones(7, 3))
        self.head = nn.Linear(8, 3)
        self.register_buffer("shift", torch.arange(8.0) / 8, persistent=False)
        self.register_buffer("kept", torch.full((2,), 3.0))

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        x = x + self.shift
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if flag.any():  # rows stay independent of each other, but a rank without a flagged row never calls it
            x = x + flag[:, None] * self.sometimes(x)
        return self.head(x)


def _flagged(step: int, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3000 + step)
    # Only the last row asks for the optional layer, and only in every second step: ranks differ, and some steps skip it.
    flag = torch.zeros(rows, dtype=torch.bool)
    flag[-1] = step % 2 == 0
    # `extra` is for the loss alone: the model's forward does not accept it.
    return {
        "x": torch.randn(rows, 8, generator=generator).double(),
        "flag": flag,
        "extra": torch.randn(rows, 3, generator=generator).double(),
    }


class Rows(nn.Module):
    """Rows of several widths that no number of ranks divides, and trainable parameters of a second dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)
        self.gain = nn.Parameter(torch.ones(3, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.gain.double()


def _vectors(step: int, rows: int) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(4000 + step)).double()


def _hugging_face(kind: str, layers: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=layers,
                n_embd=16,
                n_head=2,
                vocab_size=VOCAB,
                n_positions=32,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
        )
    )


def _named(step: int, rows: int) -> dict[str, Tensor]:
    tokens, labels = _tokens(step, rows)
    return {"input_ids": tokens, "labels": labels}


def _pairs(step: int, rows: int) -> dict[str, Tensor]:
    tokens, labels = _tokens(step, rows)
    return {"source": tokens, "target": tokens.flip(1), "labels": labels}


def _dict_loss(output: Any, batch: Any) -> Tensor:
    return losses.cross_entropy(output["logits"], batch)


def _class_loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def _extra_loss(output: Tensor, batch: Any) -> Tensor:
    return ((output - batch["extra"]) ** 2).mean()


def _square_loss(output: Tensor, batch: Any) -> Tensor:
    return (output**2).mean()


CASES: dict[str, Case] = {
    "gpt": Case(
        lambda: Decoder(llama(layers=2, hidden=16, heads=4, kv_heads=2, vocab=VOCAB, sequence=12)), _tokens, losses.cross_entropy
    ),
    "gpt-tied": Case(
        lambda: Decoder(llama(layers=2, hidden=16, heads=4, kv_heads=2, vocab=VOCAB - 1 + 2, sequence=12, tied=True)),
        _tokens,
        losses.cross_entropy,
    ),
    "gpt-learned": Case(
        lambda: Decoder(gpt(layers=2, hidden=16, heads=2, vocab=VOCAB, sequence=12)), _tokens, losses.cross_entropy
    ),
    "hf-gpt2": Case(lambda: _hugging_face("gpt2"), _named, losses.cross_entropy),
    "hf-llama": Case(lambda: _hugging_face("llama"), _named, losses.cross_entropy),
    "encoder-decoder": Case(EncoderDecoder, _pairs, _dict_loss, losses.cross_entropy.count),  # type: ignore[attr-defined]
    "resnet": Case(ResNet, _pixels, _class_loss),
    "recurrent": Case(Recurrent, _tokens, losses.cross_entropy),
    "lora": Case(_lora, _tokens, losses.cross_entropy),
    "unused": Case(Unused, _flagged, _extra_loss),
    "rows": Case(Rows, _vectors, _square_loss),
}


class UNet(nn.Module):
    """As many blocks down as up; what each of the first makes jumps to one of the last, which work in place."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()) for _ in range(depth))
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU())
        self.up = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(depth))
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1))
        return self.head(x.mean((2, 3)))


class DeepEncoderDecoder(nn.Module):
    """Eight blocks; one table for both inputs and the output, so that three stages can share it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.transformer = nn.Transformer(16, 2, 4, 4, 32, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        hidden = self.transformer(self.embedding(source), self.embedding(target))
        return {"logits": F.linear(hidden, self.embedding.weight)}


def _t5(layers: int = 2) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": layers, "vocab_size": VOCAB}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def _t5_batch(step: int, rows: int) -> dict[str, Tensor]:
    tokens, labels = _tokens(step, rows)
    return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1), "labels": labels}


def _logits_loss(output: Any, batch: Any) -> Tensor:
    return losses.cross_entropy(output.logits, batch)


_COUNT = losses.cross_entropy.count  # type: ignore[attr-defined]

DEEP: dict[str, Case] = {
    "gpt-8": Case(
        lambda: Decoder(llama(layers=8, hidden=16, heads=4, kv_heads=2, vocab=VOCAB, sequence=12, tied=True)),
        _tokens,
        losses.cross_entropy,
    ),
    "encoder-decoder-8": Case(DeepEncoderDecoder, _pairs, _dict_loss, _COUNT),
    "unet": Case(UNet, _pixels, _class_loss),
    "hf-t5": Case(_t5, _t5_batch, _logits_loss, _COUNT),
    "gpt-learned-8": Case(
        lambda: Decoder(gpt(layers=8, hidden=16, heads=2, vocab=VOCAB, sequence=12)), _tokens, losses.cross_entropy
    ),
    "hf-gpt2-8": Case(lambda: _hugging_face("gpt2", 8), _named, losses.cross_entropy),
    "hf-llama-8": Case(lambda: _hugging_face("llama", 8), _named, losses.cross_entropy),
    "hf-t5-8": Case(lambda: _t5(4), _t5_batch, _logits_loss, _COUNT),
    "resnet-8": Case(lambda: ResNet(8), _pixels, _class_loss),
    "unet-8": Case(lambda: UNet(4), _pixels, _class_loss),
    "lora-8": Case(lambda: _lora(8), _tokens, losses.cross_entropy),
    "unused-8": Case(lambda: Unused(8), _flagged, _extra_loss),
}
"""Models with room for more stages, for pipelines only."""


def find(name: str) -> Case:
    return CASES[name] if name in CASES else DEEP[name]


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a case's model with the same values wherever it is called; the second dtype of `rows` is kept."""
    torch.manual_seed(7)
    model = find(name).build()
    if name == "rows":
        model.first.to(dtype)
        model.second.to(dtype)
        return model
    return model.to(dtype)
