"""BART and Marian: the post-norm encoder-decoder of 2017, with learned positions or sinusoidal ones.

`BartForConditionalGeneration`: Lewis et al. 2020, arXiv:1910.13461; its position table skips two rows and the
embeddings are normalized. `MarianMTModel`: Junczys-Dowmunt et al. 2018, arXiv:1804.00344; the maths of Vaswani et al.
2017, arXiv:1706.03762, whose fixed table is not part of our parameters.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.formats.families.family import (
    FamilyFormat,
    Published,
    activation_name,
    close,
    has,
    is_common,
    is_standard_attention,
    token_ids,
)
from llmctl.formats.families.parameters import Stored, plain, with_bias

BART_NAME, MARIAN_NAME = "BartForConditionalGeneration", "MarianMTModel"
ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}


def read_config(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """Read what BART and Marian share."""
    hf = Published(values, architecture)
    hf.only("tie_word_embeddings", True)
    hf.only("normalize_before", False)
    hf.only("add_final_layer_norm", False)
    hf.only("extra_pos_embeddings", 2)
    d_model, n_heads = hf.integer("d_model", 1024), hf.equal("encoder_attention_heads", "decoder_attention_heads")
    head_dim, n_layers = max(d_model // n_heads, 1), hf.integer("encoder_layers")
    fields: dict[str, Any] = {
        "family": "encoder_decoder",
        "vocab_size": hf.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": n_layers,
        "n_decoder_layers": hf.integer("decoder_layers"),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "d_ff": hf.equal("encoder_ffn_dim", "decoder_ffn_dim"),
        "max_positions": hf.integer("max_position_embeddings", 1024),
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": 1e-5,
        "activation": hf.activation("activation_function", "gelu"),
        "gated": False,
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_scale": d_model**0.5 if hf.flag("scale_embedding") else 1.0,
        "tie_embeddings": True,
        "logits_bias": True,
        "dropout": hf.number("dropout", 0.1),
        "init_std": hf.number("init_std", 0.02),
    }
    return ModelConfig(**(fields | hf.ids()))


def read_bart(values: Mapping[str, Any]) -> ModelConfig:
    """Read a BART configuration."""
    hf = Published(values, BART_NAME)
    hf.only("static_position_embeddings", False)
    hf.only("normalize_embedding", True)
    return replace(read_config(values, BART_NAME), positions="learned", position_offset=2, embedding_norm=True)


def read_marian(values: Mapping[str, Any]) -> ModelConfig:
    """Read a Marian configuration with one vocabulary for both sides."""
    hf = Published(values, MARIAN_NAME)
    hf.only("share_encoder_decoder_embeddings", True)
    hf.only("static_position_embeddings", True)
    hf.only("normalize_embedding", False)
    hf.only("decoder_vocab_size", hf.integer("vocab_size"))
    return replace(read_config(values, MARIAN_NAME), positions="sinusoidal")


def resolve(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """The logits have a bias where the file holds one."""
    return replace(config, logits_bias="final_logits_bias" in names)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write what BART and Marian share."""
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "encoder_layers": config.n_layers,
        "decoder_layers": config.n_decoder_layers,
        "num_hidden_layers": config.n_layers,
        "encoder_attention_heads": config.n_heads,
        "decoder_attention_heads": config.n_heads,
        "encoder_ffn_dim": config.d_ff,
        "decoder_ffn_dim": config.d_ff,
        "max_position_embeddings": config.max_positions,
        "activation_function": activation_name(config),
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": config.init_std,
        "scale_embedding": config.embedding_scale != 1.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "forced_eos_token_id": None,
        **token_ids(config),
    }


def write_marian(config: ModelConfig) -> dict[str, Any]:
    """Write a Marian configuration."""
    shared = {"decoder_vocab_size": config.vocab_size, "share_encoder_decoder_embeddings": True}
    return write_config(config) | shared | {"static_position_embeddings": True, "normalize_embedding": False}


def is_post_norm(config: ModelConfig) -> bool:
    """Say whether the config is an encoder-decoder of 2017, whatever its positions."""
    return (
        has(config, family="encoder_decoder", norm="layernorm", norm_position="post", norm_eps=1e-5, gated=False)
        and has(config, attention_bias=True, mlp_bias=True, tie_embeddings=True, head_transform=False, n_token_types=0)
        and has(config, logits_scale=1.0)
        and (config.embedding_scale == 1.0 or close(config.embedding_scale, config.d_model**0.5))
        and is_standard_attention(config)
        and is_common(config)
    )


def matches_bart(config: ModelConfig) -> bool:
    """Say whether the config is BART's."""
    return is_post_norm(config) and has(config, positions="learned", position_offset=2, embedding_norm=True)


def matches_marian(config: ModelConfig) -> bool:
    """Say whether the config is Marian's, whose decoder must know its first token."""
    known = config.decoder_start_id >= 0
    return known and is_post_norm(config) and has(config, positions="sinusoidal", embedding_norm=False)


def layout(config: ModelConfig) -> list[Stored]:
    """Return the tensors of BART or Marian."""
    stored = [plain("model.shared.weight", "model.embed_tokens.weight")]
    if config.logits_bias:
        stored.append(Stored("final_logits_bias", ("lm_head.bias",), "row"))
    for side, n_layers in (("encoder", config.n_layers), ("decoder", config.n_decoder_layers)):
        prefix = f"model.{side}."
        if config.positions == "learned":
            stored.append(plain(prefix + "embed_positions.weight", prefix + "embed_positions.weight"))
        if config.embedding_norm:
            stored += with_bias({prefix + "layernorm_embedding": prefix + "embedding_norm"})
        for layer in range(n_layers):
            stored += block(f"{prefix}layers.{layer}.", cross=side == "decoder")
    return stored


def block(prefix: str, *, cross: bool) -> list[Stored]:
    """Return the tensors of one layer."""
    names = {f"self_attn.{key}": f"self_attn.{value}" for key, value in ATTENTION.items()}
    names["self_attn_layer_norm"] = "input_layernorm"
    if cross:
        names |= {f"encoder_attn.{key}": f"cross_attn.{value}" for key, value in ATTENTION.items()}
        names["encoder_attn_layer_norm"] = "cross_attention_layernorm"
    names |= {"fc1": "mlp.up_proj", "fc2": "mlp.down_proj", "final_layer_norm": "post_attention_layernorm"}
    return list(with_bias({prefix + key: prefix + value for key, value in names.items()}))


# Copies of the shared embedding, as older files store them.
COPIES = ("coder.embed_tokens.weight", "lm_head.weight", "coder.version")

BART = FamilyFormat(
    architecture=BART_NAME,
    model_type="bart",
    source="Lewis et al. 2020, arXiv:1910.13461",
    read_config=read_bart,
    write_config=write_config,
    matches=matches_bart,
    layout=layout,
    resolve=resolve,
    ignored=COPIES,
)

MARIAN = FamilyFormat(
    architecture=MARIAN_NAME,
    model_type="marian",
    source="Junczys-Dowmunt et al. 2018, arXiv:1804.00344",
    read_config=read_marian,
    write_config=write_marian,
    matches=matches_marian,
    layout=layout,
    resolve=resolve,
    ignored=(*COPIES, "coder.embed_positions.weight"),
)
