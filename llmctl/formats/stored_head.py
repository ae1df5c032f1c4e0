"""Whether a head that a configuration ties to the embedding is stored apart, with weights of its own."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from llmctl.config import ModelConfig
from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import HEAD
from llmctl.formats.safetensors import TensorEntry

CHUNK_BYTES = 1 << 24

log = logging.getLogger(__name__)


def with_stored_head(
    family: FamilyFormat, config: ModelConfig, tensors: Mapping[str, tuple[Path, str, TensorEntry]], path: Path
) -> ModelConfig:
    """Return the config untied if the file has a head whose weights are not those of the embedding.

    `tie_word_embeddings` is then wrong: with a fine-tuned head, the embedding gives other logits.
    """
    if not config.tie_embeddings or config.n_labels:
        return config
    untied = replace(config, tie_embeddings=False)
    names = {stored.holds: stored.name for stored in family.layout(untied)}
    head, embedding = tensors.get(names.get((HEAD,), "")), tensors.get(names[("model.embed_tokens.weight",)])
    if head is None or embedding is None or head[2].shape != embedding[2].shape or have_same_bytes(head, embedding):
        return config
    log.warning(
        "`%s` has a `%s` of its own, although its configuration ties it to the embedding: the stored one is used",
        path,
        head[1],
    )
    return untied


def have_same_bytes(first: tuple[Path, str, TensorEntry], second: tuple[Path, str, TensorEntry]) -> bool:
    """Tell whether two stored tensors have the same dtype and bytes."""
    if first[2].dtype != second[2].dtype:
        return False
    return all(a == b for a, b in zip(chunks(first), chunks(second), strict=True))


def chunks(tensor: tuple[Path, str, TensorEntry]) -> Iterator[bytes]:
    """Yield the bytes of a stored tensor."""
    path, _, entry = tensor
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")  # offsets count from the end of the header
        file.seek(8 + n_header + entry.begin)
        for begin in range(entry.begin, entry.end, CHUNK_BYTES):
            yield file.read(min(CHUNK_BYTES, entry.end - begin))
