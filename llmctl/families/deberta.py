"""DeBERTa v2 and v3: a BERT without absolute positions, whose attention scores contents and distances apart.

Source: He et al. 2020, arXiv:2006.03654; v3: arXiv:2111.09543. Read are models with one table of distances, whose
queries and keys have the projections of contents, as all of v3 have; no convolution beside the first layer (v2 XLarge).
"""

from collections.abc import Mapping
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.bert import BERT, BODY, IGNORED, ROWS, TIED
from llmctl.families.bert import LAYER as BERT_LAYER
from llmctl.families.family import FamilyFormat, Presence
from llmctl.families.parameters import Stored, module, modules, prefixed
from llmctl.families.published import Published
from llmctl.families.roberta import BERT_HEAD, WITH_HEAD
from llmctl.families.rows import Row, constant, derived, fixed, number, only, replaced, requires, written
from llmctl.model.shapes import default_scale

KINDS = {"c2p", "p2c"}
"""Content to position and position to content."""


def read_kinds(published: Published, _: ModelConfig) -> Mapping[str, Any]:
    """Refuse models without both kinds of scores; a list, or names separated by `|`."""
    kinds = published.values.get("pos_att_type")
    names = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    if not isinstance(names, list) or {str(name).strip() for name in names} != KINDS:
        raise published.refuse("pos_att_type", kinds, "c2p and p2c")
    return {}


def read_buckets(published: Published, config: ModelConfig) -> Mapping[str, Any]:
    """Read the rows of the table of distances, and from where on all share the last one."""
    reach = published.values.get("max_relative_positions")
    # Any number below 1 stands for the length of the longest row.
    is_set = reach is not None and not (type(reach) is int and reach < 1)
    return {
        "n_relative_buckets": 2 * published.integer("position_buckets"),
        "max_relative_distance": published.integer("max_relative_positions") if is_set else config.max_positions,
    }


def write_buckets(config: ModelConfig) -> dict[str, Any]:
    """Write the rows of the table in one direction, and its reach."""
    return {
        "position_buckets": config.n_relative_buckets // 2,
        "max_relative_positions": config.max_relative_distance,
    }


def token_types() -> Row:
    """Return the row of the token types, of which there may be none."""

    def read(published: Published, _: ModelConfig) -> Mapping[str, Any]:
        size = published.values.get("type_vocab_size")
        return {"n_token_types": published.integer("type_vocab_size") if size else 0}

    return Row("type_vocab_size", read, lambda config: {"type_vocab_size": config.n_token_types})


def width_of(key: str) -> Row:
    """Return the row of a width that must be the model's."""

    def read(published: Published, config: ModelConfig) -> Mapping[str, Any]:
        published.only(key, config.d_model)
        return {}

    return Row(key, read)


SCALED_SCORES = Row(
    "attention_scale",
    derived("attention_scale", lambda config: default_scale(config.positions, config.head_dim)).read,
)
DEBERTA_ROWS = (
    fixed(family="encoder", norm="layernorm", norm_position="post", embedding_norm=True, positions="disentangled"),
    *replaced(
        ROWS[1:],
        token_types(),
        number("layer_norm_eps", "norm_eps", 1e-7),
        SCALED_SCORES,
        position_embedding_type=None,
    ),
    constant("relative_attention", True),
    constant("position_biased_input", False),
    constant("share_att_key", True),
    Row("pos_att_type", read_kinds, written("pos_att_type", ["p2c", "c2p"]).write),
    constant("norm_rel_ebd", "layer_norm"),
    Row("position_buckets", read_buckets, write_buckets, lambda config: config.n_relative_buckets % 2 == 0),
    only("conv_kernel_size", 0),
    width_of("embedding_size"),
)
LAYER = {name: own for name, own in BERT_LAYER.items() if not own.endswith(("q_proj", "k_proj", "v_proj"))} | {
    "attention.self.query_proj": "self_attn.q_proj",
    "attention.self.key_proj": "self_attn.k_proj",
    "attention.self.value_proj": "self_attn.v_proj",
}
DEBERTA_BODY = (
    *(stored for stored in BODY if stored.name.startswith("embeddings.") and "position" not in stored.name),
    *modules(LAYER, "encoder.layer.{}.", "model.layers.{}."),
    Stored("encoder.rel_embeddings.weight", ("model.embed_distances.weight",)),
    *module("encoder.LayerNorm", "model.distance_norm"),
)
# The table of positions that the files of v3 contain is not used; the discriminator tells replaced tokens from others.
DEBERTA_IGNORED = (*IGNORED, "position_embeddings", "mask_predictions.")

DEBERTA = FamilyFormat(
    architecture="DebertaV2ForMaskedLM",
    model_type="deberta-v2",
    source="He et al. 2020, arXiv:2006.03654",
    rows=(
        *DEBERTA_ROWS,
        WITH_HEAD,
        written("legacy", True),
        # What is published as v3 names no architecture, and some of it has no head.
        requires(lambda config: config.head_transform and config.logits_bias),
    ),
    tensors=(*prefixed("deberta.", DEBERTA_BODY), *BERT_HEAD),
    presence=(
        Presence("cls.predictions.transform.dense.weight", "head_transform", True),
        Presence("cls.predictions.bias", "logits_bias", True),
    ),
    ignored=(*DEBERTA_IGNORED, "cls.predictions.bias", "cls.predictions.decoder"),
    # The head of `legacy` false computes the same under other names.
    spellings=(
        ("lm_predictions.lm_head.bias", "cls.predictions.bias"),
        ("lm_predictions.lm_head.", "cls.predictions.transform."),
    ),
    substitutes=BERT.substitutes,
)
DEBERTA_BARE = FamilyFormat(
    architecture="DebertaV2Model",
    model_type="deberta-v2",
    source="He et al. 2020, arXiv:2006.03654",
    rows=replaced(DEBERTA_ROWS, TIED),
    tensors=DEBERTA_BODY,
    ignored=(*DEBERTA_IGNORED, "cls.", "lm_predictions."),
    spellings=(("deberta.", ""),),
)
