"""Relatives of BERT under other names: RoBERTa, XLM-R, CamemBERT, DistilBERT, MPNet, ERNIE, Megatron-BERT, ALBERT, ELECTRA.

Sources: RoBERTa, arXiv:1907.11692; XLM-R, arXiv:1911.02116; DistilBERT, arXiv:1910.01108; MPNet, arXiv:2004.09297; ALBERT,
arXiv:1909.11942; ELECTRA, arXiv:2003.10555.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.bert import BERT, BERT_BARE, BODY, IGNORED, LAYER, ROWS, SPELLINGS, TIED
from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import HEAD, Stored, Tensors, module, modules, prefixed
from llmctl.families.published import Published
from llmctl.families.rows import (
    STANDARD_HEADS,
    TOKENS,
    Row,
    activation,
    constant,
    fixed,
    flag,
    integer,
    number,
    only,
    replaced,
    requires,
    written,
)

OWN = "model.layers.{}."


def is_tied(config: ModelConfig) -> bool:
    """Tell whether the head is the embedding."""
    return config.tie_embeddings


def is_untied(config: ModelConfig) -> bool:
    """Tell whether the head is its own."""
    return not config.tie_embeddings


def masked_head(dense: str, norm: str, decoder: str, bias: str) -> Tensors:
    """Return the tensors of a head with a transform, under these names; an untied head has a bias of its own."""
    return (
        *module(dense, "head_dense"),
        *module(norm, "head_norm"),
        Stored(bias, ("lm_head.bias",), when=is_tied),
        Stored(decoder + ".bias", ("lm_head.bias",), when=is_untied),
        Stored(decoder + ".weight", (HEAD,)),
    )


WITH_HEAD = fixed(logits_bias=True, head_transform=True)


def offset_positions(default_pad: int | None = 1) -> Row:
    """Return the row of the position table of fairseq's encoders, whose positions follow the padding token's id.

    default_pad: the padding of a file that names none; None: the offset does not depend on it, and is 2.
    """

    def skipped(published: Published) -> int:
        pad = published.token("pad_token_id")
        return 2 if default_pad is None else (pad if pad >= 0 else default_pad) + 1

    def read(published: Published, _: ModelConfig) -> Mapping[str, Any]:
        rows, offset = published.integer("max_position_embeddings", 512), skipped(published)
        if rows <= offset:
            raise published.refuse("max_position_embeddings", rows, f"more than {offset}, which are skipped")
        return {"max_positions": rows - offset, "position_offset": offset}

    return Row(
        "max_position_embeddings",
        read,
        lambda config: {"max_position_embeddings": config.max_positions + config.position_offset},
        lambda config: default_pad is None or config.position_offset == config.pad_id + 1,
    )


ROBERTA_ROWS = replaced(ROWS, offset_positions())
ROBERTA_HEAD = masked_head("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
ROBERTA_IGNORED = (*IGNORED, "lm_head.decoder.bias", "lm_head.bias")


def like_roberta(name: str, model_type: str, source: str) -> tuple[FamilyFormat, FamilyFormat]:
    """Return a family of RoBERTa's shape, with its head and without."""
    with_head = FamilyFormat(
        architecture=f"{name}ForMaskedLM",
        model_type=model_type,
        source=source,
        rows=(*ROBERTA_ROWS, WITH_HEAD),
        tensors=(*prefixed("roberta.", BODY), *ROBERTA_HEAD),
        ignored=ROBERTA_IGNORED,
        substitutes=(("lm_head.decoder.bias", "lm_head.bias"),),
    )
    bare = replace(
        with_head,
        architecture=f"{name}Model",
        rows=replaced(ROBERTA_ROWS, TIED),
        tensors=BODY,
        ignored=(*IGNORED, "lm_head."),
        spellings=(("roberta.", ""),),
        substitutes=(),
    )
    return with_head, bare


ROBERTA, ROBERTA_BARE = like_roberta("Roberta", "roberta", "Liu et al. 2019, arXiv:1907.11692")
XLM_ROBERTA, XLM_ROBERTA_BARE = like_roberta("XLMRoberta", "xlm-roberta", "Conneau et al. 2019, arXiv:1911.02116")
CAMEMBERT, CAMEMBERT_BARE = like_roberta("Camembert", "camembert", "Martin et al. 2019, arXiv:1911.03894")

DISTIL_ROWS: tuple[Row, ...] = (
    fixed(family="encoder", norm="layernorm", norm_position="post", norm_eps=1e-12, embedding_norm=True),
    fixed(positions="learned", gated=False, attention_bias=True, mlp_bias=True),
    integer("vocab_size", "vocab_size"),
    integer("dim", "d_model", 768),
    integer("n_layers", "n_layers", 6),
    integer("n_heads", "n_heads", 12),
    integer("hidden_dim", "d_ff", lambda config: 4 * config.d_model),
    activation("activation", "gelu"),
    number("dropout", "dropout", 0.1),
    written("attention_dropout", 0.0),
    integer("max_position_embeddings", "max_positions", 512),
    # Only the start values differ: sinusoids are stored as any other table.
    only("sinusoidal_pos_embds", False, True),
    number("initializer_range", "init_std", 0.02),
    flag("tie_word_embeddings", "tie_embeddings", default=True),
    *TOKENS,
    *STANDARD_HEADS,
)
DISTIL_LAYER = {
    "attention.q_lin": "self_attn.q_proj",
    "attention.k_lin": "self_attn.k_proj",
    "attention.v_lin": "self_attn.v_proj",
    "attention.out_lin": "self_attn.o_proj",
    "sa_layer_norm": "input_layernorm",
    "ffn.lin1": "mlp.up_proj",
    "ffn.lin2": "mlp.down_proj",
    "output_layer_norm": "post_attention_layernorm",
}
DISTIL_BODY = (
    Stored("embeddings.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Stored("embeddings.position_embeddings.weight", ("model.embed_positions.weight",)),
    *module("embeddings.LayerNorm", "model.embedding_norm"),
    *modules(DISTIL_LAYER, "transformer.layer.{}.", OWN),
)

DISTILBERT = FamilyFormat(
    architecture="DistilBertForMaskedLM",
    model_type="distilbert",
    source="Sanh et al. 2019, arXiv:1910.01108",
    rows=(*DISTIL_ROWS, WITH_HEAD),
    tensors=(
        *prefixed("distilbert.", DISTIL_BODY),
        *module("vocab_transform", "head_dense"),
        *module("vocab_layer_norm", "head_norm"),
        Stored("vocab_projector.bias", ("lm_head.bias",)),
        Stored("vocab_projector.weight", (HEAD,)),
    ),
    ignored=("position_ids",),
)
DISTILBERT_BARE = replace(
    DISTILBERT,
    architecture="DistilBertModel",
    rows=replaced(DISTIL_ROWS, TIED),
    tensors=DISTIL_BODY,
    ignored=("position_ids", "vocab_"),
    spellings=(("distilbert.", ""),),
)

MPNET_LAYER = {
    "attention.attn.q": "self_attn.q_proj",
    "attention.attn.k": "self_attn.k_proj",
    "attention.attn.v": "self_attn.v_proj",
    "attention.attn.o": "self_attn.o_proj",
    "attention.LayerNorm": "input_layernorm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "post_attention_layernorm",
}
MPNET_BODY = (
    *(stored for stored in DISTIL_BODY if "{}" not in stored.name),
    *modules(MPNET_LAYER, "encoder.layer.{}.", OWN),
    Stored("encoder.relative_attention_bias.weight", ("model.relative_bias.weight",)),
)
MPNET_ROWS = (
    fixed(relative_bias=True),
    *replaced(ROWS, offset_positions(None), type_vocab_size=None, position_embedding_type=None),
    integer("relative_attention_num_buckets", "n_relative_buckets", 32),
)
MPNET = FamilyFormat(
    architecture="MPNetForMaskedLM",
    model_type="mpnet",
    source="Song et al. 2020, arXiv:2004.09297",
    rows=(*MPNET_ROWS, WITH_HEAD),
    tensors=(*prefixed("mpnet.", MPNET_BODY), *ROBERTA_HEAD),
    ignored=ROBERTA_IGNORED,
    substitutes=(("lm_head.decoder.bias", "lm_head.bias"),),
)
MPNET_BARE = replace(
    MPNET,
    architecture="MPNetModel",
    rows=replaced(MPNET_ROWS, TIED),
    tensors=MPNET_BODY,
    ignored=(*IGNORED, "lm_head."),
    spellings=(("mpnet.", ""),),
    substitutes=(),
)

BERT_HEAD = masked_head(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
)
ERNIE_ROWS = (*ROWS, only("use_task_id", False))
ERNIE = replace(
    BERT,
    architecture="ErnieForMaskedLM",
    aliases=(),
    model_type="ernie",
    source="ERNIE 3.0 zh, Baidu; Sun et al. 2021, arXiv:2107.02137",
    rows=(*ERNIE_ROWS, WITH_HEAD),
    tensors=(*prefixed("ernie.", BODY), *BERT_HEAD),
    is_written=False,  # it is BERT, which more programs read
)
ERNIE_BARE = replace(
    BERT_BARE,
    architecture="ErnieModel",
    model_type="ernie",
    rows=(*replaced(ROWS, TIED), only("use_task_id", False)),
    spellings=(*SPELLINGS, ("ernie.", "")),
    is_written=False,
)

PRE_NORM = {name: own for name, own in LAYER.items() if "LayerNorm" not in name} | {
    "attention.ln": "input_layernorm",
    "ln": "post_attention_layernorm",
}
MEGATRON = FamilyFormat(
    architecture="MegatronBertForMaskedLM",
    model_type="megatron-bert",
    source="Shoeybi et al. 2019, arXiv:1909.08053",
    rows=(
        fixed(family="encoder", norm="layernorm", positions="learned"),
        *ROWS[1:],
        WITH_HEAD,
    ),
    tensors=(
        *prefixed("bert.", tuple(stored for stored in BODY if "encoder" not in stored.name)),
        *modules(PRE_NORM, "bert.encoder.layer.{}.", OWN),
        *module("bert.encoder.ln", "model.norm"),
        *BERT_HEAD,
    ),
    ignored=(*IGNORED, "cls.predictions.bias"),
    substitutes=BERT.substitutes,
)

ALBERT_LAYER = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.dense": "self_attn.o_proj",
    "attention.LayerNorm": "input_layernorm",
    "ffn": "mlp.up_proj",
    "ffn_output": "mlp.down_proj",
    "full_layer_layer_norm": "post_attention_layernorm",
}
ALBERT_BODY = (
    *(stored for stored in BODY if "encoder" not in stored.name),
    *module("encoder.embedding_hidden_mapping_in", "model.embed_projection"),
    *modules(ALBERT_LAYER, "encoder.albert_layer_groups.0.albert_layers.0.", "model.layers.0."),
)
ALBERT_ROWS = (
    fixed(share_layers=True),
    constant("num_hidden_groups", 1),
    constant("inner_group_num", 1),
    *replaced(ROWS, activation("hidden_act", "gelu_new")),
    integer("embedding_size", "d_embedding", 128),
)
ALBERT = FamilyFormat(
    architecture="AlbertForMaskedLM",
    model_type="albert",
    source="Lan et al. 2019, arXiv:1909.11942",
    rows=(*ALBERT_ROWS, WITH_HEAD),
    tensors=(
        *prefixed("albert.", ALBERT_BODY),
        *masked_head("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"),
    ),
    ignored=("position_ids", "pooler.", "sop_classifier.", "predictions.decoder.bias", "predictions.bias"),
    substitutes=(("predictions.decoder.bias", "predictions.bias"),),
)
ALBERT_BARE = replace(
    ALBERT,
    architecture="AlbertModel",
    rows=replaced(ALBERT_ROWS, TIED),
    tensors=ALBERT_BODY,
    ignored=("position_ids", "pooler.", "sop_classifier.", "predictions."),
    spellings=(("albert.", ""),),
    substitutes=(),
)


def read_embedding_size(published: Published, config: ModelConfig, default: int = 128) -> dict[str, int]:
    """Read the width of the embeddings; as wide as the model, they are not projected."""
    width = published.integer("embedding_size", default)
    return {"d_embedding": 0 if width == config.d_model else width}


ELECTRA_ROWS = (
    *ROWS,
    Row(
        "embedding_size",
        read_embedding_size,
        lambda config: {"embedding_size": config.d_embedding or config.d_model},
    ),
)
ELECTRA_BODY = (*BODY, *module("embeddings_project", "model.embed_projection"))
# The discriminator's head tells replaced tokens from others: no head of ours.
ELECTRA_BARE = FamilyFormat(
    architecture="ElectraModel",
    aliases=("ElectraForPreTraining",),
    model_type="electra",
    source="Clark et al. 2020, arXiv:2003.10555",
    rows=replaced(ELECTRA_ROWS, TIED),
    tensors=ELECTRA_BODY,
    ignored=("position_ids", "discriminator_predictions.", "generator_"),
    spellings=(("electra.", ""),),
)
ELECTRA = replace(
    ELECTRA_BARE,
    architecture="ElectraForMaskedLM",
    aliases=(),
    rows=(*ELECTRA_ROWS, WITH_HEAD, requires(lambda config: config.activation == "gelu")),
    tensors=(
        *prefixed("electra.", ELECTRA_BODY),
        *module("generator_predictions.dense", "head_dense"),
        *module("generator_predictions.LayerNorm", "head_norm"),
        *module("generator_lm_head", "lm_head"),
    ),
    spellings=(),
)
ENCODERS = (
    *(ROBERTA, ROBERTA_BARE, XLM_ROBERTA, XLM_ROBERTA_BARE, CAMEMBERT, CAMEMBERT_BARE),
    *(DISTILBERT, DISTILBERT_BARE, MPNET, MPNET_BARE, ERNIE, ERNIE_BARE, MEGATRON),
    *(ALBERT, ALBERT_BARE, ELECTRA, ELECTRA_BARE),
)
