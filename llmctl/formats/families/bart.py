"""BART and Marian: the post-norm encoder-decoder of 2017, with learned or sinusoidal positions.

`BartForConditionalGeneration`: Lewis et al. 2020, arXiv:1910.13461; its position table skips two rows and the
embeddings are normalized. `MarianMTModel`: Junczys-Dowmunt et al. 2018, arXiv:1804.00344; the math of Vaswani et al.
2017, arXiv:1706.03762, whose fixed table of positions is not one of our parameters.
"""

from typing import Any

from llmctl.config import ModelConfig
from llmctl.formats.families.family import FamilyFormat, Presence
from llmctl.formats.families.parameters import HEAD, Stored, Tensors, module, modules
from llmctl.formats.families.published import Published
from llmctl.formats.families.rows import (
    STANDARD_HEADS,
    TOKENS,
    Row,
    activation,
    constant,
    converted,
    equal,
    fixed,
    integer,
    number,
    only,
    repeated,
    requires,
    written,
)


def read_scale(published: Published, config: ModelConfig) -> float:
    """Return the factor on the embeddings: sqrt(d_model) or none."""
    return config.d_model**0.5 if published.flag("scale_embedding") else 1.0


ROWS = (
    fixed(family="encoder_decoder", norm="layernorm", norm_position="post", norm_eps=1e-5, gated=False),
    fixed(attention_bias=True, mlp_bias=True, tie_embeddings=True),
    only("normalize_before", False),
    only("add_final_layer_norm", False),
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


def read_decoder_vocabulary(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Refuse a second vocabulary for the target language."""
    published.only("decoder_vocab_size", config.vocab_size)
    return {}


# No key tells whether the logits have a bias; the file has the tensor or not.
LOGITS_BIAS = Presence("final_logits_bias", "logits_bias", True)

ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
SELF = {f"self_attn.{key}": f"self_attn.{value}" for key, value in ATTENTION.items()}
SELF["self_attn_layer_norm"] = "input_layernorm"
CROSS = {f"encoder_attn.{key}": f"cross_attn.{value}" for key, value in ATTENTION.items()}
CROSS["encoder_attn_layer_norm"] = "cross_attention_layernorm"
FEED_FORWARD = {"fc1": "mlp.up_proj", "fc2": "mlp.down_proj", "final_layer_norm": "post_attention_layernorm"}


def stack(prefix: str, layer: dict[str, str]) -> Tensors:
    """Return the tensors of one stack; Marian has neither the positions nor the norm of the embeddings."""
    return (
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

# Copies of the shared embedding, as older files store them.
COPIES = ("coder.embed_tokens.weight", HEAD, "coder.version")

BART = FamilyFormat(
    architecture="BartForConditionalGeneration",
    model_type="bart",
    source="Lewis et al. 2020, arXiv:1910.13461",
    rows=(
        *ROWS,
        only("static_position_embeddings", False),
        only("normalize_embedding", True),
        fixed(positions="learned", position_offset=2, embedding_norm=True, logits_bias=True),
    ),
    tensors=TENSORS,
    presence=(LOGITS_BIAS,),
    ignored=COPIES,
)

MARIAN = FamilyFormat(
    architecture="MarianMTModel",
    model_type="marian",
    source="Junczys-Dowmunt et al. 2018, arXiv:1804.00344",
    rows=(
        *ROWS,
        Row("decoder_vocab_size", read_decoder_vocabulary, repeated("decoder_vocab_size", "vocab_size").write),
        constant("share_encoder_decoder_embeddings", True),
        constant("static_position_embeddings", True),
        constant("normalize_embedding", False),
        fixed(positions="sinusoidal", logits_bias=True),
        requires(lambda config: config.decoder_start_id >= 0),  # transformers does not load it without one
    ),
    tensors=TENSORS,
    presence=(LOGITS_BIAS,),
    ignored=(*COPIES, "coder.embed_positions.weight"),
)
