"""The list of model families that are read and written; the native one takes what no other expresses.

To add a family: one file with its rows (`rows.py`) and tensors (`parameters.py`), and its name in `PUBLISHED`, where an
earlier family goes before a later one that expresses the same config. A setting of another kind is a function in
`rows.py`, a tensor in another form a row of `FORMS`.
"""

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

PUBLISHED = (LLAMA, QWEN3, EUROBERT, T5, GPT2, BERT, BERT_BARE, BART, MARIAN, MISTRAL, *CLASSIFIERS)
ROWS = (*PUBLISHED, NATIVE)
FAMILIES: dict[str, FamilyFormat] = {row.architecture: row for row in ROWS}


def family_for(config: ModelConfig) -> FamilyFormat:
    """Return the first family that expresses a complete config, or else the native one, which has every field."""
    assert config.head_dim, "pass a complete config, as LanguageModel(config).config is"
    return next((row for row in PUBLISHED if row.expresses(config)), NATIVE)


def family_of(values: Mapping[str, Any], where: str) -> FamilyFormat:
    """Return the family that a config.json names; `where` is the file's location for the error.

    Raises: ArtifactError naming the architecture and what is read.
    """
    named = values.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    model_type = values.get("model_type")
    if not names:  # files saved from a bare config have only the type
        for row in ROWS:
            if row.model_type == model_type:
                return row
    architecture = ", ".join(names) or str(model_type)
    raise ArtifactError(
        f"`{where}` is of the architecture `{architecture[:80]}`, which llmctl does not read",
        f"what is read: {', '.join(FAMILIES)}",
    )
