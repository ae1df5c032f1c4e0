"""BERT: a post-norm encoder with learned positions and token types, with its masked-word head or without any.

Without a head (`BertModel`, as sentence encoders are published) the logits are those of the embedding itself: a tied
head without transform and bias has no parameters of its own, so none are invented. The pooler, a layer for sentence
pairs, is part of our models only under a classification head.
Source: Devlin et al. 2019, arXiv:1810.04805.
"""

from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import Stored, module, modules, prefixed
from llmctl.families.rows import (
    STANDARD_HEADS,
    TOKENS,
    activation,
    constant,
    converted,
    fixed,
    flag,
    integer,
    number,
    only,
    replaced,
    written,
)

ROWS = (
    fixed(family="encoder", norm="layernorm", norm_position="post", embedding_norm=True, positions="learned"),
    fixed(gated=False, attention_bias=True, mlp_bias=True),
    # As a decoder, BERT has a causal mask and cross-attention, which our encoders lack.
    only("is_decoder", False),
    only("add_cross_attention", False),
    integer("vocab_size", "vocab_size"),
    integer("hidden_size", "d_model", 768),
    integer("num_hidden_layers", "n_layers", 12),
    integer("num_attention_heads", "n_heads", 12),
    integer("intermediate_size", "d_ff", lambda config: 4 * config.d_model),
    activation("hidden_act", "gelu"),
    number("hidden_dropout_prob", "dropout", 0.1),
    written("attention_probs_dropout_prob", 0.0),
    integer("max_position_embeddings", "max_positions", 512),
    constant("position_embedding_type", "absolute"),
    integer("type_vocab_size", "n_token_types", 2),
    number("initializer_range", "init_std", 0.02),
    number("layer_norm_eps", "norm_eps", 1e-12),
    flag("tie_word_embeddings", "tie_embeddings", default=True),
    *TOKENS,
    *STANDARD_HEADS,
)

# The logits of a bare encoder are those of the embedding, whatever the file says about a head that it lacks.
TIED = converted(
    "tie_word_embeddings",
    "tie_embeddings",
    lambda published, _: published.flag("tie_word_embeddings", default=True) or True,
)

LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.o_proj",
    "attention.output.LayerNorm": "input_layernorm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "post_attention_layernorm",
}
BODY = (
    Stored("embeddings.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Stored("embeddings.position_embeddings.weight", ("model.embed_positions.weight",)),
    Stored("embeddings.token_type_embeddings.weight", ("model.embed_token_types.weight",)),
    *module("embeddings.LayerNorm", "model.embedding_norm"),
    *modules(LAYER, "encoder.layer.{}.", "model.layers.{}."),
)

# bert-base-uncased itself still stores its norms under TensorFlow's names.
SPELLINGS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
# Buffers, the head of the next-sentence task, and the copies of a tied head.
IGNORED = ("position_ids", "pooler.", "cls.seq_relationship.", "cls.predictions.decoder.bias")

BERT = FamilyFormat(
    architecture="BertForMaskedLM",
    aliases=("BertForPreTraining",),
    model_type="bert",
    source="Devlin et al. 2019, arXiv:1810.04805",
    rows=(*ROWS, fixed(logits_bias=True, head_transform=True)),
    tensors=(
        *prefixed("bert.", BODY),
        *module("cls.predictions.transform.dense", "head_dense"),
        *module("cls.predictions.transform.LayerNorm", "head_norm"),
        # Tied, both are one parameter. An untied head computes with the decoder's own.
        Stored("cls.predictions.bias", ("lm_head.bias",), when=lambda config: config.tie_embeddings),
        Stored("cls.predictions.decoder.bias", ("lm_head.bias",), when=lambda config: not config.tie_embeddings),
        Stored("cls.predictions.decoder.weight", ("lm_head.weight",)),
    ),
    ignored=(*IGNORED, "cls.predictions.bias"),
    spellings=SPELLINGS,
    substitutes=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
)

BERT_BARE = FamilyFormat(
    architecture="BertModel",
    model_type="bert",
    source="Devlin et al. 2019, arXiv:1810.04805",
    rows=replaced(ROWS, TIED),
    tensors=BODY,
    ignored=(*IGNORED, "cls."),
    spellings=(*SPELLINGS, ("bert.", "")),
)
