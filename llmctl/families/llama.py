"""Llama and its relatives: the parameter names and the math of our own default models.

`LlamaForCausalLM` (Touvron et al. 2023, arXiv:2302.13971), `Qwen3ForCausalLM` (Yang et al. 2025, arXiv:2505.09388;
normalized queries and keys), `EuroBertForMaskedLM` (Boizard et al. 2025, arXiv:2503.05500; the same block,
bidirectional), and `MistralForCausalLM` if its window spans the context (then it is Llama).
"""

from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import Stored, in_form, module
from llmctl.families.published import Published
from llmctl.families.rope import rope
from llmctl.families.rows import (
    FULL,
    SCALED_SCORES,
    SQUARE,
    TOKENS,
    WINDOWED,
    Row,
    activation,
    constant,
    converted,
    derived,
    fixed,
    flag,
    integer,
    number,
    only,
    replaced,
    requires,
    token,
    window,
    windows,
    written,
)
from llmctl.model.shapes import has_bias, shown_bias, theta_of

LAYER = "model.layers.{}."


def positive(published: Published, key: str, default: float = 1.0) -> float:
    """Return a positive number."""
    value = published.number(key, default)
    if value <= 0:
        raise published.refuse(key, value, "a positive number")
    return value


# What all of them share: pre-norm RMSNorm, rotary positions and a gated feed-forward layer are our defaults.
SHARED = (
    integer("vocab_size", "vocab_size"),
    integer("hidden_size", "d_model"),
    integer("intermediate_size", "d_ff"),
    integer("num_hidden_layers", "n_layers"),
    integer("num_attention_heads", "n_heads"),
    integer("num_key_value_heads", "n_kv_heads", lambda config: config.n_heads),
    integer("head_dim", "head_dim", lambda config: max(config.d_model // config.n_heads, 1)),
    integer("max_position_embeddings", "max_positions", 2048),
    number("rms_norm_eps", "norm_eps", 1e-6),
    activation("hidden_act", "silu"),
    rope(),
    flag("attention_bias", "attention_bias"),
    written("attention_dropout", 0.0),
    number("dropout", "dropout", 0.0),
    number("initializer_range", "init_std", 0.02),
    flag("tie_word_embeddings", "tie_embeddings"),
    *TOKENS,
    SCALED_SCORES,
)

NO_OUTPUT_BIAS = Row(
    "attention_bias",
    lambda published, _: {
        "attention_bias": published.flag("attention_bias"),
        "attention_output_bias": "no" if published.flag("attention_bias") else "same",
    },
    lambda config: {"attention_bias": config.attention_bias},
)
"""Biases of queries, keys and values, and none of the output projection."""

# transformers insists on it even where `head_dim` is given.
DIVISIBLE = requires(lambda config: config.d_model % config.n_heads == 0)


def layer_types(published: Published, config: ModelConfig) -> list[str]:
    """Return Qwen's kinds of layers: from number `max_window_layers` on, they have a window."""
    if not published.flag("use_sliding_window"):
        return [FULL] * config.n_layers
    first = int(published.number("max_window_layers", 28))
    return [FULL if layer < first else WINDOWED for layer in range(config.n_layers)]


def write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    """Write windows and the switch that they need there."""
    values = windows().write(config)
    return {"use_sliding_window": values["sliding_window"] is not None} | dict(values)


QWEN_WINDOWS = Row("layer_types", windows(layer_types).read, write_qwen_windows)

LLAMA = FamilyFormat(
    architecture="LlamaForCausalLM",
    model_type="llama",
    source="Touvron et al. 2023, arXiv:2302.13971",
    # Slicing over `pretraining_tp` devices is another order of the same sums; more than one is not supported.
    rows=(*SHARED, flag("mlp_bias", "mlp_bias"), only("pretraining_tp", 1, 0), DIVISIBLE),
    own_names=True,
    prefix="model.",
    ignored=("rotary_emb.inv_freq",),
)

MISTRAL = FamilyFormat(
    architecture="MistralForCausalLM",
    model_type="mistral",
    source="Jiang et al. 2023, arXiv:2310.06825",
    rows=(*replaced(SHARED, attention_bias=None), window()),
    own_names=True,
    prefix="model.",
    ignored=("rotary_emb.inv_freq",),
)

MINISTRAL = replace(
    MISTRAL,
    architecture="MinistralForCausalLM",
    model_type="ministral",
    source="Ministral-8B-Instruct-2410",
    rows=(*replaced(SHARED, attention_bias=None), windows(lambda _, config: [WINDOWED] * config.n_layers)),
)

QWEN2 = FamilyFormat(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    source="Yang et al. 2024, arXiv:2407.10671",
    rows=(
        *replaced(SHARED, attention_bias=fixed(attention_bias=True, attention_output_bias="no")),
        QWEN_WINDOWS,
        SQUARE,
    ),
    own_names=True,
    prefix="model.",
    ignored=("rotary_emb.inv_freq",),
)

QWEN3 = FamilyFormat(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    source="Yang et al. 2025, arXiv:2505.09388",
    rows=(fixed(qk_norm=True), *replaced(SHARED, integer("head_dim", "head_dim", 128)), QWEN_WINDOWS),
    own_names=True,
    prefix="model.",
)


def read_unrotated(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Read which layers of SmolLM3 are rotated: a list of 0 and 1, or every so many layers not."""
    if published.values.get("no_rope_layers") is None:
        interval = published.integer("no_rope_layer_interval", 4)
        rotated = tuple(int((layer + 1) % interval != 0) for layer in range(config.n_layers))
    else:
        rotated = published.integers("no_rope_layers")
    if len(rotated) != config.n_layers:
        raise published.refuse("no_rope_layers", list(rotated), f"a number for each of {config.n_layers} layers")
    return {"rope_thetas": () if all(rotated) else tuple(config.rope_theta if each else 0.0 for each in rotated)}


def write_unrotated(config: ModelConfig) -> dict[str, Any]:
    """Write which layers are rotated."""
    return {"no_rope_layers": [int(theta_of(config, layer) != 0.0) for layer in range(config.n_layers)]}


SMOLLM3 = FamilyFormat(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    source="SmolLM3, Bakouch et al. 2025",
    rows=(
        *SHARED,
        flag("mlp_bias", "mlp_bias"),
        QWEN_WINDOWS,
        Row("no_rope_layers", read_unrotated, write_unrotated),
        SQUARE,
    ),
    own_names=True,
    prefix="model.",
)

ARCEE = FamilyFormat(
    architecture="ArceeForCausalLM",
    model_type="arcee",
    source="AFM-4.5B, Arcee AI 2025",
    rows=(fixed(gated=False), *replaced(SHARED, activation("hidden_act", "relu2")), flag("mlp_bias", "mlp_bias")),
    own_names=True,
    prefix="model.",
)


def read_output_bias(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Read whether the output projection has a bias."""
    return {
        "attention_output_bias": shown_bias(
            "yes" if published.flag("attention_out_bias") else "no", config.attention_bias
        )
    }


SEED_OSS = FamilyFormat(
    architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    source="Seed-OSS, ByteDance 2025",
    rows=(
        *replaced(SHARED, flag("attention_bias", "attention_bias", default=True)),
        Row(
            "attention_out_bias",
            read_output_bias,
            lambda config: {"attention_out_bias": has_bias(config.attention_output_bias, config.attention_bias)},
        ),
        flag("mlp_bias", "mlp_bias"),
    ),
    own_names=True,
    prefix="model.",
)

QUERY_KEY = (LAYER + "self_attn.q_proj", LAYER + "self_attn.k_proj")

HELIUM = FamilyFormat(
    architecture="HeliumForCausalLM",
    model_type="helium",
    source="Helium 1, Kyutai 2025",
    rows=(*replaced(SHARED, number("rms_norm_eps", "norm_eps", 1e-8), NO_OUTPUT_BIAS), flag("mlp_bias", "mlp_bias")),
    tensors=in_form("pairs", *QUERY_KEY),
    own_names=True,
    prefix="model.",
)

ERNIE45 = FamilyFormat(
    architecture="Ernie4_5ForCausalLM",
    model_type="ernie4_5",
    source="ERNIE 4.5, Baidu 2025",
    rows=(
        *replaced(
            SHARED,
            number("rms_norm_eps", "norm_eps", 1e-5),
            integer("head_dim", "head_dim", 128),
            attention_bias=flag("use_bias", "attention_bias"),
        ),
        derived("mlp_bias", lambda config: config.attention_bias),
    ),
    tensors=in_form("pairs", *QUERY_KEY),
    own_names=True,
    prefix="model.",
)

HUNYUAN = FamilyFormat(
    architecture="HunYuanDenseV1ForCausalLM",
    model_type="hunyuan_v1_dense",
    source="Hunyuan 0.5B-7B, Tencent 2025",
    rows=(
        fixed(qk_norm=True, qk_norm_kind="rotated"),
        *replaced(SHARED, number("rms_norm_eps", "norm_eps", 1e-5)),
        flag("mlp_bias", "mlp_bias"),
    ),
    tensors=(
        *module(LAYER + "self_attn.query_layernorm", LAYER + "self_attn.q_norm"),
        *module(LAYER + "self_attn.key_layernorm", LAYER + "self_attn.k_norm"),
    ),
    own_names=True,
    prefix="model.",
)


def read_attention_only(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Refuse layers of another kind than attention."""
    kinds = published.values.get("layer_types", published.values.get("layers_block_type")) or []
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {"attention", FULL}:
        raise published.refuse("layer_types", kinds, "attention in every layer")
    return {}


def read_position_kind(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read whether heads are rotated."""
    kind = published.values.get("position_embedding_type", "rope")
    if kind not in ("rope", "nope", None):
        raise published.refuse("position_embedding_type", kind, "rope or nope")
    return {"positions": "rope" if kind == "rope" else "none"}


GRANITE = FamilyFormat(
    architecture="GraniteForCausalLM",
    model_type="granite",
    source="Granite 3, IBM 2024",
    rows=(
        *replaced(SHARED, attention_scale=None),
        flag("mlp_bias", "mlp_bias"),
        number("embedding_multiplier", "embedding_scale", 1.0),
        number("attention_multiplier", "attention_scale", 1.0),
        number("residual_multiplier", "residual_scale", 1.0),
        converted(
            "logits_scaling",
            "logits_scale",
            lambda published, _: 1.0 / positive(published, "logits_scaling"),
            lambda scale: 1.0 / scale,
        ),
        SQUARE,
    ),
    own_names=True,
    prefix="model.",
)

# Granite 4 without mixers of states and without experts is Granite 3 under other names.
GRANITE4 = replace(
    GRANITE,
    architecture="GraniteMoeHybridForCausalLM",
    model_type="granitemoehybrid",
    source="Granite 4, IBM 2025",
    rows=(
        *replaced(GRANITE.rows, intermediate_size=integer("shared_intermediate_size", "d_ff", 1024), mlp_bias=None),
        constant("num_local_experts", 0),
        Row("layer_types", read_attention_only, lambda config: {"layer_types": ["attention"] * config.n_layers}),
        Row(
            "position_embedding_type",
            read_position_kind,
            lambda config: {"position_embedding_type": "rope" if config.positions == "rope" else "nope"},
        ),
    ),
    tensors=(
        Stored(
            LAYER + "shared_mlp.input_linear.weight", (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")
        ),
        Stored(LAYER + "shared_mlp.output_linear.weight", (LAYER + "mlp.down_proj.weight",)),
    ),
    is_written=False,
)


def experts(n_experts: str, count: int, n_active: int) -> tuple[Row, ...]:
    """Return the rows of a mixture of experts: the key of their number, and the defaults of this and of the active ones."""
    return (
        integer(n_experts, "n_experts", count),
        integer("num_experts_per_tok", "n_active_experts", n_active),
        requires(lambda config: config.n_experts > 0),
    )


ROUTER = Stored(LAYER + "mlp.gate.weight", (LAYER + "mlp.router.weight",))

QWEN3_MOE = FamilyFormat(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    source="Yang et al. 2025, arXiv:2505.09388",
    rows=(
        fixed(qk_norm=True),
        *replaced(
            SHARED,
            integer("head_dim", "head_dim", lambda config: max(config.d_model // config.n_heads, 1)),
            intermediate_size=integer("moe_intermediate_size", "d_ff", 768),
        ),
        *experts("num_experts", 128, 8),
        flag("norm_topk_prob", "normalized_experts"),
        constant("decoder_sparse_step", 1),
        constant("mlp_only_layers", []),
        QWEN_WINDOWS,
    ),
    tensors=(ROUTER,),
    own_names=True,
    prefix="model.",
    key_spellings=(("num_local_experts", "num_experts"),),
)

GRANITE_MOE = replace(
    GRANITE,
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    source="Granite 3 MoE, IBM 2024",
    rows=(*replaced(GRANITE.rows, mlp_bias=None), *experts("num_local_experts", 8, 2)),
    tensors=(
        Stored(LAYER + "block_sparse_moe.router.layer.weight", (LAYER + "mlp.router.weight",)),
        Stored(
            LAYER + "block_sparse_moe.input_linear.weight",
            (LAYER + "mlp.experts.*.gate_proj.weight", LAYER + "mlp.experts.*.up_proj.weight"),
            "experts",
        ),
        Stored(LAYER + "block_sparse_moe.output_linear.weight", (LAYER + "mlp.experts.*.down_proj.weight",), "experts"),
    ),
)

EUROBERT = FamilyFormat(
    architecture="EuroBertForMaskedLM",
    model_type="eurobert",
    source="Boizard et al. 2025, arXiv:2503.05500",
    rows=(
        fixed(family="encoder"),
        *replaced(
            SHARED,
            number("rms_norm_eps", "norm_eps", 1e-5),
            token("mask_token_id", "mask_id", absent=-1),  # may not be null there
        ),
        flag("mlp_bias", "mlp_bias"),
        derived("logits_bias", lambda config: config.mlp_bias),  # one switch for both there
        DIVISIBLE,
    ),
    own_names=True,
)
