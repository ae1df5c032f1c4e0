"""Llama and its kin: the names and the maths that our own default models have.

`LlamaForCausalLM` (Touvron et al. 2023, arXiv:2302.13971), `Qwen3ForCausalLM` (Yang et al. 2025, arXiv:2505.09388;
normalized queries and keys), `EuroBertForMaskedLM` (Boizard et al. 2025, arXiv:2503.05500; the same block, looking
both ways), and `MistralForCausalLM` as long as its window spans the context (then it is Llama).
"""

from collections.abc import Mapping
from typing import Any

from llmctl.config import ModelConfig
from llmctl.formats.families.family import (
    FamilyFormat,
    Published,
    activation_name,
    close,
    has,
    is_common,
    token_ids,
)
from llmctl.formats.families.parameters import Stored, plain
from llmctl.model.parameters import parameter_shapes


def layout(config: ModelConfig) -> list[Stored]:
    """Every parameter is stored under its own name; a tied head is not stored."""
    names = parameter_shapes(config)
    return [plain(name, name) for name in names if not (config.tie_embeddings and name == "lm_head.weight")]


def read(hf: Published, **values: Any) -> ModelConfig:
    """Read what the kin share."""
    n_heads, d_model = hf.integer("num_attention_heads"), hf.integer("hidden_size")
    head_dim = hf.integer("head_dim", max(d_model // n_heads, 1))
    fields: dict[str, Any] = {
        "family": "decoder",
        "vocab_size": hf.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": hf.integer("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": hf.integer("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "d_ff": hf.integer("intermediate_size"),
        "max_positions": hf.integer("max_position_embeddings", 2048),
        "norm_eps": hf.number("rms_norm_eps", 1e-6),
        "rope_theta": hf.rope_theta(),
        "activation": hf.activation("hidden_act", "silu"),
        "attention_bias": hf.flag("attention_bias"),
        "mlp_bias": hf.flag("mlp_bias"),
        "attention_scale": head_dim**-0.5,
        "tie_embeddings": hf.flag("tie_word_embeddings"),
        "dropout": hf.number("dropout", 0.0),
        "init_std": hf.number("initializer_range", 0.02),
    }
    return ModelConfig(**(fields | hf.ids() | values))


def write(config: ModelConfig) -> dict[str, Any]:
    """Write what the kin share, for old readers (`rope_theta`) and new ones (`rope_parameters`)."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config),
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "dropout": config.dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **token_ids(config),
    }


def is_kin(config: ModelConfig) -> bool:
    """Say whether the config is of Llama's block: pre-norm RMSNorm, rotary positions, gated."""
    return (
        has(config, norm="rmsnorm", norm_position="pre", positions="rope", gated=True, embedding_norm=False)
        and has(config, n_token_types=0, head_transform=False, embedding_scale=1.0, logits_scale=1.0)
        and close(config.attention_scale, config.head_dim**-0.5)
        and is_common(config)
    )


def read_llama(values: Mapping[str, Any]) -> ModelConfig:
    """Read a Llama configuration."""
    hf = Published(values, "LlamaForCausalLM")
    hf.only("pretraining_tp", 1, 0)
    return read(hf)


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """Write a Llama configuration."""
    return write(config) | {"mlp_bias": config.mlp_bias}


def matches_llama(config: ModelConfig) -> bool:
    """Say whether the config is Llama's."""
    return is_kin(config) and has(config, family="decoder", qk_norm=False, logits_bias=False) and divides(config)


def divides(config: ModelConfig) -> bool:
    """Say whether the heads divide the width, which transformers insists on even where `head_dim` is given."""
    return config.d_model % config.n_heads == 0


def read_mistral(values: Mapping[str, Any]) -> ModelConfig:
    """Read a Mistral configuration whose window spans the context: it is Llama."""
    hf = Published(values, "MistralForCausalLM")
    config = read(hf)
    window = values.get("sliding_window")
    if window is not None and hf.integer("sliding_window") < config.max_positions:
        raise hf.refuse("sliding_window", window, f"null, or at least max_position_embeddings, {config.max_positions}")
    return config


def read_qwen3(values: Mapping[str, Any]) -> ModelConfig:
    """Read a Qwen3 configuration without sliding windows."""
    hf = Published(values, "Qwen3ForCausalLM")
    hf.only("use_sliding_window", False)
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise hf.refuse("layer_types", layer_types, "full_attention in every layer")
    return read(hf, qk_norm=True, mlp_bias=False, head_dim=hf.integer("head_dim", 128))


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Write a Qwen3 configuration."""
    return write(config) | {"use_sliding_window": False, "sliding_window": None}


def matches_qwen3(config: ModelConfig) -> bool:
    """Say whether the config is Qwen3's."""
    return is_kin(config) and has(config, family="decoder", qk_norm=True, logits_bias=False, mlp_bias=False)


def read_eurobert(values: Mapping[str, Any]) -> ModelConfig:
    """Read a EuroBERT configuration; the bias of its head goes with the biases of its feed-forward layers."""
    hf = Published(values, "EuroBertForMaskedLM")
    return read(hf, family="encoder", logits_bias=hf.flag("mlp_bias"))


def write_eurobert(config: ModelConfig) -> dict[str, Any]:
    """Write a EuroBERT configuration; `mask_token_id` may not be null there."""
    return write(config) | {"mlp_bias": config.mlp_bias, "mask_token_id": config.mask_id}


def matches_eurobert(config: ModelConfig) -> bool:
    """Say whether the config is EuroBERT's."""
    return (
        is_kin(config)
        and has(config, family="encoder", qk_norm=False)
        and config.logits_bias == config.mlp_bias
        and divides(config)
    )


def never(config: ModelConfig) -> bool:
    """Match nothing: for families that are read under their name and written under another."""
    del config
    return False


LLAMA = FamilyFormat(
    architecture="LlamaForCausalLM",
    model_type="llama",
    source="Touvron et al. 2023, arXiv:2302.13971",
    read_config=read_llama,
    write_config=write_llama,
    matches=matches_llama,
    layout=layout,
    ignored=("rotary_emb.inv_freq",),
)

MISTRAL = FamilyFormat(
    architecture="MistralForCausalLM",
    model_type="mistral",
    source="Jiang et al. 2023, arXiv:2310.06825",
    read_config=read_mistral,
    write_config=write_llama,
    matches=never,
    layout=layout,
)

QWEN3 = FamilyFormat(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    source="Yang et al. 2025, arXiv:2505.09388",
    read_config=read_qwen3,
    write_config=write_qwen3,
    matches=matches_qwen3,
    layout=layout,
)

EUROBERT = FamilyFormat(
    architecture="EuroBertForMaskedLM",
    model_type="eurobert",
    source="Boizard et al. 2025, arXiv:2503.05500",
    read_config=read_eurobert,
    write_config=write_eurobert,
    matches=matches_eurobert,
    layout=layout,
)
