"""Hugging Face models: captured as they run, with and without a mask, and compared with what their authors published."""

import copy
import os
from typing import Any

import pytest
import torch
from huggingface import build, compare
from real_run import one_block, whole_model
from torch import nn

from meshwright.blueprint.blocks import block_names
from meshwright.blueprint.execute import build_on_meta
from meshwright.blueprint.inspection import inspect

transformers = pytest.importorskip("transformers")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

SAME = (
    "llama",
    "mixtral",
    "qwen3_next",
    "gpt_neox",
    "phi3",
    "deepseek_v3",
    "gemma3_text",
    "cohere",
    "jamba",
    "llama4_text",
)
DIFFERENT = {
    # A norm over all heads' features stands between query and scores: its weight needs them whole, so ours stay
    # replicated.
    "olmo2": ["o_proj"],
    # One key head in the global layers can't be divided: ours splits the queries only.
    "embedding_gemma2_text": ["k_proj", "v_proj"],
}


def sample() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"input_ids": torch.randint(3, 128, (4, 32))}


def on_meta(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta")


@pytest.mark.parametrize("architecture", SAME)
def test_plan_and_blocks_agree(architecture: str) -> None:
    model, config = build(architecture, sample())
    found = compare(inspect(on_meta(model), sample()), model, config)
    assert found.blocks_equal
    assert found.total > 0
    assert found.differences == []


@pytest.mark.parametrize("architecture", DIFFERENT)
def test_plan_differs_for_a_reason(architecture: str) -> None:
    model, config = build(architecture, sample())
    found = compare(inspect(on_meta(model), sample()), model, config)
    assert found.blocks_equal
    named = {difference.partition(":")[0].split(".")[-2] for difference in found.differences}
    assert named == set(DIFFERENT[architecture])


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_neox", "qwen3_next", "deepseek_v3", "gemma3_text"])
@pytest.mark.parametrize("mask", ["no mask", "full mask", "padding"])
def test_captured_as_it_runs(architecture: str, mask: str) -> None:
    """Libraries take other paths when they see tracing or a mask: ops, FLOPs and saved bytes must be those of the run."""
    batch = sample()
    model, _ = build(architecture, batch)
    if mask != "no mask":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if mask == "padding":
        batch["attention_mask"][:, :5] = 0
    torch.manual_seed(0)
    run = whole_model(model, batch)
    blueprint = inspect(on_meta(model), batch)
    assert blueprint.forward_flops(4) == run.forward_flops
    assert blueprint.backward_flops(4) == run.backward_flops
    assert blueprint.saved_bytes(4) == run.saved_without_state


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_block_ops_are_those_dispatched(architecture: str) -> None:
    batch = sample()
    model, _ = build(architecture, batch)
    for unit in inspect(on_meta(model), batch).kinds:
        run = one_block(model, unit.instances[0], batch)
        assert [op.name for op in unit.forward] == run.forward_ops
        assert [op.name for op in unit.backward] == run.backward_ops


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 64, "use_cache": False}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}


def words(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randint(3, 64, (4, 12)) for name in names}


def picture() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32)}


OTHERS: dict[str, Any] = {
    "t5": lambda t: t.T5ForConditionalGeneration(t.T5Config(**T5, decoder_start_token_id=0)),
    "resnet": lambda t: t.ResNetForImageClassification(t.ResNetConfig(**RESNET)),
    "vit": lambda t: t.ViTModel(t.ViTConfig(**SIZES, image_size=32, patch_size=8)),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**SIZES, vocab_size=64)),
    "albert": lambda t: t.AlbertModel(t.AlbertConfig(**SIZES, vocab_size=64, embedding_size=16)),
}
BATCHES: dict[str, Any] = {
    "t5": lambda: words("input_ids", "labels"),
    "resnet": picture,
    "vit": picture,
    "bert": lambda: words("input_ids", "labels"),
    "albert": lambda: words("input_ids"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_captured_as_they_run(name: str) -> None:
    torch.manual_seed(0)
    model, batch = OTHERS[name](transformers), BATCHES[name]()
    model.train()
    run = whole_model(model, batch)
    blueprint = inspect(on_meta(model), batch)
    assert blueprint.forward_flops(4) == run.forward_flops
    assert blueprint.backward_flops(4) == run.backward_flops
    assert blueprint.saved_bytes(4) == run.saved_without_state
    assert len(blueprint.calls) == {"t5": 6, "resnet": 4, "vit": 3, "bert": 3, "albert": 3}[name]


@pytest.mark.parametrize("config", ["Llama", "T5", "Bart", "ViT", "CLIP", "Whisper", "Mamba", "Jamba", "DeepseekV3", "ConvNext"])
def test_blocks_by_structure_are_the_published_ones(config: str) -> None:
    kind = getattr(transformers, f"{config}Config")
    model = build_on_meta(lambda: transformers.AutoModel.from_config(kind()))
    ours = {type(model.get_submodule(name)).__name__ for name in block_names(model)}
    assert ours
    assert ours <= set(model._no_split_modules)
