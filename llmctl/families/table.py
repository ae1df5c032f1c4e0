"""The list of model families that are read and written; the native one takes what no other expresses.

To add a family: one file with its rows (`rows.py`) and tensors (`parameters.py`), and its name in `PUBLISHED`, where an
earlier family goes before a later one that expresses the same config. A setting of another kind is a function in
`rows.py`, a tensor in another form a row of `FORMS`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.errors import UnsupportedModelError
from llmctl.families.bart import BART, M2M, MARIAN, MBART, PEGASUS, XGLM
from llmctl.families.bert import BERT, BERT_BARE
from llmctl.families.classifiers import CLASSIFIERS
from llmctl.families.cohere import COHERE2, GLM4, NEMOTRON, STABLELM, STARCODER2
from llmctl.families.deberta import DEBERTA, DEBERTA_BARE
from llmctl.families.family import FamilyFormat
from llmctl.families.gemma import GEMMA, GEMMA2, GEMMA3
from llmctl.families.gpt import BIGCODE, BLOOM, FALCON, GPT_J, GPT_NEO, GPT_NEOX, MPT, OPT
from llmctl.families.gpt2 import GPT2
from llmctl.families.llama import (
    ARCEE,
    ERNIE45,
    EUROBERT,
    GRANITE,
    GRANITE4,
    GRANITE_MOE,
    HELIUM,
    HUNYUAN,
    LLAMA,
    MINISTRAL,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SEED_OSS,
    SMOLLM3,
)
from llmctl.families.modernbert import GTE, JINA3, MODERNBERT, MODERNBERT_BARE, MODERNBERT_DECODER, NOMIC
from llmctl.families.native import NATIVE
from llmctl.families.olmo import EXAONE4, OLMO, OLMO2, OLMO3, OLMOE
from llmctl.families.phi import PHI, PHI3
from llmctl.families.roberta import ENCODERS
from llmctl.families.roformer import ROFORMER, ROFORMER_BARE
from llmctl.families.t5 import MT5, T5, T5_ENCODER, UMT5
from llmctl.families.token_heads import TOKEN_HEADS
from llmctl.model.shapes import complete

PUBLISHED = (
    *(LLAMA, QWEN3, EUROBERT, T5, GPT2, BERT, BERT_BARE, BART, MARIAN, MISTRAL),
    *(QWEN2, GEMMA, GEMMA2, GEMMA3, PHI, PHI3, OLMO, OLMO2, OLMO3, GRANITE, SMOLLM3, STARCODER2, STABLELM),
    *(GPT_NEOX, GPT_NEO, GPT_J, OPT, BLOOM, MPT, FALCON, BIGCODE, MINISTRAL, SEED_OSS, ARCEE, NEMOTRON),
    *(COHERE2, GLM4, EXAONE4, HELIUM, ERNIE45, HUNYUAN, QWEN3_MOE, OLMOE, GRANITE_MOE),
    *ENCODERS,
    *(DEBERTA, DEBERTA_BARE, ROFORMER, ROFORMER_BARE),
    *(
        MODERNBERT,
        MODERNBERT_BARE,
        MODERNBERT_DECODER,
        NOMIC,
        GTE,
        JINA3,
        MT5,
        UMT5,
        T5_ENCODER,
        MBART,
        PEGASUS,
        M2M,
        XGLM,
        GRANITE4,
    ),
    *CLASSIFIERS,
    *TOKEN_HEADS,
)
ROWS = (*PUBLISHED, NATIVE)
FAMILIES: dict[str, FamilyFormat] = {row.architecture: row for row in ROWS}
READ = (
    # The bare model of a family, as embedding models are published.
    {row.architecture.replace("ForCausalLM", "Model"): row for row in ROWS if row.prefix}
    | {alias: row for row in ROWS for alias in row.aliases}
    | FAMILIES
)
"""Every architecture that is read."""


def family_for(config: ModelConfig) -> FamilyFormat:
    """Return the first family that expresses a complete config, or else the native one, which has every field."""
    assert config.head_dim, "pass a complete config, as LanguageModel(config).config is"
    preferred = FAMILIES.get(config.architecture)
    if preferred is not None and preferred.expresses(config):
        return preferred
    return next((row for row in PUBLISHED if row.is_written and row.expresses(config)), NATIVE)


def with_architecture(config: ModelConfig, family: FamilyFormat) -> ModelConfig:
    """Return the config of a model that was read, which names its family if it would be written as another."""
    own = complete(config)
    if family_for(own) is family or not family.expresses(own):
        return config
    return replace(config, architecture=family.architecture)


def family_of(values: Mapping[str, Any], where: str) -> FamilyFormat:
    """Return the family that a config.json names; `where` is the file's location for the error.

    Raises: UnsupportedModelError naming the architecture.
    """
    named = values.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for name in names:
        row = FAMILIES.get(name) or READ.get(name)
        if row is not None:
            return row
    model_type = values.get("model_type")
    if not names:  # files saved from a bare config have only the type
        for row in ROWS:
            if row.model_type == model_type:
                return row
    architecture = ", ".join(names) or str(model_type)
    raise UnsupportedModelError(
        f"`{where}` is of the architecture `{architecture[:80]}`, which llmctl does not read",
        "`llmctl distill` (as a teacher) and `llmctl evaluate` run other language models through transformers, if it is "
        "installed: pip install transformers",
    )
