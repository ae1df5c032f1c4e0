"""BERT: a post-norm encoder with learned positions and token types, with its masked-word head or without any.

Without a head (`BertModel`, as sentence encoders are published) the logits are those of the embedding itself: a tied
head without transform and bias holds no parameter of its own, so nothing is invented. The pooler, a head for
sentence pairs, is not part of our models and is left out.
Source: Devlin et al. 2019, arXiv:1810.04805.
"""

from collections.abc import Mapping
from typing import Any

from llmctl.config import ModelConfig
from llmctl.formats.families.family import (
    FamilyFormat,
    Published,
    activation_name,
    has,
    is_common,
    is_standard_attention,
    token_ids,
)
from llmctl.formats.families.parameters import Stored, plain, with_bias

LAYER_NAMES = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.o_proj",
    "attention.output.LayerNorm": "input_layernorm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "post_attention_layernorm",
}


def read_config(values: Mapping[str, Any], architecture: str, *, head: bool) -> ModelConfig:
    """Read a BERT configuration."""
    hf = Published(values, architecture)
    hf.only("position_embedding_type", "absolute")
    hf.only("is_decoder", False)
    hf.only("add_cross_attention", False)
    d_model, n_heads = hf.integer("hidden_size", 768), hf.integer("num_attention_heads", 12)
    head_dim = max(d_model // n_heads, 1)
    fields: dict[str, Any] = {
        "family": "encoder",
        "vocab_size": hf.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": hf.integer("num_hidden_layers", 12),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "d_ff": hf.integer("intermediate_size", 4 * d_model),
        "max_positions": hf.integer("max_position_embeddings", 512),
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": hf.number("layer_norm_eps", 1e-12),
        "embedding_norm": True,
        "positions": "learned",
        "n_token_types": hf.integer("type_vocab_size", 2),
        "activation": hf.activation("hidden_act", "gelu"),
        "gated": False,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_embeddings": hf.flag("tie_word_embeddings", default=True) or not head,
        "logits_bias": head,
        "head_transform": head,
        "dropout": hf.number("hidden_dropout_prob", 0.1),
        "init_std": hf.number("initializer_range", 0.02),
    }
    return ModelConfig(**(fields | hf.ids()))


def read_masked(values: Mapping[str, Any]) -> ModelConfig:
    """Read the configuration of a BERT with its masked-word head."""
    return read_config(values, "BertForMaskedLM", head=True)


def read_bare(values: Mapping[str, Any]) -> ModelConfig:
    """Read the configuration of a BERT without a head."""
    return read_config(values, "BertModel", head=False)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write a BERT configuration."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": activation_name(config),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": config.max_positions,
        "position_embedding_type": "absolute",
        "type_vocab_size": config.n_token_types,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **token_ids(config),
    }


def is_bert(config: ModelConfig) -> bool:
    """Say whether the config is BERT's below the head."""
    return (
        has(config, family="encoder", norm="layernorm", norm_position="post", embedding_norm=True)
        and has(config, positions="learned", position_offset=0, gated=False, attention_bias=True, mlp_bias=True)
        and has(config, embedding_scale=1.0, logits_scale=1.0)
        and config.n_token_types > 0
        and is_standard_attention(config)
        and is_common(config)
    )


def matches_masked(config: ModelConfig) -> bool:
    """Say whether the config is BERT's with the masked-word head."""
    return is_bert(config) and config.head_transform and config.logits_bias


def matches_bare(config: ModelConfig) -> bool:
    """Say whether the config is BERT's without a head."""
    return is_bert(config) and has(config, head_transform=False, logits_bias=False, tie_embeddings=True)


def layout_masked(config: ModelConfig) -> list[Stored]:
    """Return the tensors of a BERT with its masked-word head."""
    head = {"cls.predictions.transform.dense": "head_dense", "cls.predictions.transform.LayerNorm": "head_norm"}
    stored = [*body("bert.", config), *with_bias(head), plain("cls.predictions.bias", "lm_head.bias")]
    return stored if config.tie_embeddings else [*stored, plain("cls.predictions.decoder.weight", "lm_head.weight")]


def layout_bare(config: ModelConfig) -> list[Stored]:
    """Return the tensors of a BERT without a head."""
    return body("", config)


def body(prefix: str, config: ModelConfig) -> list[Stored]:
    """Return the tensors below the head."""
    there = prefix + "embeddings."
    stored = [
        plain(there + "word_embeddings.weight", "model.embed_tokens.weight"),
        plain(there + "position_embeddings.weight", "model.embed_positions.weight"),
        plain(there + "token_type_embeddings.weight", "model.embed_token_types.weight"),
        *with_bias({there + "LayerNorm": "model.embedding_norm"}),
    ]
    for layer in range(config.n_layers):
        there, here = f"{prefix}encoder.layer.{layer}.", f"model.layers.{layer}."
        stored += with_bias({there + key: here + value for key, value in LAYER_NAMES.items()})
    return stored


# bert-base-uncased itself still stores its norms under TensorFlow's names.
SPELLINGS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
# Buffers, heads of the next-sentence task, and the copies of a tied head.
IGNORED = ("position_ids", "pooler.", "cls.seq_relationship.", "cls.predictions.decoder.bias")

BERT = FamilyFormat(
    architecture="BertForMaskedLM",
    model_type="bert",
    source="Devlin et al. 2019, arXiv:1810.04805",
    read_config=read_masked,
    write_config=write_config,
    matches=matches_masked,
    layout=layout_masked,
    ignored=IGNORED,
    spellings=SPELLINGS,
)

BERT_BARE = FamilyFormat(
    architecture="BertModel",
    model_type="bert",
    source="Devlin et al. 2019, arXiv:1810.04805",
    read_config=read_bare,
    write_config=write_config,
    matches=matches_bare,
    layout=layout_bare,
    ignored=(*IGNORED, "cls."),
    spellings=(*SPELLINGS, ("bert.", "")),
)
