"""BART, Marian and their pre-norm relatives: the encoder-decoder of 2017, with learned or sinusoidal positions.

`BartForConditionalGeneration`: Lewis et al. 2020, arXiv:1910.13461; its position table skips two rows and the
embeddings are normalized. `MarianMTModel`: Junczys-Dowmunt et al. 2018, arXiv:1804.00344; the math of Vaswani et al.
2017, arXiv:1706.03762, whose fixed table of positions is not one of our parameters.
"""

from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.family import FamilyFormat, Presence
from llmctl.families.parameters import HEAD, Stored, Tensors, module, modules
from llmctl.families.published import Published
from llmctl.families.rows import (
    STANDARD_HEADS,
    TOKENS,
    Row,
    activation,
    constant,
    converted,
    derived,
    equal,
    fixed,
    flag,
    integer,
    number,
    only,
    repeated,
    replaced,
    requires,
    written,
)


def read_scale(published: Published, config: ModelConfig) -> float:
    """Return the factor on the embeddings: sqrt(d_model) or none."""
    return config.d_model**0.5 if published.flag("scale_embedding") else 1.0


def read_decoder_scale(published: Published, config: ModelConfig) -> float:
    """Return XGLM's factor on the embeddings, which are scaled unless the file says otherwise."""
    return config.d_model**0.5 if published.flag("scale_embedding", default=True) else 1.0


ROWS = (
    fixed(family="encoder_decoder", norm="layernorm", norm_eps=1e-5, gated=False),
    fixed(attention_bias=True, mlp_bias=True, tie_embeddings=True),
    only("extra_pos_embeddings", 2),
    integer("vocab_size", "vocab_size"),
    integer("d_model", "d_model", 1024),
    integer("encoder_layers", "n_layers"),
    integer("decoder_layers", "n_decoder_layers"),
    repeated("num_hidden_layers", "n_layers"),
    # Encoder and decoder have a size each there; ours share one.
    integer("encoder_attention_heads", "n_heads"),
    equal("decoder_attention_heads", "n_heads", "encoder_attention_heads"),
    integer("encoder_ffn_dim", "d_ff"),
    equal("decoder_ffn_dim", "d_ff", "encoder_ffn_dim"),
    integer("max_position_embeddings", "max_positions", 1024),
    activation("activation_function", "gelu"),
    number("dropout", "dropout", 0.1),
    written("attention_dropout", 0.0),
    written("activation_dropout", 0.0),
    number("init_std", "init_std", 0.02),
    converted("scale_embedding", "embedding_scale", read_scale, lambda scale: scale != 1.0),
    written("is_encoder_decoder", True),
    constant("tie_word_embeddings", True),
    written("forced_eos_token_id", None),
    *TOKENS,
    *STANDARD_HEADS,
)


def read_vocabularies(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read the sizes of one vocabulary, or of two with a table each; only with two may the head have its own weights."""
    source = published.integer("vocab_size")
    if published.flag("share_encoder_decoder_embeddings", default=True):
        published.only("decoder_vocab_size", source)
        published.only("tie_word_embeddings", True)
        return {"vocab_size": source, "tie_embeddings": True}
    return {
        "vocab_size": published.integer("decoder_vocab_size", source),
        "source_vocab_size": source,
        "tie_embeddings": published.flag("tie_word_embeddings", default=True),
    }


# No key tells whether the logits have a bias; the file has the tensor or not.
LOGITS_BIAS = Presence("final_logits_bias", "logits_bias", True)

ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
SELF = {f"self_attn.{key}": f"self_attn.{value}" for key, value in ATTENTION.items()}
SELF["self_attn_layer_norm"] = "input_layernorm"
CROSS = {f"encoder_attn.{key}": f"cross_attn.{value}" for key, value in ATTENTION.items()}
CROSS["encoder_attn_layer_norm"] = "cross_attention_layernorm"
FEED_FORWARD = {"fc1": "mlp.up_proj", "fc2": "mlp.down_proj", "final_layer_norm": "post_attention_layernorm"}


def stack(prefix: str, layer: dict[str, str]) -> Tensors:
    """Return the tensors of one stack.

    Marian has neither the positions nor the norm of the embeddings; only pre-norm models have a final norm.
    """
    return (
        *module(prefix + "layer_norm", prefix + "norm"),
        Stored(prefix + "embed_positions.weight", (prefix + "embed_positions.weight",)),
        *module(prefix + "layernorm_embedding", prefix + "embedding_norm"),
        *modules(layer, prefix + "layers.{}.", prefix + "layers.{}."),
    )


TENSORS = (
    Stored("model.shared.weight", ("model.embed_tokens.weight",)),
    Stored("final_logits_bias", ("lm_head.bias",), "row"),
    *stack("model.encoder.", SELF | FEED_FORWARD),
    *stack("model.decoder.", SELF | CROSS | FEED_FORWARD),
    # Stored only in a file whose head is not the embedding; transformers then also has four embeddings, so such a model
    # is written in our own format.
    Stored(HEAD, (HEAD,)),
)

POST_NORM = (
    fixed(norm_position="post"),
    only("normalize_before", False),
    only("add_final_layer_norm", False),
)

# Copies of the shared embedding, as older files store them.
COPIES = ("coder.embed_tokens.weight", HEAD, "coder.version")

BART = FamilyFormat(
    architecture="BartForConditionalGeneration",
    model_type="bart",
    source="Lewis et al. 2020, arXiv:1910.13461",
    rows=(
        *ROWS,
        *POST_NORM,
        only("static_position_embeddings", False),
        only("normalize_embedding", True),
        fixed(positions="learned", position_offset=2, embedding_norm=True, logits_bias=True),
    ),
    tensors=TENSORS,
    presence=(LOGITS_BIAS,),
    ignored=COPIES,
)

# Of two vocabularies, ours is that of the decoder and the head; the encoder's has a table of its own.
MARIAN_ROWS = (
    ROWS[0],
    fixed(attention_bias=True, mlp_bias=True),
    *replaced(
        ROWS[2:],
        Row(
            "vocab_size",
            read_vocabularies,
            lambda config: {"vocab_size": config.source_vocab_size or config.vocab_size},
        ),
        Row("tie_word_embeddings", write=lambda config: {"tie_word_embeddings": config.tie_embeddings}),
    ),
    *POST_NORM,
    repeated("decoder_vocab_size", "vocab_size"),
    Row(
        "share_encoder_decoder_embeddings",
        write=lambda config: {"share_encoder_decoder_embeddings": not config.source_vocab_size},
    ),
)

MARIAN = FamilyFormat(
    architecture="MarianMTModel",
    model_type="marian",
    source="Junczys-Dowmunt et al. 2018, arXiv:1804.00344",
    rows=(
        *MARIAN_ROWS,
        constant("static_position_embeddings", True),
        constant("normalize_embedding", False),
        fixed(positions="sinusoidal", logits_bias=True),
        requires(lambda config: config.decoder_start_id >= 0),  # transformers does not load it without one
    ),
    tensors=(
        replace(TENSORS[0], when=lambda config: not config.source_vocab_size),
        Stored("model.decoder.embed_tokens.weight", TENSORS[0].holds, when=lambda config: config.source_vocab_size > 0),
        Stored("model.encoder.embed_tokens.weight", ("model.encoder.embed_tokens.weight",)),
        *TENSORS[1:],
    ),
    presence=(LOGITS_BIAS,),
    ignored=(*COPIES, "coder.embed_positions.weight"),
)

MBART = FamilyFormat(
    architecture="MBartForConditionalGeneration",
    model_type="mbart",
    source="Liu et al. 2020, arXiv:2001.08210",
    rows=(
        *ROWS,
        fixed(positions="learned", position_offset=2, embedding_norm=True, logits_bias=True),
    ),
    tensors=TENSORS,
    presence=(LOGITS_BIAS,),
    ignored=COPIES,
)

PEGASUS = FamilyFormat(
    architecture="PegasusForConditionalGeneration",
    model_type="pegasus",
    source="Zhang et al. 2019, arXiv:1912.08777",
    rows=(
        *ROWS,
        only("static_position_embeddings", True),
        fixed(positions="sinusoidal", logits_bias=True),
    ),
    tensors=TENSORS,
    presence=(LOGITS_BIAS,),
    ignored=(*COPIES, "coder.embed_positions.weight"),
)

M2M = FamilyFormat(
    architecture="M2M100ForConditionalGeneration",
    model_type="m2m_100",
    source="M2M-100, arXiv:2010.11125; NLLB, arXiv:2207.04672",
    rows=(
        *replaced(ROWS, activation("activation_function", "relu")),
        fixed(positions="sinusoidal", sinusoid_rates="halves"),
        # As in fairseq, positions follow the id of the padding token.
        derived("position_offset", lambda config: config.pad_id + 1 if config.pad_id >= 0 else 2),
    ),
    tensors=tuple(stored for stored in TENSORS if stored.name != "final_logits_bias"),
    ignored=(*COPIES, "coder.embed_positions.weight"),
)

XGLM = FamilyFormat(
    architecture="XGLMForCausalLM",
    model_type="xglm",
    source="Lin et al. 2021, arXiv:2112.10668",
    rows=(
        fixed(norm="layernorm", norm_eps=1e-5, gated=False, attention_bias=True, mlp_bias=True),
        fixed(positions="sinusoidal", sinusoid_rates="halves", position_offset=2),
        integer("vocab_size", "vocab_size"),
        integer("d_model", "d_model", 1024),
        integer("num_layers", "n_layers", 24),
        integer("attention_heads", "n_heads", 16),
        integer("ffn_dim", "d_ff", 4096),
        integer("max_position_embeddings", "max_positions", 2048),
        activation("activation_function", "gelu"),
        number("dropout", "dropout", 0.1),
        written("attention_dropout", 0.0),
        written("activation_dropout", 0.0),
        number("init_std", "init_std", 0.02),
        converted("scale_embedding", "embedding_scale", read_decoder_scale, lambda scale: scale != 1.0),
        flag("tie_word_embeddings", "tie_embeddings", default=True),
        *TOKENS,
        *STANDARD_HEADS,
    ),
    tensors=(
        Stored("model.embed_tokens.weight", ("model.embed_tokens.weight",)),
        *module("model.layer_norm", "model.norm"),
        *modules(SELF | FEED_FORWARD, "model.layers.{}.", "model.layers.{}."),
        Stored(HEAD, (HEAD,)),
    ),
    prefix="model.",
    ignored=("embed_positions.weights",),
)
