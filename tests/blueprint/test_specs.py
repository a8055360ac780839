"""Presets have the published number of parameters, and every kind of spec builds and can be inspected."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from meshwright.blueprint.execute import build_on_meta
from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.spec import parse_spec, presets
from meshwright.errors import ConfigError, ModelError


@pytest.mark.parametrize("name", presets())
def test_presets_have_the_published_size(name: str) -> None:
    preset = presets()[name]
    assert preset.source
    model = build_on_meta(parse_spec(name).build)
    if preset.params:
        billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
        assert billions == pytest.approx(preset.params, rel=0.013)


def test_overrides_fill_what_the_text_leaves_open() -> None:
    assert parse_spec("gpt:layers=2", sequence=99).config.sequence == 99  # type: ignore[union-attr]
    assert parse_spec("gpt2", sequence=99).config.sequence == 1024  # type: ignore[union-attr]


def test_a_longer_sequence_where_positions_are_rotary() -> None:
    assert inspect("llama:layers=2,hidden=32,heads=4,sequence=16", seq=64).sequence == 64
    with pytest.raises(ConfigError, match="seq=64"):
        inspect("gpt:layers=2,hidden=32,heads=4,sequence=16", seq=64)


def test_every_size_of_the_inline_form() -> None:
    text = "llama:layers=2,hidden=32,heads=4,kv_heads=2,ffn=48,vocab=64,tied=on,attention=eager"
    text += ",experts=4,topk=1,moe_ffn=16"
    config = parse_spec(text).config
    assert config is not None
    assert (config.kv_heads, config.tied, config.experts, config.topk, config.moe_ffn) == (2, True, 4, 1, 16)
    assert config.attention == "eager"
    assert inspect(text, seq=16).kinds[0].experts is not None


@pytest.mark.parametrize("folder", [False, True])
def test_a_library_configuration_file(tmp_path: Path, folder: bool) -> None:
    pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))
    blueprint = inspect(str(tmp_path if folder else file), seq=16)
    assert blueprint.class_name == "LlamaForCausalLM"
    assert blueprint.sequence == 16
    assert len(blueprint.calls) == 3
    assert blueprint.batch[0].shape[1].at(1) == 16


def test_a_callable_of_the_users_own() -> None:
    spec = parse_spec("torch.nn:Identity")
    assert isinstance(spec.build(), nn.Identity)
    with pytest.raises(ModelError):  # it is taken for a language model, and has no logits
        inspect("torch.nn:Identity")
    blueprint = inspect(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))
    assert blueprint.n_parameters == 40


@pytest.mark.parametrize("text", ["torch.nn:Nothing", "nowhere:model", "torch:float32", "llama:experts=2,topk=3", "gpt:layers=0"])
def test_what_can_not_be_built_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_spec(text)
