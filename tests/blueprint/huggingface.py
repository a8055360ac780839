"""Small Hugging Face models of every architecture with a published tensor-parallel plan, and what the plan says.

Only tests and benchmarks read `_no_split_modules` and `base_model_tp_plan`; the package derives its own answer from the
code.
"""

from __future__ import annotations

import importlib
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meshwright.blueprint.record import Blueprint, Unit

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "intermediate_size": 96,
    "d_ff": 96,
    "ffn_dim": 96,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_expand": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
}


def planned_architectures() -> list[str]:
    """Every architecture whose configuration class publishes a `base_model_tp_plan`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return [name for name, kind in CONFIG_MAPPING.items() if getattr(kind, "base_model_tp_plan", None)]


def build(architecture: str, batch: dict[str, torch.Tensor]) -> tuple[nn.Module, Any]:
    """A small base model (float32, on CPU) that runs on `batch`, and its configuration.

    Raises the library's own error if none of a few sets of small sizes fits the architecture.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[architecture]
    error: Exception = ValueError("no sizes")
    for sizes in _variants(kind().to_dict()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.device("meta"):
                    bare, _ = _make(kind, sizes)
                if sum(parameter.numel() for parameter in bare.parameters()) > 5e7:
                    raise ValueError("no small sizes are known for it")
                model, config = _make(kind, sizes)
                model.train()(**batch)
            return model, config
        except Exception as raised:
            error = raised
    raise error


def _variants(defaults: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = {key: value for key, value in SMALL.items() if key in defaults and defaults[key] is not None}
    if "qk_rope_head_dim" in defaults:
        sizes.pop("head_dim", None)  # there it is another name for the rotary part
    every_head = sizes | {"num_key_value_heads": 4} if "num_key_value_heads" in sizes else sizes
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    plain = {key: value for key, value in sizes.items() if key in _BASIC}
    groups = {"num_expert_group": 1, "num_group": 1, "n_group": 1, "topk_group": 1, "num_experts_per_token": 2}
    grouped = every_head | {key: value for key, value in groups.items() if key in defaults}
    alternatives = [sizes, every_head, sizes | {"rope_parameters": rope}, every_head | {"head_dim": 16}, grouped]
    return [*alternatives, sizes | {"head_dim": 8}, plain] if "hidden_size" in sizes else [sizes]


_BASIC = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "use_cache")


def _make(kind: Any, sizes: dict[str, Any]) -> tuple[nn.Module, Any]:
    import transformers

    config = kind(**sizes)
    try:
        return transformers.AutoModel.from_config(config), config
    except ValueError:
        return _class_of(kind)(config), config


def _class_of(kind: type) -> Any:
    """The model class of a configuration that no auto class knows: the one in its own module that takes it."""
    module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    classes = [c for c in vars(module).values() if isinstance(c, type) and getattr(c, "config_class", None) is kind]
    return next(c for c in reversed(classes) if c.__module__ == module.__name__ and not c.__name__.startswith("PreTrained"))


@dataclass
class Agreement:
    """How a blueprint compares with what the model's authors wrote."""

    architecture: str
    blocks_equal: bool = False
    ours: set[str] = field(default_factory=set)
    theirs: set[str] = field(default_factory=set)
    agree: int = 0
    total: int = 0
    differences: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


def _cut_dims(unit: Unit, path: str) -> set[int]:
    """The dims, counted from the last, on which a blueprint cuts the module or parameter `path`; empty if it is
    replicated.
    """
    shapes = {parameter.name: parameter.shape for parameter in unit.parameters}
    splits = [split for region in unit.regions for split in (*region.columns, *region.rows, *region.vectors)]
    return {s.dim - len(shapes[s.tensor]) for s in splits if s.tensor == path or s.tensor == f"{path}.weight"}


def compare(blueprint: Blueprint, model: nn.Module, config: Any) -> Agreement:
    """Blocks against `_no_split_modules`, weights against `base_model_tp_plan` (column and row entries of the blocks)."""
    result = Agreement(str(config.model_type))
    result.theirs = set(getattr(model, "_no_split_modules", None) or ())
    result.ours = {unit.class_name for unit in blueprint.kinds}
    result.blocks_equal = bool(result.ours) and result.ours <= result.theirs
    # The library's names are about storage: colwise cuts the last dim but one, rowwise the last.
    wanted = {"colwise": -2, "packed_colwise": -2, "rowwise": -1, "packed_rowwise": -1, "rowwise_split_input": -1}
    for pattern, style in config.base_model_tp_plan.items():
        if style not in wanted:
            continue
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"(\.weight|\.bias)?$")
        for unit in blueprint.kinds:
            name = unit.instances[0]
            paths = {p.name for p in unit.parameters if not p.buffer and expression.match(f"{name}.{p.name}")}
            paths = {p for p in paths if not p.endswith("bias")}
            for path in sorted(paths):
                result.total += 1
                ours = _cut_dims(unit, path.removesuffix(".weight"))
                rank = len(next(p.shape for p in unit.parameters if p.name == path))
                if (wanted[style] if rank > 1 else -1) in ours:
                    result.agree += 1
                else:
                    names = ", ".join(f"dim {dim}" for dim in sorted(ours)) or "replicated"
                    result.differences.append(f"{unit.class_name}.{path}: theirs {style}, ours {names}")
    return result
