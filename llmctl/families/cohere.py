"""Llama's relatives with partly rotated heads or LayerNorm: Command R7B, GLM-4, Nemotron, StableLM 2, StarCoder 2."""

from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.family import FamilyFormat
from llmctl.families.gemma import norms
from llmctl.families.llama import LAYER, NO_OUTPUT_BIAS, QUERY_KEY, SHARED
from llmctl.families.parameters import Stored, in_form, modules
from llmctl.families.published import Published
from llmctl.families.rope import rope
from llmctl.families.rows import (
    FULL,
    SQUARE,
    WINDOWED,
    Row,
    activation,
    derived,
    fixed,
    flag,
    integer,
    number,
    only,
    replaced,
    window,
    windows,
)


def every_fourth(published: Published, config: ModelConfig) -> list[str]:
    """Return Command R7B's kinds of layers."""
    period = published.integer("sliding_window_pattern", 4)
    return [FULL if (layer + 1) % period == 0 else WINDOWED for layer in range(config.n_layers)]


# Layers without a window are not rotated.
NO_POSITIONS = derived(
    "rope_thetas",
    lambda config: tuple(config.rope_theta if size else 0.0 for size in config.attention_windows or (0,)),
)

COHERE2 = FamilyFormat(
    architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    source="Command R7B, arXiv:2504.00698",
    rows=(
        fixed(norm="layernorm", norm_bias=False, parallel="shared"),
        *replaced(
            SHARED,
            flag("tie_word_embeddings", "tie_embeddings", default=True),
            integer("max_position_embeddings", "max_positions", 8192),
            rms_norm_eps=number("layer_norm_eps", "norm_eps", 1e-5),
        ),
        number("logit_scale", "logits_scale", 0.0625),
        only("use_qk_norm", False),
        windows(every_fourth),
        NO_POSITIONS,
        SQUARE,
    ),
    tensors=in_form("pairs", *QUERY_KEY),
    own_names=True,
    prefix="model.",
)

GLM_NAMES = {
    "post_self_attn_layernorm": "attention_output_layernorm",
    "post_mlp_layernorm": "mlp_output_layernorm",
}

GLM4 = FamilyFormat(
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    source="GLM-4-0414, Zhipu AI 2025",
    rows=(
        fixed(norm_position="both"),
        *replaced(
            SHARED,
            number("rms_norm_eps", "norm_eps", 1.5625e-7),
            integer("head_dim", "head_dim", 128),
            rope(partial=True, share=0.5),
            NO_OUTPUT_BIAS,
        ),
    ),
    tensors=(
        *modules(GLM_NAMES, LAYER, LAYER),
        *in_form("pairs", *QUERY_KEY),
        Stored(LAYER + "mlp.gate_up_proj.weight", (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")),
    ),
    own_names=True,
    prefix="model.",
)

NEMOTRON = FamilyFormat(
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    source="Nemotron-4, arXiv:2402.16819; Minitron, arXiv:2407.14679",
    rows=(
        fixed(norm="layernorm", gated=False),
        *replaced(
            SHARED,
            activation("hidden_act", "relu2"),
            rope(partial=True, share=0.5),
            rms_norm_eps=number("norm_eps", "norm_eps", 1e-5),
        ),
        flag("mlp_bias", "mlp_bias"),
    ),
    tensors=(*norms({name: name for name in ("input_layernorm", "post_attention_layernorm")}),),
    own_names=True,
    prefix="model.",
)


def read_qkv_bias(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read whether queries, keys and values have a bias; the output projection has none."""
    biased = published.flag("use_qkv_bias")
    return {"attention_bias": biased, "attention_output_bias": "no" if biased else "same"}


STABLELM = FamilyFormat(
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    source="Stable LM 2, arXiv:2402.17834",
    rows=(
        fixed(norm="layernorm"),
        *replaced(
            SHARED,
            rope(partial=True, share=0.25),
            rms_norm_eps=number("layer_norm_eps", "norm_eps", 1e-5),
            attention_bias=Row("use_qkv_bias", read_qkv_bias, lambda config: {"use_qkv_bias": config.attention_bias}),
        ),
        only("use_parallel_residual", False),
        only("qk_layernorm", False),
        SQUARE,
    ),
    own_names=True,
    prefix="model.",
)

STARCODER2 = FamilyFormat(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    source="StarCoder 2, arXiv:2402.19173",
    rows=(
        fixed(norm="layernorm", gated=False),
        *replaced(
            SHARED,
            activation("hidden_act", "gelu_pytorch_tanh"),
            flag("tie_word_embeddings", "tie_embeddings", default=True),
            rms_norm_eps=number("norm_epsilon", "norm_eps", 1e-5),
            attention_bias=flag("use_bias", "attention_bias", default=True),
            dropout=number("residual_dropout", "dropout", 0.0),
        ),
        derived("mlp_bias", lambda config: config.attention_bias),
        window(),
        SQUARE,
    ),
    tensors=modules({"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}, LAYER, LAYER),
    own_names=True,
    prefix="model.",
)
