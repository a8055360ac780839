"""Model specs: the text after `--model`, turned into a zero-argument factory.

A spec is a preset (`gpt-tiny`), an inline size (`gpt:layers=4,hidden=128,heads=4`, `llama:...`), or
`package.module:callable`. This file only names models and their sizes; building and capturing them is left to others.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any

import torch
from torch import nn

from meshwright.errors import ConfigError
from meshwright.models import decoder

FAMILIES: dict[str, Callable[..., decoder.DecoderConfig]] = {"gpt": decoder.gpt, "llama": decoder.llama}


@dataclass(frozen=True)
class ModelSpec:
    """A model by name: `build()` makes it on the current default device; `config` is None for a user's own callable."""

    text: str
    build: Callable[[], nn.Module]
    config: decoder.DecoderConfig | None = None

    def sample(self, model: nn.Module, seq: int | None) -> tuple[Any, Callable[[Any, Any], torch.Tensor] | None]:
        """A batch for a capture and the loss that goes with it; `seq` tokens, or as many as the model takes.

        Raises `ConfigError` for a user's own callable, which alone knows what its forward takes.
        """
        if self.config is not None:
            tokens = torch.zeros(2, seq or self.config.sequence, dtype=torch.int64, device="cpu")
            return tokens, next_token_loss
        raise ConfigError(f"model {self.text!r} needs a batch: call meshwright.inspect(module, batch)")


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits `[B, S, V]` against targets `[B, S]`, in the logits' dtype; for captures only."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@cache
def presets() -> dict[str, str]:
    """The named models of `presets.toml`: name -> inline size."""
    text = resources.files("meshwright.blueprint").joinpath("presets.toml").read_text()
    return {name: entry["spec"] for name, entry in tomllib.loads(text).items()}


def parse_spec(text: str, **overrides: Any) -> ModelSpec:
    """Read a model spec; `overrides` (such as `sequence=256`) fill sizes that the text leaves open.

    Raises `ConfigError` in one sentence for an unknown preset, family, key or value.
    """
    inline = presets().get(text, text)
    family, _, rest = inline.partition(":")
    if family in FAMILIES:
        config = FAMILIES[family](**(overrides | _sizes(rest, text)))
        if config.hidden % config.heads or config.heads % config.kv_heads:
            raise ConfigError(
                f"model {text!r}: heads={config.heads} must divide hidden={config.hidden} "
                f"and be a multiple of kv_heads={config.kv_heads}"
            )
        return ModelSpec(text, partial(decoder.Decoder, config), config)
    if rest:
        return ModelSpec(text, _import(family, rest, text))
    near = difflib.get_close_matches(text, list(presets()), n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"unknown model {text!r}: the nearest preset is {near!r}; or use gpt:..., llama:..., package.module:callable"
    )


def _sizes(rest: str, text: str) -> dict[str, Any]:
    fields = {field.name: field.type for field in dataclasses.fields(decoder.DecoderConfig)}
    sizes: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ConfigError(f"model {text!r} has no size {key!r}: the nearest is {near!r}")
        try:
            sizes[key] = (
                {"on": True, "off": False}[value] if fields[key] == "bool" else _number(value, str(fields[key]))
            )
        except (KeyError, ValueError):
            raise ConfigError(f"model {text!r}: {key}={value!r} is not a value of type {fields[key]}") from None
    return sizes


def _number(value: str, kind: str) -> int | float | str:
    return int(value) if kind == "int" else float(value) if kind == "float" else value


def _import(module: str, name: str, text: str) -> Callable[[], nn.Module]:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model {text!r} can't be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"model {text!r} is a {type(found).__name__}, not a callable that returns a module")
    return found  # type: ignore[no-any-return]
