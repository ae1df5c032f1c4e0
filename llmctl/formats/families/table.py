"""The table of model families that are read and written; the last row takes what no other expresses."""

from collections.abc import Mapping
from typing import Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.formats.families.bart import BART, MARIAN
from llmctl.formats.families.bert import BERT, BERT_BARE
from llmctl.formats.families.classifiers import CLASSIFIERS
from llmctl.formats.families.family import FamilyFormat
from llmctl.formats.families.gpt2 import GPT2
from llmctl.formats.families.llama import EUROBERT, LLAMA, MISTRAL, QWEN3
from llmctl.formats.families.native import NATIVE
from llmctl.formats.families.t5 import T5

ROWS = (LLAMA, QWEN3, EUROBERT, T5, GPT2, BERT, BERT_BARE, BART, MARIAN, MISTRAL, *CLASSIFIERS, NATIVE)
FAMILIES: dict[str, FamilyFormat] = {row.architecture: row for row in ROWS}


def family_for(config: ModelConfig) -> FamilyFormat:
    """Return the first family that expresses a complete config; the native one takes the rest."""
    assert config.head_dim, "give the complete config that a LanguageModel carries"
    return next(row for row in ROWS if row.matches(config))


def family_of(values: Mapping[str, Any], where: str) -> FamilyFormat:
    """Return the family that a config.json names; `where` says which file, for the error.

    Raises: ArtifactError naming the architecture and what is read.
    """
    named = values.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    model_type = values.get("model_type")
    if not names:
        for row in ROWS:
            if row.model_type == model_type:
                return row
    found = ", ".join(names) or str(model_type)
    raise ArtifactError(
        f"`{where}` is of the architecture `{found[:80]}`, which llmctl does not read",
        f"what is read: {', '.join(FAMILIES)}",
    )
