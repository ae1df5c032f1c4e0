"""Llama and its relatives: the parameter names and the math of our own default models.

`LlamaForCausalLM` (Touvron et al. 2023, arXiv:2302.13971), `Qwen3ForCausalLM` (Yang et al. 2025, arXiv:2505.09388;
normalized queries and keys), `EuroBertForMaskedLM` (Boizard et al. 2025, arXiv:2503.05500; the same block,
bidirectional), and `MistralForCausalLM` if its window spans the context (then it is Llama).
"""

from typing import Any

from llmctl.config import ModelConfig
from llmctl.formats.families.family import FamilyFormat
from llmctl.formats.families.published import Published
from llmctl.formats.families.rows import (
    SCALED_SCORES,
    TOKENS,
    Row,
    activation,
    constant,
    derived,
    fixed,
    flag,
    integer,
    number,
    only,
    replaced,
    requires,
    rope_theta,
    token,
    written,
)

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
    rope_theta(),
    flag("attention_bias", "attention_bias"),
    written("attention_dropout", 0.0),
    number("dropout", "dropout", 0.0),
    number("initializer_range", "init_std", 0.02),
    flag("tie_word_embeddings", "tie_embeddings"),
    *TOKENS,
    SCALED_SCORES,
)

# transformers insists on it even where `head_dim` is given.
DIVISIBLE = requires(lambda config: config.d_model % config.n_heads == 0)


def read_window(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Accept a sliding window that spans the context: it changes nothing."""
    window = published.values.get("sliding_window")
    if window is not None and published.integer("sliding_window") < config.max_positions:
        read = f"null, or at least max_position_embeddings, {config.max_positions}"
        raise published.refuse("sliding_window", window, read)
    return {}


def read_layer_types(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Accept full attention in every layer."""
    kinds = published.values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise published.refuse("layer_types", kinds, "full_attention in every layer")
    return {}


LLAMA = FamilyFormat(
    architecture="LlamaForCausalLM",
    model_type="llama",
    source="Touvron et al. 2023, arXiv:2302.13971",
    # Slicing over `pretraining_tp` devices is another order of the same sums; more than one is not supported.
    rows=(*SHARED, flag("mlp_bias", "mlp_bias"), only("pretraining_tp", 1, 0), DIVISIBLE),
    own_names=True,
    ignored=("rotary_emb.inv_freq",),
)

MISTRAL = FamilyFormat(
    architecture="MistralForCausalLM",
    model_type="mistral",
    source="Jiang et al. 2023, arXiv:2310.06825",
    rows=(*SHARED, flag("mlp_bias", "mlp_bias"), Row("sliding_window", read_window)),
    own_names=True,
    is_written=False,  # without a window it is Llama, which more programs read
)

QWEN3 = FamilyFormat(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    source="Yang et al. 2025, arXiv:2505.09388",
    rows=(
        fixed(qk_norm=True),
        *replaced(SHARED, integer("head_dim", "head_dim", 128)),
        constant("use_sliding_window", False),
        written("sliding_window", None),
        Row("layer_types", read_layer_types),
    ),
    own_names=True,
)

EUROBERT = FamilyFormat(
    architecture="EuroBertForMaskedLM",
    model_type="eurobert",
    source="Boizard et al. 2025, arXiv:2503.05500",
    rows=(
        fixed(family="encoder"),
        *replaced(SHARED, token("mask_token_id", "mask_id", absent=-1)),  # may not be null there
        flag("mlp_bias", "mlp_bias"),
        derived("logits_bias", lambda config: config.mlp_bias),  # one switch for both there
        DIVISIBLE,
    ),
    own_names=True,
)
