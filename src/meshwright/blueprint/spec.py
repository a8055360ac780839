"""Model specs: the text after `--model`, turned into a zero-argument factory.

A spec is a preset (`gpt-tiny`), an inline size (`gpt:layers=4,hidden=128,heads=4`, `llama:...`), the path of a Hugging
Face `config.json`, or `package.module:callable`. This file only names models and their sizes; building and capturing
them is left to others.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshwright.blueprint.sample import LossFn
from meshwright.errors import ConfigError, first_line
from meshwright.models import decoder

_LARGEST_MATRIX = 1 << 58  # elements: torch counts bytes in 64 bits

FAMILIES: dict[str, Callable[..., decoder.DecoderConfig]] = {"gpt": decoder.gpt, "llama": decoder.llama}


@dataclass(frozen=True)
class ModelSpec:
    """A model by name: `build()` makes it on the current default device.

    `config` is None for a user's own callable and for a Hugging Face model, whose configuration is `library_config`.
    """

    text: str
    build: Callable[[], nn.Module]
    config: decoder.DecoderConfig | None = None
    library_config: Any = None

    def with_sequence(self, seq: int | None) -> ModelSpec:
        """The same model for `seq` tokens where that costs nothing but a longer rotary table; otherwise as it is."""
        if self.config is None or not seq or seq <= self.config.sequence or self.config.positions != "rotary":
            return self
        config = dataclasses.replace(self.config, sequence=seq)
        return ModelSpec(self.text, partial(decoder.Decoder, config), config)

    def sample(self, model: nn.Module, seq: int | None, items: int = 2) -> tuple[Any, LossFn | None]:
        """A batch of `items` for a capture, and its loss; `seq` tokens, or as many as the model takes.

        A user's own callable is taken for a language model, as `train` takes it: `seq` tokens (256 by default).
        Raises `ConfigError` for a `seq` below 1, or longer than the model's positions.
        """
        if seq is not None and seq < 1:
            raise ConfigError(f"model {self.text!r}: seq={seq} must be at least 1")
        if self.config is not None:
            length = seq or self.config.sequence
            if length > self.config.sequence:
                raise ConfigError(f"model {self.text!r}: seq={length} is more than its sequence={self.config.sequence}")
            return torch.zeros(items, length, dtype=torch.int64, device="cpu"), next_token_loss
        if self.library_config is not None:
            return _library_batch(model, self.library_config, seq, items), None
        return torch.zeros(items, seq or 256, dtype=torch.int64, device="cpu"), next_token_loss


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits `[B, S, V]` against targets `[B, S]`, in float32 for 16-bit logits; for captures only."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@dataclass(frozen=True)
class Preset:
    """A named model: its inline size, the source, the published parameters (billions) and what differs."""

    spec: str
    source: str
    params: float = 0.0
    note: str = ""


@cache
def presets() -> dict[str, Preset]:
    """The named models of `presets.toml`."""
    text = resources.files("meshwright.blueprint").joinpath("presets.toml").read_text()
    return {name: Preset(**entry) for name, entry in tomllib.loads(text).items()}


def parse_spec(text: str, **overrides: Any) -> ModelSpec:
    """Read a model spec; `overrides` (such as `sequence=256`) fill sizes that the text leaves open.

    A preset, `gpt:...` or `llama:...`, the path of a Hugging Face `config.json` (or its folder), or
    `package.module:callable`. Raises `ConfigError` in one sentence for an unknown preset, family, key, value or file.
    """
    inline = presets()[text].spec if text in presets() else text
    family, _, rest = inline.partition(":")
    if family in FAMILIES:
        config = FAMILIES[family](**(overrides | _sizes(rest, text)))
        _check(config, text)
        return ModelSpec(text, partial(decoder.Decoder, config), config)
    if text.endswith(".json") or Path(text).is_dir():
        return _library_model(text)
    if rest:
        return ModelSpec(text, _import(family, rest, text))
    near = difflib.get_close_matches(text, list(presets()), n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"unknown model {text!r}: the nearest preset is {near!r}; or use gpt:..., llama:..., a config.json, package.module:callable"
    )


def _check(config: decoder.DecoderConfig, text: str) -> None:
    low = [name for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "sequence") if getattr(config, name) < 1]
    if low:
        raise ConfigError(f"model {text!r}: {low[0]}={getattr(config, low[0])} must be at least 1")
    if config.hidden * max(config.hidden, config.ffn, config.vocab) * max(config.experts, 1) > _LARGEST_MATRIX:
        raise ConfigError(
            f"model {text!r}: hidden={config.hidden}, ffn={config.ffn} and vocab={config.vocab} make a matrix too large"
        )
    for name, choices in decoder.CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
            raise ConfigError(f"model {text!r}: {name}={value!r} is unknown: the nearest is {name}={near}")
    if (config.hidden % config.heads and not config.head_dim) or config.heads % config.kv_heads:
        raise ConfigError(
            f"model {text!r}: heads={config.heads} must divide hidden={config.hidden} "
            f"and be a multiple of kv_heads={config.kv_heads}"
        )
    if config.experts and not 0 < config.topk <= config.experts:
        raise ConfigError(f"model {text!r}: topk={config.topk} must be between 1 and experts={config.experts}")


def _library_model(text: str) -> ModelSpec:
    """A model of the transformers library from its configuration file; no weights are read."""
    path = Path(text)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"model {text!r}: there is no such file; pass the path of a Hugging Face config.json")
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"model {text!r} needs the transformers package: pip install transformers") from None
    try:
        config = transformers.AutoConfig.from_pretrained(str(path))
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"model {text!r} is not a configuration that transformers knows: {first_line(error)}") from error
    config.use_cache = False
    named = next((getattr(transformers, name, None) for name in config.architectures or ()), None)
    auto = next((a for a in _heads(transformers) if type(config) in a._model_mapping), transformers.AutoModel)
    build = partial(named._from_config, config) if named is not None else partial(auto.from_config, config)
    return ModelSpec(text, build, None, config)


def _heads(transformers: Any) -> list[Any]:
    return [
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForImageClassification,
    ]


def _library_batch(model: nn.Module, config: Any, seq: int | None, items: int) -> dict[str, torch.Tensor]:
    """Inputs by the names that the model's forward takes: token ids, an image, or features, with labels where there is
    a loss.
    """
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    longest = getattr(config, "max_position_embeddings", None) or 2048
    tokens = torch.ones(items, seq or min(longest, 2048), dtype=torch.int64, device="cpu")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return {main: torch.empty(items, getattr(config, "num_channels", 3), height, width, device="cpu")}
    batch = {main: tokens}
    if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens
    has_loss = "labels" in accepted and type(model).__name__.endswith(("LM", "LMHeadModel", "Generation"))
    return batch | ({"labels": tokens} if has_loss else {})


def _sizes(rest: str, text: str) -> dict[str, Any]:
    fields = {field.name: field.type for field in dataclasses.fields(decoder.DecoderConfig)}
    sizes: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ConfigError(f"model {text!r} has no size {key!r}: the nearest is {near!r}")
        if key in sizes:
            raise ConfigError(f"model {text!r}: {key} is given twice")
        try:
            sizes[key] = {"on": True, "off": False}[value] if fields[key] == "bool" else _number(value, str(fields[key]))
        except (KeyError, ValueError):
            raise ConfigError(f"model {text!r}: {key}={value!r} is not a value of type {fields[key]}") from None
    return sizes


def _number(value: str, kind: str) -> int | float | str:
    return int(value) if kind == "int" else float(value) if kind == "float" else value


def _import(module: str, name: str, text: str) -> Callable[[], nn.Module]:
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"model {text!r} can't be imported: {module!r} is not the name of a module")
    # The installed command does not look in the folder that it is called in, as `python -m` does.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's file raises while it is imported
        raise ConfigError(f"model {text!r} can't be imported: {type(error).__name__}: {first_line(error)}") from error
    if not callable(found):
        raise ConfigError(f"model {text!r} is a {type(found).__name__}, not a callable that returns a module")
    return found  # type: ignore[no-any-return]
