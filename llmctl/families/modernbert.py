"""Encoders with rotary positions: ModernBERT, nomic-embed, GTE multilingual, Jina v3.

Sources: ModernBERT, arXiv:2412.13663; nomic-embed, arXiv:2402.01613; mGTE, arXiv:2407.19669; Jina v3, arXiv:2409.10173.
"""

from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.bert import TIED
from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import Stored, module, modules, prefixed
from llmctl.families.published import Published
from llmctl.families.rope import rope, rope_by_kind
from llmctl.families.rows import (
    FULL,
    STANDARD_HEADS,
    TOKENS,
    WINDOWED,
    Row,
    activation,
    fixed,
    flag,
    integer,
    number,
    only,
    replaced,
    windows,
    written,
)
from llmctl.model.shapes import window_of

OWN = "model.layers.{}."
QKV = tuple(f"{OWN}self_attn.{name}_proj" for name in "qkv")


def local_windows(n_own: int) -> Row:
    """Return the row of the layers that see half of `local_attention` tokens before them, and the token itself if `n_own`."""

    def read(published: Published, config: ModelConfig) -> dict[str, Any]:
        kinds = published.values.get("layer_types")
        if kinds is None:
            period = published.integer("global_attn_every_n_layers", 3)
            kinds = [WINDOWED if layer % period else FULL for layer in range(config.n_layers)]
        size = published.integer("local_attention", 128) // 2 + n_own
        return dict(
            windows().read(Published({"layer_types": kinds, "sliding_window": size}, published.architecture), config)
        )

    def write(config: ModelConfig) -> dict[str, Any]:
        sizes = [window_of(config, layer) for layer in range(config.n_layers)]
        kinds = [WINDOWED if size else FULL for size in sizes]
        # transformers derives the list from the period, which old readers know alone.
        period = kinds.index(FULL, 1) if FULL in kinds[1:] else config.n_layers
        return {
            "local_attention": 2 * (max(sizes) - n_own) if any(sizes) else 128,
            "layer_types": kinds,
            "global_attn_every_n_layers": period,
        }

    return Row("layer_types", read, write)


def read_head_activation(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Refuse a head with another activation than the layers: ours have one for both."""
    if published.activation("classifier_activation", "gelu") != config.activation:
        raise published.refuse(
            "classifier_activation", published.values.get("classifier_activation"), config.activation
        )
    return {}


ROWS = (
    fixed(norm="layernorm", first_norm=False, embedding_norm=True),
    integer("vocab_size", "vocab_size"),
    integer("hidden_size", "d_model", 768),
    integer("num_hidden_layers", "n_layers", 22),
    integer("num_attention_heads", "n_heads", 12),
    integer("intermediate_size", "d_ff", 1152),
    activation("hidden_activation", "gelu"),
    number("embedding_dropout", "dropout", 0.0),
    written("attention_dropout", 0.0),
    integer("max_position_embeddings", "max_positions", 8192),
    number("initializer_range", "init_std", 0.02),
    number("norm_eps", "norm_eps", 1e-5),
    flag("norm_bias", "norm_bias"),
    flag("attention_bias", "attention_bias"),
    flag("mlp_bias", "mlp_bias"),
    local_windows(1),
    flag("tie_word_embeddings", "tie_embeddings", default=True),
    *TOKENS,
    *STANDARD_HEADS,
    rope_by_kind("local_rope_theta", "global_rope_theta", 160000.0),
)
BODY = (
    Stored("embeddings.tok_embeddings.weight", ("model.embed_tokens.weight",)),
    *module("embeddings.norm", "model.embedding_norm"),
    *modules(
        {
            "attn_norm": "input_layernorm",
            "attn.Wo": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "mlp.Wo": "mlp.down_proj",
        },
        "layers.{}.",
        OWN,
    ),
    *module("layers.{}.attn.Wqkv", *QKV),
    *module("layers.{}.mlp.Wi", OWN + "mlp.gate_proj", OWN + "mlp.up_proj"),
    *module("final_norm", "model.norm"),
)

ENCODER = fixed(family="encoder")
HEAD_ROWS = (
    fixed(head_transform=True),
    flag("classifier_bias", "head_transform_bias"),
    flag("decoder_bias", "logits_bias", default=True),
    Row(
        "classifier_activation",
        read_head_activation,
        lambda config: activation("classifier_activation", "").write(config),
    ),
)

MODERNBERT = FamilyFormat(
    architecture="ModernBertForMaskedLM",
    model_type="modernbert",
    source="Warner et al. 2024, arXiv:2412.13663",
    rows=(ENCODER, *ROWS, *HEAD_ROWS),
    tensors=(
        *prefixed("model.", BODY),
        *module("head.dense", "head_dense"),
        *module("head.norm", "head_norm"),
        *module("decoder", "lm_head"),
    ),
)
SPLIT = tuple(
    stored for name in "qkv" for stored in module(f"layers.{{}}.attn.{name}_proj", f"{OWN}self_attn.{name}_proj")
)
MODERNBERT_DECODER = replace(
    MODERNBERT,
    architecture="ModernBertDecoderForCausalLM",
    model_type="modernbert-decoder",
    source="Ettin, Weller et al. 2025, arXiv:2507.11412",
    rows=(*replaced(ROWS, local_windows(0)), *HEAD_ROWS),
    tensors=(
        *prefixed("model.", tuple(stored for stored in BODY if "Wqkv" not in stored.name)),
        *prefixed("model.", SPLIT),
        *module("lm_head.dense", "head_dense"),
        *module("lm_head.norm", "head_norm"),
        *module("decoder", "lm_head"),
    ),
)
MODERNBERT_BARE = replace(
    MODERNBERT,
    architecture="ModernBertModel",
    rows=(ENCODER, *replaced(ROWS, TIED)),
    tensors=BODY,
    ignored=("head.", "decoder."),
    spellings=(("model.", ""),),
)

POST_NORM_ROWS = (
    fixed(family="encoder", norm="layernorm", norm_position="post", embedding_norm=True),
    integer("vocab_size", "vocab_size"),
    integer("hidden_size", "d_model", 768),
    integer("num_hidden_layers", "n_layers", 12),
    integer("num_attention_heads", "n_heads", 12),
    integer("intermediate_size", "d_ff", 3072),
    activation("hidden_act", "gelu"),
    number("hidden_dropout_prob", "dropout", 0.0),
    written("attention_probs_dropout_prob", 0.0),
    integer("max_position_embeddings", "max_positions", 8192),
    integer("type_vocab_size", "n_token_types", 1),
    number("initializer_range", "init_std", 0.02),
    number("layer_norm_eps", "norm_eps", 1e-12),
    TIED,
    *TOKENS,
    *STANDARD_HEADS,
)
EMBEDDINGS = (
    Stored("embeddings.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Stored("embeddings.token_type_embeddings.weight", ("model.embed_token_types.weight",)),
)
NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}

NOMIC = FamilyFormat(
    architecture="NomicBertModel",
    model_type="nomic_bert",
    source="Nussbaum et al. 2024, arXiv:2402.01613",
    rows=(
        *replaced(POST_NORM_ROWS, activation("hidden_act", "silu"), integer("type_vocab_size", "n_token_types", 2)),
        rope(theta=1000.0),
        # Keys of the first files.
        only("prenorm", False),
        only("qkv_proj_bias", False),
        only("mlp_fc1_bias", False),
        only("mlp_fc2_bias", False),
        only("rotary_emb_fraction", 1.0),
        only("rotary_emb_interleaved", False),
        only("activation_function", "swiglu"),
        only("num_experts", 0),
    ),
    tensors=(
        *EMBEDDINGS,
        *module("emb_ln", "model.embedding_norm"),
        *module("encoder.layers.{}.attn.Wqkv", *QKV),
        *modules(
            {
                **NORMS,
                "attn.out_proj": "self_attn.o_proj",
                "mlp.fc11": "mlp.up_proj",
                "mlp.fc12": "mlp.gate_proj",
                "mlp.fc2": "mlp.down_proj",
            },
            "encoder.layers.{}.",
            OWN,
        ),
    ),
    ignored=("pooler.",),
    key_spellings=(
        ("n_embd", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("n_inner", "intermediate_size"),
        ("n_positions", "max_position_embeddings"),
        ("layer_norm_epsilon", "layer_norm_eps"),
        ("rotary_emb_base", "rope_theta"),
    ),
)

GTE = FamilyFormat(
    architecture="GteModel",
    model_type="gte",
    source="Zhang et al. 2024, arXiv:2407.19669",
    rows=(
        fixed(attention_bias=True, mlp_output_bias="yes"),
        *POST_NORM_ROWS,
        rope(theta=160000.0),
    ),
    tensors=(
        *EMBEDDINGS,
        *module("embeddings.LayerNorm", "model.embedding_norm"),
        *module("encoder.layer.{}.attention.qkv_proj", *QKV),
        *module("encoder.layer.{}.mlp.up_gate_proj", OWN + "mlp.up_proj", OWN + "mlp.gate_proj"),
        *modules(
            {
                "attn_ln": "input_layernorm",
                "mlp_ln": "post_attention_layernorm",
                "attention.o_proj": "self_attn.o_proj",
                "mlp.down_proj": "mlp.down_proj",
            },
            "encoder.layer.{}.",
            OWN,
        ),
    ),
    ignored=("pooler.",),
)

JINA3 = FamilyFormat(
    architecture="JinaEmbeddingsV3Model",
    model_type="jina_embeddings_v3",
    source="Sturua et al. 2024, arXiv:2409.10173",
    rows=(
        fixed(attention_bias=True, mlp_bias=True, gated=False),
        *replaced(POST_NORM_ROWS, number("layer_norm_eps", "norm_eps", 1e-5)),
        rope(theta=20000.0),
    ),
    tensors=(
        *EMBEDDINGS,
        *module("emb_ln", "model.embedding_norm"),
        *module("encoder.layers.{}.mixer.Wqkv", *QKV),
        *modules(
            {
                **NORMS,
                "mixer.out_proj": "self_attn.o_proj",
                "mlp.fc1": "mlp.up_proj",
                "mlp.fc2": "mlp.down_proj",
            },
            "encoder.layers.{}.",
            OWN,
        ),
    ),
    ignored=("pooler.",),
)
