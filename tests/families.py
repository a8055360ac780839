"""Small Hugging Face models of many families, built from their configuration classes; not one has a line of its own.

`parity(family, plan)` runs on every rank: loss and all gradients under the plan against the plain model in the same process.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from huggingface import SMALL
from torch import Tensor, nn

import meshwright as mw
from meshwright import losses
from meshwright.errors import MeshwrightError
from parity import share

FAMILIES = (
    *("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "bert", "t5", "vit", "whisper"),
    *("gemma2", "phi3", "falcon", "opt", "bloom", "gptj", "gpt_bigcode", "stablelm", "olmo", "olmo2", "cohere", "granite"),
    *("starcoder2", "mixtral", "qwen2_moe", "roberta", "distilbert", "bart", "electra", "codegen", "mpt", "glm", "smollm3"),
)
SINGLE_PRECISION_INSIDE = {"gemma", "gemma2", "gptj", "cohere", "codegen"}
"""Compute norms or rotary positions in float32 whatever the model's dtype: sums taken in another order differ by its rounding."""

_EXTRA: dict[str, Any] = {
    "ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "d_kv": 16,
    "image_size": 16,
    "patch_size": 4,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "n_head": 4,
    "n_heads": 4,
    "n_inner": 96,
    "dim": 64,
    "hidden_dim": 96,
    "attention_heads": 4,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "rotary_dim": 8,
    "n_positions": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 0,
    "attn_implementation": "sdpa",
}
_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
VOCAB = 128


def build(family: str, layers: int = 2) -> nn.Module:
    """The family's model with a head, float64, without dropout; `layers` in the encoder and as many in the decoder, if any."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    defaults = kind().to_dict()
    wanted = SMALL | _EXTRA | dict.fromkeys(_LAYERS, layers) | {"pad_token_id": 1}
    sizes = {key: value for key, value in wanted.items() if key in defaults and defaults[key] is not None}
    sizes.pop("attn_implementation", None)
    if "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = 2
    config = kind(**sizes)
    config._experts_implementation = "eager"  # grouped products know no float64
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for auto in ("SpeechSeq2Seq", "Seq2SeqLM", "MaskedLM", "ImageClassification", "CausalLM"):
            try:
                return getattr(transformers, f"AutoModelFor{auto}").from_config(config).double().eval()
            except ValueError:
                continue
    raise LookupError(family)


def batch(family: str, rows: int = 4, sequence: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (rows, sequence), generator=generator)
    labels = torch.randint(3, VOCAB, (rows, sequence), generator=generator)
    labels[0, :5] = losses.IGNORED
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator).double(), "labels": labels[:, 8] % 2}
    if family == "whisper":
        sound = torch.randn(rows, 8, 32, generator=generator).double()
        return {"input_features": sound, "decoder_input_ids": tokens, "labels": labels}
    if family in ("t5", "bart"):
        return {"input_ids": tokens.flip(1), "decoder_input_ids": tokens, "labels": labels}
    return {"input_ids": tokens, "labels": labels}


def _forward(model: nn.Module, entries: Any) -> Any:
    return model(**{key: value for key, value in entries.items() if key != "labels"}).logits


def _loss(output: Any, entries: Any) -> Tensor:
    return losses.cross_entropy(output, entries) if output.dim() == 3 else _classes(output, entries["labels"])


def _classes(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels)


def _count(entries: Any) -> int:
    return int((entries["labels"] != losses.IGNORED).sum())


def parity(family: str, plan: str, layers: int = 2, rows: int = 4) -> dict[str, Any]:
    """Largest relative error of loss and gradients, how many parameters are cut, or the refusal."""
    torch.set_num_threads(1)
    entries = batch(family, rows)
    reference = build(family, layers)
    expected = _loss(_forward(reference, entries), entries)
    expected.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters(remove_duplicate=False) if p.grad is not None}
    try:
        engine = mw.parallelize(
            build(family, layers),
            plan,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
            loss_fn=_loss,
            count_fn=_count,
            forward_fn=_forward,
            example_batch=entries,
        )
        mine = share(entries, engine.data_rank, engine.data_ranks)
        metrics = engine.step(mine)
        if engine.pipeline is None:
            engine(mine)
            engine.zero_grad()
            loss = _loss(engine(mine), mine)
            engine.backward(loss)
        else:
            engine.accumulate(mine)
        if engine.pipeline is not None or engine.data_ranks > 1:
            loss = expected  # by hand a rank has the loss of its share, or of its stages: nothing to compare
        found = engine.full_gradients()
    except MeshwrightError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    partition = engine._applied.partition
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    worst = {
        name: (found[name] - gradient).abs().max().item() / max(gradient.abs().max().item(), 1e-3 * largest)
        for name, gradient in gradients.items()
        if name in found
    }
    missing = set(gradients) ^ set(found)  # on rank 0; elsewhere nothing is found
    unique = {id(p): p.grad for p in reference.parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in unique.values()]).sum().sqrt().item()
    return {
        "loss": max(abs(metrics.loss - expected.item()), abs(loss.item() - expected.item())) / abs(expected.item()),
        "norm": abs(metrics.grad_norm - norm) / norm,
        "gradients": max(worst.values(), default=0.0),
        "worst": max(worst, key=worst.get) if worst else "",  # type: ignore[arg-type]
        "missing": sorted(missing),
        "cut": len(partition.cuts.parameters) if partition else 0,
        "regions": len(partition.cuts.regions) if partition else 0,
        "blocks": len(partition.blocks) if partition else 0,
        "parameters": len(gradients),
    }
