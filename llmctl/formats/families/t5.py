"""T5: encoder-decoder with relative position biases, unscaled scores and RMSNorm.

Version 1.1 has a gated feed-forward layer and a head of its own, the original a plain one and a tied, scaled head.
Source: Raffel et al. 2020, arXiv:1910.10683.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.formats.families.family import ACTIVATIONS, FamilyFormat, Published, close, has, is_common, token_ids
from llmctl.formats.families.parameters import Stored, plain

NAME = "T5ForConditionalGeneration"
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read a T5 configuration.

    `tie_word_embeddings` false means two things there: the head may be of its own, and the output is not scaled.
    transformers 5 keeps only the second, as `scale_decoder_outputs`; `resolve` finds out about the first.
    """
    hf = Published(values, NAME)
    d_model, n_layers, n_heads = hf.integer("d_model", 512), hf.integer("num_layers", 6), hf.integer("num_heads", 8)
    projection = values.get("feed_forward_proj", "relu")
    name = str(projection).removeprefix("gated-")
    if name not in ACTIVATIONS:
        raise hf.refuse("feed_forward_proj", projection, ", ".join(f"{act} or gated-{act}" for act in ACTIVATIONS))
    # "gated-gelu" has always meant the tanh approximation in T5.
    activation = "gelu_tanh" if projection == "gated-gelu" else ACTIVATIONS[name]
    tied = hf.flag("tie_word_embeddings", default=True)
    scaled = hf.flag("scale_decoder_outputs", default=tied)
    fields: dict[str, Any] = {
        "family": "encoder_decoder",
        "vocab_size": hf.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": n_layers,
        "n_decoder_layers": hf.integer("num_decoder_layers", n_layers),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": hf.integer("d_kv", 64),
        "d_ff": hf.integer("d_ff", 2048),
        "max_positions": hf.integer("n_positions", 512),
        "norm_eps": hf.number("layer_norm_epsilon", 1e-6),
        "positions": "relative",
        "n_relative_buckets": hf.integer("relative_attention_num_buckets", 32),
        "max_relative_distance": hf.integer("relative_attention_max_distance", 128),
        "activation": activation,
        "gated": str(projection).startswith("gated-"),
        "attention_scale": 1.0,
        "tie_embeddings": tied,
        "logits_scale": d_model**-0.5 if scaled else 1.0,
        "dropout": hf.number("dropout_rate", 0.1),
        "init_std": hf.number("initializer_range", 0.02),
    }
    return ModelConfig(**(fields | hf.ids()))


def resolve(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """A head is tied when the file holds none of its own."""
    return replace(config, tie_embeddings="lm_head.weight" not in names)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write a T5 configuration."""
    ours = config.activation
    activation = next(name for name, value in ACTIVATIONS.items() if value == ours)
    activation = "gelu" if config.gated and ours == "gelu_tanh" else activation
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "num_layers": config.n_layers,
        "num_decoder_layers": config.n_decoder_layers,
        "num_heads": config.n_heads,
        "n_positions": config.max_positions,
        "relative_attention_num_buckets": config.n_relative_buckets,
        "relative_attention_max_distance": config.max_relative_distance,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
        "initializer_factor": 1.0,
        "initializer_range": config.init_std,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tie_embeddings,
        **token_ids(config),
    }


def matches(config: ModelConfig) -> bool:
    """Say whether the config is T5's; a gated exact gelu has no name there."""
    scale = config.d_model**-0.5 if config.tie_embeddings else 1.0
    return (
        has(config, family="encoder_decoder", norm="rmsnorm", norm_position="pre", positions="relative")
        and has(config, attention_bias=False, mlp_bias=False, qk_norm=False, embedding_norm=False, n_token_types=0)
        and has(config, attention_scale=1.0, embedding_scale=1.0, logits_bias=False, head_transform=False)
        and config.n_kv_heads == config.n_heads
        and close(config.logits_scale, scale)
        and not (config.gated and config.activation == "gelu")
        and is_common(config)
    )


def layout(config: ModelConfig) -> list[Stored]:
    """Return T5's tensors."""
    stored = [plain("shared.weight", "model.embed_tokens.weight")]
    stored += stack("encoder", config, config.n_layers, cross=False)
    stored += stack("decoder", config, config.n_decoder_layers, cross=True)
    return stored if config.tie_embeddings else [*stored, plain("lm_head.weight", "lm_head.weight")]


def stack(side: str, config: ModelConfig, n_layers: int, *, cross: bool) -> list[Stored]:
    """Return the tensors of one stack; the position bias is the first layer's, and shared."""
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    stored = [plain(bias, f"model.{side}.relative_bias.weight")]
    for layer in range(n_layers):
        stored += block(f"{side}.block.{layer}.layer.", f"model.{side}.layers.{layer}.", config, cross=cross)
    return [*stored, plain(f"{side}.final_layer_norm.weight", f"model.{side}.norm.weight")]


def block(there: str, here: str, config: ModelConfig, *, cross: bool) -> list[Stored]:
    """Return the tensors of one layer: its parts are numbered."""
    last = 2 if cross else 1
    names = {f"0.SelfAttention.{key}": f"self_attn.{value}" for key, value in PROJECTIONS.items()}
    names["0.layer_norm"] = "input_layernorm"
    if cross:
        names |= {f"1.EncDecAttention.{key}": f"cross_attn.{value}" for key, value in PROJECTIONS.items()}
        names["1.layer_norm"] = "cross_attention_layernorm"
    names[f"{last}.layer_norm"] = "post_attention_layernorm"
    up = {"wi_0": "gate_proj", "wi_1": "up_proj"} if config.gated else {"wi": "up_proj"}
    names |= {f"{last}.DenseReluDense.{key}": f"mlp.{value}" for key, value in {**up, "wo": "down_proj"}.items()}
    return [plain(f"{there}{key}.weight", f"{here}{value}.weight") for key, value in names.items()]


T5 = FamilyFormat(
    architecture=NAME,
    model_type="t5",
    source="Raffel et al. 2020, arXiv:1910.10683",
    read_config=read_config,
    write_config=write_config,
    matches=matches,
    layout=layout,
    resolve=resolve,
    ignored=("coder.embed_tokens.weight", "EncDecAttention.relative_attention_bias"),
)
