"""Write a model whose vocabulary has more pieces, with embeddings made of those that they replace."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.config import ModelConfig
from llmctl.data.builtin import builtin_documents
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.parameters import parameter_shapes
from llmctl.preparing.trim import HELD_OUT_EVERY, Figures, passages
from llmctl.preparing.trim_model import read_whole
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.extend import extend

if TYPE_CHECKING:
    from torch import Tensor

OTHER_TEXTS = 500
"""Passages of the built-in corpus, English, on which the tokenizers are compared as well."""

MOST_CHARACTERS = 20_000_000
"""The text that pieces are learned from: of more, memory grows, and the frequent pairs are the same."""


@dataclass(frozen=True)
class Result(Figures):
    """The vocabulary's size, UTF-8 bytes per token of held-out text, and the share of the built-in corpus with equal ids."""

    vocab_size_before: int
    vocab_size: int
    bytes_per_token_before: float
    bytes_per_token: float
    equal_other_texts: float

    def lines(self) -> list[str]:
        """Return the same as text."""
        return [
            f"vocabulary       {self.vocab_size_before:,} -> {self.vocab_size:,}",
            f"bytes per token  {self.bytes_per_token_before:.3f} -> {self.bytes_per_token:.3f}",
            f"other text       {100 * self.equal_other_texts:.2f}% of {OTHER_TEXTS} English passages have the same tokens",
        ]


def extend_model(
    source: Path,
    out: Path,
    documents: Iterable[str],
    n_pieces: int,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Write a model with pieces learned on a corpus, of which one passage in 20 is held out to measure them.

    Raises: UnsupportedModelError for quantized models and other tokenizers than byte-level BPE; UsageError, OutputError,
    ArtifactError.
    """
    artifact, tokenizer = read_whole(source, out, force=force)
    learned, held_out = list[str](), list[str]()
    n_characters = 0
    for number, text in enumerate(passages(documents), start=1):
        (held_out if number % HELD_OUT_EVERY == 0 else learned).append(text)
        n_characters += len(text)
        if n_characters >= MOST_CHARACTERS:
            say(f"the first {n_characters:,} characters of the corpus are used")
            break
    say("learning pieces")
    result = extend(tokenizer, artifact.files, learned, n_pieces)
    config = artifact.config
    new = replace(config, vocab_size=result.tokenizer.vocab_size)
    state = with_rows(artifact.stored_state(), config, new, result.parts)
    provenance = {**artifact.provenance, "vocabulary": {"from": config.vocab_size, "tokenizer": tokenizer.sha256}}
    write_artifact(out, new, state, files=result.files, provenance=provenance, force=force)
    others = [text for text, _ in zip(passages(builtin_documents()), range(OTHER_TEXTS), strict=False)]
    pairs = zip(tokenizer.encode_batch(others), result.tokenizer.encode_batch(others), strict=True)
    texts = held_out or learned
    return Result(
        tokenizer.vocab_size,
        new.vocab_size,
        bytes_per_token(tokenizer, texts),
        bytes_per_token(result.tokenizer, texts),
        sum(before == after for before, after in pairs) / max(len(others), 1),
    )


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the UTF-8 bytes per token of some texts."""
    n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(len(text.encode(errors="replace")) for text in texts) / max(n_tokens, 1)


def with_rows(
    state: Mapping[str, "Tensor"], config: ModelConfig, new: ModelConfig, parts: Mapping[int, Sequence[int]]
) -> dict[str, "Tensor"]:
    """Return a state in which tables of the vocabulary have rows for new pieces: the mean of those that they replace."""
    import torch

    before, after, first = parameter_shapes(config), parameter_shapes(new), min(parts)
    found = dict(state)
    for name, tensor in state.items():
        if name in before and before[name] != after[name]:
            means = [tensor[list(parts[index])].float().mean(dim=0) for index in range(first, new.vocab_size)]
            found[name] = torch.cat([tensor[:first], torch.stack(means).to(tensor.dtype)])
    return found
