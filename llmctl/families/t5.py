"""T5: encoder-decoder with relative position biases, unscaled scores and RMSNorm.

Version 1.1 has a gated feed-forward layer and an untied head, the original a plain one and a tied, scaled head.
Source: Raffel et al. 2020, arXiv:1910.10683.
"""

from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.family import FamilyFormat, Presence
from llmctl.families.parameters import Stored, Tensors, modules
from llmctl.families.published import ACTIVATIONS, Published, activation_name
from llmctl.families.rows import TOKENS, Row, derived, fixed, flag, integer, number, replaced, written


def read_feed_forward(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read activation and gate from one name, such as `relu` or `gated-silu`."""
    name = published.values.get("feed_forward_proj", "relu")
    activation = str(name).removeprefix("gated-")
    if activation not in ACTIVATIONS:
        read = ", ".join(f"{known} or gated-{known}" for known in ACTIVATIONS)
        raise published.refuse("feed_forward_proj", name, read)
    # "gated-gelu" has always meant the tanh approximation in T5, so a gated exact gelu has no name.
    own = "gelu_tanh" if name == "gated-gelu" else ACTIVATIONS[activation]
    return {"activation": own, "gated": str(name).startswith("gated-")}


def write_feed_forward(config: ModelConfig) -> dict[str, Any]:
    """Write activation and gate as one name."""
    if config.gated and config.activation == "gelu_tanh":
        return {"feed_forward_proj": "gated-gelu"}
    name = activation_name(config.activation)
    return {"feed_forward_proj": f"gated-{name}" if config.gated else name}


def read_output_scale(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Read the factor before the head.

    `tie_word_embeddings` false means two things there: the head may be its own, and the output is not scaled.
    transformers 5 keeps only the second, as `scale_decoder_outputs`; the tensors in the file tell the first.
    """
    is_scaled = published.flag("scale_decoder_outputs", default=config.tie_embeddings)
    return {"logits_scale": config.d_model**-0.5 if is_scaled else 1.0}


def write_output_scale(config: ModelConfig) -> dict[str, Any]:
    """Write whether the output is scaled, where that does not follow from the tied head."""
    is_scaled = config.logits_scale != 1.0
    return {} if is_scaled == config.tie_embeddings else {"scale_decoder_outputs": is_scaled}


PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


def attention(part: str, own: str, norm: str) -> dict[str, str]:
    """Return the names of one attention and of the norm before it; `part` has the number that all its tensors share."""
    names = {f"{part}.{key}": f"{own}.{value}" for key, value in PROJECTIONS.items()}
    return names | {f"{part.partition('.')[0]}.layer_norm": norm}


SELF = attention("0.SelfAttention", "self_attn", "input_layernorm")
CROSS = attention("1.EncDecAttention", "cross_attn", "cross_attention_layernorm")


def stack(side: str, attentions: dict[str, str], last: int) -> Tensors:
    """Return the tensors of one stack; `last` is the number of the feed-forward part of its layers."""
    published, own = f"{side}.block.{{}}.layer.", f"model.{side}.layers.{{}}."
    dense = f"{published}{last}.DenseReluDense."
    # All layers share the position bias, which is stored in the first.
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Stored(bias, (f"model.{side}.relative_bias.weight",)),
        *modules(attentions | {f"{last}.layer_norm": "post_attention_layernorm"}, published, own),
        # The upward projection is named by whether there is a gate next to it.
        Stored(dense + "wi_0.weight", (own + "mlp.gate_proj.weight",)),
        Stored(dense + "wi_1.weight", (own + "mlp.up_proj.weight",), when=lambda config: config.gated),
        Stored(dense + "wi.weight", (own + "mlp.up_proj.weight",), when=lambda config: not config.gated),
        Stored(dense + "wo.weight", (own + "mlp.down_proj.weight",)),
        Stored(f"{side}.final_layer_norm.weight", (f"model.{side}.norm.weight",)),
    )


UNSCALED = fixed(logits_scale=1.0)

T5 = FamilyFormat(
    architecture="T5ForConditionalGeneration",
    model_type="t5",
    source="Raffel et al. 2020, arXiv:1910.10683",
    rows=(
        fixed(family="encoder_decoder", positions="relative", attention_scale=1.0),
        integer("vocab_size", "vocab_size"),
        integer("d_model", "d_model", 512),
        integer("d_kv", "head_dim", 64),
        integer("d_ff", "d_ff", 2048),
        integer("num_layers", "n_layers", 6),
        integer("num_decoder_layers", "n_decoder_layers", lambda config: config.n_layers),
        integer("num_heads", "n_heads", 8),
        integer("n_positions", "max_positions", 512),
        integer("relative_attention_num_buckets", "n_relative_buckets", 32),
        integer("relative_attention_max_distance", "max_relative_distance", 128),
        Row("feed_forward_proj", read_feed_forward, write_feed_forward),
        number("layer_norm_epsilon", "norm_eps", 1e-6),
        number("dropout_rate", "dropout", 0.1),
        written("initializer_factor", 1.0),
        number("initializer_range", "init_std", 0.02),
        written("is_encoder_decoder", True),
        flag("tie_word_embeddings", "tie_embeddings", default=True),
        Row("scale_decoder_outputs", read_output_scale, write_output_scale),
        *TOKENS,
        derived("n_kv_heads", lambda config: config.n_heads),
    ),
    tensors=(
        Stored("shared.weight", ("model.embed_tokens.weight",)),
        *stack("encoder", SELF, 1),
        *stack("decoder", SELF | CROSS, 2),
        Stored("lm_head.weight", ("lm_head.weight",)),
    ),
    presence=(Presence("lm_head.weight", "tie_embeddings", False),),
    ignored=("coder.embed_tokens.weight", "EncDecAttention.relative_attention_bias"),
)

# The head of mT5 is its own, and its output is not scaled.
MT5 = replace(
    T5,
    architecture="MT5ForConditionalGeneration",
    model_type="mt5",
    source="Xue et al. 2020, arXiv:2010.11934",
    rows=replaced(T5.rows, number("layer_norm_epsilon", "norm_eps", 1e-6), scale_decoder_outputs=UNSCALED),
    is_written=False,  # with an output that is not scaled it is T5, which more programs read
)


def stack_with_own_biases(side: str, attentions: dict[str, str], last: int) -> Tensors:
    """Return the tensors of one stack of UMT5, where every layer has a position bias of its own."""
    shared, *rest = stack(side, attentions, last)
    published = shared.name.replace("block.0.", "block.{}.")
    return (Stored(published, (f"model.{side}.layers.{{}}.relative_bias.weight",)), *rest)


UMT5 = replace(
    T5,
    architecture="UMT5ForConditionalGeneration",
    model_type="umt5",
    source="Chung et al. 2023, arXiv:2304.09151",
    rows=(fixed(relative_bias_per_layer=True), *T5.rows),
    tensors=(
        Stored("shared.weight", ("model.embed_tokens.weight",)),
        *stack_with_own_biases("encoder", SELF, 1),
        *stack_with_own_biases("decoder", SELF | CROSS, 2),
        Stored("lm_head.weight", ("lm_head.weight",)),
    ),
)

T5_ENCODER = replace(
    T5,
    architecture="T5EncoderModel",
    source="Ni et al. 2021, arXiv:2108.08877",
    rows=(
        fixed(family="encoder", positions="relative", attention_scale=1.0, tie_embeddings=True),
        *replaced(
            T5.rows[1:],
            num_decoder_layers=None,
            scale_decoder_outputs=None,
            tie_word_embeddings=None,
            is_encoder_decoder=written("is_encoder_decoder", False),
        ),
    ),
    tensors=tuple(
        replace(stored, holds=tuple(name.replace("model.encoder.", "model.") for name in stored.holds))
        for stored in (Stored("shared.weight", ("model.embed_tokens.weight",)), *stack("encoder", SELF, 1))
    ),
    presence=(),
)
