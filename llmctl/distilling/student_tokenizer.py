"""A new student with another tokenizer than its teacher's: the teacher's shape and weights with that vocabulary.

torch is imported inside functions: settings are checked without it.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.artifacts.load import Loaded, without_weights
from llmctl.config import DistillConfig, ModelConfig
from llmctl.errors import UsageError
from llmctl.formats.artifact import Artifact
from llmctl.preparing.transplant_model import mean_parts, new_config, other_files, shared_pieces, with_rows
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from llmctl.model.transformer import LanguageModel


def own_tokenizer(config: DistillConfig) -> Tokenizer | None:
    """Return the tokenizer of `student.tokenizer`; None if the student has the teacher's.

    Raises: NotFoundError or ArtifactError for a missing or damaged one; UsageError for one of two vocabularies.
    """
    if not config.student.tokenizer:
        return None
    tokenizer = load_tokenizer(Path(config.student.tokenizer))
    if tokenizer.has_target_vocabulary:
        raise UsageError(
            f"`student.tokenizer` {config.student.tokenizer} has a vocabulary for each language",
            "use a tokenizer with one vocabulary",
        )
    return tokenizer


def config_with(artifact: Artifact, tokenizer: Tokenizer) -> ModelConfig:
    """Return the shape of a model with another tokenizer."""
    return new_config(artifact.config, tokenizer, None)


def with_tokenizer(artifact: Artifact, tokenizer: Tokenizer) -> Loaded:
    """Return a model without weights as it is with another tokenizer, to encode data for a student made of it."""
    config = config_with(artifact, tokenizer)
    files = other_files(artifact.files, tokenizer, {})
    return Loaded(without_weights(config), tokenizer, replace(artifact, config=config, files=files))


def transplanted(model: "LanguageModel", before: Tokenizer, after: Tokenizer, config: ModelConfig) -> "LanguageModel":
    """Return a model with another vocabulary: the rows of the same pieces, and means of rows for the others."""
    import torch

    from llmctl.model.transformer import LanguageModel, load_tensors

    shared = shared_pieces(before, after)
    rest = [index for index in range(config.vocab_size) if index not in shared]
    parts = {index: ([earlier], [1.0]) for index, earlier in shared.items()} | dict(mean_parts(before, after, rest))
    result = LanguageModel(config)
    with torch.no_grad():
        load_tensors(result, with_rows(model.state_dict(), model.config, config, parts))
    return result
