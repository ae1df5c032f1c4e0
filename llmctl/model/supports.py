"""Which switches of `ModelConfig` a piece of code knows: a whitelist, so that a switch added later is never ignored.

Code that assumes a block's math names the fields that it handles, and `unsupported` returns the others that are set.
A new field of `ModelConfig` is then unsupported everywhere until a piece of code names it.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.model.shapes import default_scale

SIZES = frozenset(
    {
        *("vocab_size", "d_model", "n_layers", "n_decoder_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"),
        "max_positions",
    }
)
HEAD = frozenset({"tie_embeddings", "logits_scale", "logits_bias", "head_transform"})
"""What follows the last block of a language model."""
CLASSIFIER = frozenset({"n_labels", "problem", "pooling", "pooled_activation", "labels"})
TOKEN_IDS = frozenset({"pad_id", "bos_id", "eos_id", "mask_id", "decoder_start_id"})
TRAINING = frozenset({"dropout", "init_std"})
OUTSIDE_BLOCKS = SIZES | HEAD | CLASSIFIER | TOKEN_IDS | TRAINING
"""Fields that leave the math of a block as it is."""

BLOCK = OUTSIDE_BLOCKS | {
    *("norm_eps", "n_token_types", "embedding_scale", "attention_scale", "attention_windows"),
    *("rope_theta", "position_offset", "n_relative_buckets", "max_relative_distance"),
}
BLOCK_CHOICES: dict[str, tuple[Any, ...]] = {
    "family": ("decoder", "encoder", "encoder_decoder"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_position": ("pre", "post"),
    "positions": ("rope", "learned", "sinusoidal", "relative", "none"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    **dict.fromkeys(("embedding_norm", "gated", "attention_bias", "mlp_bias", "qk_norm", "query_layer"), (False, True)),
}
"""The fields and values that all code about blocks knows: the blocks of Llama, BERT, BART, T5, GPT-2 and PanGu-Alpha.

Do not extend these two: code that learns a later switch adds it to a set of its own.
"""

AROUND_MATRICES = frozenset(
    {
        *("rope_thetas", "rotary_dim", "rope_scaling", "rope_scaling_values", "rope_scaling_layers"),
        *("residual_scale", "norm_bias", "attention_output_bias", "mlp_output_bias", "sinusoid_rates"),
        *("attention_softcap", "logits_softcap", "head_transform_bias", "qk_norm_kind"),
    }
)
"""Later fields that change what happens between a block's matrices, not which there are and what they read."""

EXPERTS = frozenset({"n_experts", "n_active_experts", "normalized_experts"})
"""A mixture of experts in place of a feed-forward layer."""

# Field -> whether it has an effect, of fields that matter only together with others.
HAS_EFFECT: Mapping[str, Callable[[ModelConfig], bool]] = {
    "n_decoder_layers": lambda config: config.family == "encoder_decoder",
    "rope_theta": lambda config: config.positions == "rope",
    "position_offset": lambda config: config.positions in ("learned", "sinusoidal"),
    **dict.fromkeys(
        ("n_relative_buckets", "max_relative_distance"),
        lambda config: config.positions in ("relative", "disentangled") or config.relative_bias,
    ),
    "qk_norm_kind": lambda config: config.qk_norm,
    **dict.fromkeys(("n_active_experts", "normalized_experts"), lambda config: config.n_experts > 0),
    "alibi_scale": lambda config: config.positions == "alibi",
    "sinusoid_rates": lambda config: config.positions == "sinusoidal",
    "norm_bias": lambda config: config.norm == "layernorm",
    "head_transform_bias": lambda config: config.head_transform,
    **dict.fromkeys(
        ("rotary_dim", "rope_scaling", "rope_scaling_values", "rope_scaling_layers"),
        lambda config: config.positions == "rope",
    ),
    "rope_thetas": lambda config: config.positions == "rope" and {*config.rope_thetas} - {config.rope_theta} != set(),
    "architecture": lambda _: False,
    "attention_windows": lambda config: any(config.attention_windows),
    # 0 and the default scale mean the same; a complete config states the number.
    "attention_scale": lambda config: (
        not config.head_dim or not close(config.attention_scale, default_scale(config.positions, config.head_dim))
    ),
    "head": lambda config: config.n_labels > 0,
    **dict.fromkeys(
        ("problem", "pooling", "pooled_activation"), lambda config: config.n_labels > 0 and config.head == "text"
    ),
}


def close(value: float, other: float) -> bool:
    """Tell whether two factors are the same number, up to the rounding of the program that computed them."""
    return math.isclose(value, other, rel_tol=1e-6)


def effective(config: ModelConfig) -> ModelConfig:
    """Return the config with every field that has no effect at its default."""
    defaults = {field.name: field.default for field in fields(config)}
    idle: dict[str, Any] = {name: defaults[name] for name, has_effect in HAS_EFFECT.items() if not has_effect(config)}
    return replace(config, **idle)


def unsupported(
    config: ModelConfig, named: Collection[str], choices: Mapping[str, tuple[Any, ...]] | None = None
) -> list[str]:
    """Return the fields that are set and that the caller does not handle; the config is complete.

    named: fields that are handled whatever their value. choices: field -> the values that are handled, for fields to
    which a later version may add values. Any other field must have its default, or no effect.
    """
    shown = effective(config)
    problems = []
    for field in fields(shown):
        value = getattr(shown, field.name)
        allowed = (choices or {}).get(field.name, (field.default,))
        if field.name not in named and value not in allowed:
            problems.append(field.name)
    return problems


def describe(config: ModelConfig, names: Collection[str]) -> str:
    """Return fields with their values, for an error message."""
    return ", ".join(f"`model.{name}` {getattr(config, name)!r}" for name in names)
