"""RoFormer: BERT with rotary positions, whose pairs of channels stand side by side.

Source: Su et al. 2021, arXiv:2104.09864. Models that also rotate values are not read.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from llmctl.config import ModelConfig
from llmctl.families.bert import BERT, BODY, IGNORED, LAYER, ROWS, TIED
from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import Tensors, module, modules, prefixed
from llmctl.families.roberta import BERT_HEAD, WITH_HEAD, read_embedding_size
from llmctl.families.rows import Row, constant, fixed, integer, replaced

if TYPE_CHECKING:
    from torch import Tensor

TABLE = "encoder.embed_positions.weight"
"""The sines and cosines of the rotation, which the published files contain: nothing that is learned."""


def sinusoids(config: ModelConfig) -> "dict[str, Tensor]":
    """Return the table, by its name in a model without a head."""
    from llmctl.model.positions import sinusoidal_table

    return {TABLE: sinusoidal_table(config.max_positions, config.head_dim)}


def sinusoids_of_body(config: ModelConfig) -> "dict[str, Tensor]":
    """Return the table, by its name in a model with a head."""
    return {"roformer." + name: table for name, table in sinusoids(config).items()}


ROFORMER_ROWS = (
    fixed(family="encoder", norm="layernorm", norm_position="post", embedding_norm=True, positions="rope"),
    *replaced(
        ROWS[1:],
        integer("max_position_embeddings", "max_positions", 1536),
        position_embedding_type=None,
    ),
    constant("rotary_value", False),
    Row(
        "embedding_size",
        lambda published, config: read_embedding_size(published, config, config.d_model),
        lambda config: {"embedding_size": config.d_embedding or config.d_model},
    ),
)


def body() -> Tensors:
    """Return BERT's tensors, with queries and keys by pairs and without positions."""
    rotated = {name: own for name, own in LAYER.items() if own.endswith(("q_proj", "k_proj"))}
    others = {name: own for name, own in LAYER.items() if name not in rotated}
    layer, ours = "encoder.layer.{}.", "model.layers.{}."
    return (
        *(stored for stored in BODY if stored.name.startswith("embeddings.") and "position" not in stored.name),
        *module("embeddings_project", "model.embed_projection"),
        *(
            stored
            for name, own in rotated.items()
            for stored in module(layer + name, ours + own, form="pairs", bias_form="pairs")
        ),
        *modules(others, layer, ours),
    )


ROFORMER_BODY = body()
ROFORMER = FamilyFormat(
    architecture="RoFormerForMaskedLM",
    model_type="roformer",
    source="Su et al. 2021, arXiv:2104.09864",
    rows=(*ROFORMER_ROWS, WITH_HEAD),
    tensors=(*prefixed("roformer.", ROFORMER_BODY), *BERT_HEAD),
    ignored=(*IGNORED, TABLE, "cls.predictions.bias"),
    substitutes=BERT.substitutes,
    constants=sinusoids_of_body,
)
ROFORMER_BARE = replace(
    ROFORMER,
    architecture="RoFormerModel",
    rows=replaced(ROFORMER_ROWS, TIED),
    tensors=ROFORMER_BODY,
    ignored=(*IGNORED, TABLE, "cls."),
    spellings=(("roformer.", ""),),
    substitutes=(),
    constants=sinusoids,
)
