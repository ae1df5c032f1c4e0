"""GPT-2: a pre-norm decoder with learned positions, whose linear maps are stored transposed, q, k and v in one.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
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

NAME = "GPT2LMHeadModel"


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read a GPT-2 configuration."""
    hf = Published(values, NAME)
    hf.only("scale_attn_weights", True)
    hf.only("scale_attn_by_inverse_layer_idx", False)
    hf.only("add_cross_attention", False)
    d_model, n_heads = hf.integer("n_embd", 768), hf.integer("n_head", 12)
    head_dim = max(d_model // n_heads, 1)
    fields: dict[str, Any] = {
        "family": "decoder",
        "vocab_size": hf.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": hf.integer("n_layer", 12),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "d_ff": hf.integer("n_inner", 4 * d_model),
        "max_positions": hf.integer("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": hf.number("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "activation": hf.activation("activation_function", "gelu_new"),
        "gated": False,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_embeddings": hf.flag("tie_word_embeddings", default=True),
        "dropout": hf.number("resid_pdrop", 0.1),
        "init_std": hf.number("initializer_range", 0.02),
    }
    return ModelConfig(**(fields | hf.ids()))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write a GPT-2 configuration."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "activation_function": activation_name(config),
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **token_ids(config),
    }


def matches(config: ModelConfig) -> bool:
    """Say whether the config is GPT-2's."""
    return (
        has(config, family="decoder", norm="layernorm", norm_position="pre", positions="learned", position_offset=0)
        and has(config, gated=False, attention_bias=True, mlp_bias=True, embedding_norm=False, n_token_types=0)
        and has(config, embedding_scale=1.0, logits_scale=1.0, logits_bias=False, head_transform=False)
        and is_standard_attention(config)
        and is_common(config)
    )


def layout(config: ModelConfig) -> list[Stored]:
    """Return GPT-2's tensors."""
    stored = [
        plain("transformer.wte.weight", "model.embed_tokens.weight"),
        plain("transformer.wpe.weight", "model.embed_positions.weight"),
        *with_bias({"transformer.ln_f": "model.norm"}),
    ]
    for layer in range(config.n_layers):
        there, here = f"transformer.h.{layer}.", f"model.layers.{layer}."
        stored += with_bias(
            {there + "ln_1": here + "input_layernorm", there + "ln_2": here + "post_attention_layernorm"}
        )
        stored += conv1d(there + "attn.c_attn", *(f"{here}self_attn.{name}_proj" for name in "qkv"))
        stored += conv1d(there + "attn.c_proj", here + "self_attn.o_proj")
        stored += conv1d(there + "mlp.c_fc", here + "mlp.up_proj")
        stored += conv1d(there + "mlp.c_proj", here + "mlp.down_proj")
    return stored if config.tie_embeddings else [*stored, plain("lm_head.weight", "lm_head.weight")]


def conv1d(name: str, *modules: str) -> list[Stored]:
    """Return weight and bias of a linear map stored as (in, out), of several of our modules side by side."""
    return [
        Stored(name + ".weight", tuple(module + ".weight" for module in modules), "transposed"),
        Stored(name + ".bias", tuple(module + ".bias" for module in modules)),
    ]


GPT2 = FamilyFormat(
    architecture=NAME,
    model_type="gpt2",
    source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    read_config=read_config,
    write_config=write_config,
    matches=matches,
    layout=layout,
    # The causal mask was once stored as a buffer: attn.bias beside attn.c_attn.bias.
    ignored=(".attn.bias", ".attn.masked_bias"),
    prefix="transformer.",
)
