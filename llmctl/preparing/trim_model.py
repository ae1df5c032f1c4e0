"""Write a model with a trimmed vocabulary, and check that it computes what the whole one did."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.load import is_bare, load_model
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import ModelConfig
from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import refuse_overwrite, write_artifact
from llmctl.formats.generation_settings import end_ids
from llmctl.model.parameters import parameter_shapes
from llmctl.preparing.tokenize import write_tokenizer
from llmctl.preparing.trim import Comparison, Figures, compare, count, of_scripts, trimmed
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import KNOWN_FILES, find_tokenizer, load_tokenizer
from llmctl.tokenizer.trim import Trimmed, trim

if TYPE_CHECKING:
    from torch import Tensor

    from llmctl.model.transformer import LanguageModel

ROLES = ("pad_id", "bos_id", "eos_id", "mask_id", "decoder_start_id")
MOST_TEXTS, MOST_TOKENS = 8, 256
"""Texts, and tokens of each, on which the two models are compared."""


@dataclass(frozen=True)
class Result(Figures):
    """What a trimmed vocabulary changes, the bytes of the weights, and the largest difference of outputs; None: not measured."""

    comparison: Comparison
    bytes_before: int | None = None
    bytes_after: int | None = None
    difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers by name."""
        sizes = {"bytes_before": self.bytes_before, "bytes": self.bytes_after, "largest_difference": self.difference}
        return self.comparison.to_dict() | (sizes if self.bytes_before is not None else {})

    def lines(self) -> list[str]:
        """Return the same as text."""
        found = self.comparison
        kind = "held out" if found.is_held_out else "that were counted: the corpus is too short to hold any out"
        lines = [f"vocabulary       {found.vocab_size_before:,} -> {found.vocab_size:,}"]
        if self.bytes_before is not None and self.bytes_after is not None:
            saved = 100 * (1 - self.bytes_after / self.bytes_before)
            lines.append(f"weights          {self.bytes_before:,} -> {self.bytes_after:,} bytes (-{saved:.1f}%)")
        lines += [
            f"equal texts      {100 * found.equal_texts:.2f}% of {found.n_texts:,} {kind}",
            f"tokens that stay {100 * found.equal_tokens:.3f}%",
            f"bytes per token  {found.bytes_per_token_before:.3f} -> {found.bytes_per_token:.3f}",
        ]
        if self.difference is not None:
            same = "equal bit for bit" if self.difference == 0 else f"largest difference {self.difference:.1e}"
            lines.append(f"outputs          {same}, on texts with equal pieces")
        return lines


def trim_tokenizer(
    source: Path,
    out: Path,
    documents: Iterable[str],
    *,
    scripts: Sequence[str] = (),
    most: int = 0,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Write a tokenizer with the pieces that a corpus uses, and compare both on held-out text.

    Raises: UnsupportedModelError, UsageError, OutputError.
    """
    tokenizer = load_tokenizer(source)
    refuse_source(source, out)
    refuse_overwrite(out, out.exists(), force=force)
    more = list(of_scripts(tokenizer, scripts)) if scripts else []
    say("counting the pieces of the corpus")
    usage = count(tokenizer, documents)
    result = trimmed(tokenizer, tokenizer.files(), usage, more=more, most=most)
    write_tokenizer(out, result.tokenizer)
    for name in set(KNOWN_FILES) - result.tokenizer.files().keys():  # of another tokenizer that was here
        (out / name).unlink(missing_ok=True)
    return Result(compare(tokenizer, result, usage)[0])


def trim_model(
    source: Path,
    out: Path,
    documents: Iterable[str],
    *,
    scripts: Sequence[str] = (),
    most: int = 0,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Write a model with the pieces that a corpus uses, and compare both on held-out text.

    Raises: UnsupportedModelError for quantized models and separate vocabularies; UsageError, OutputError, ArtifactError.
    """
    artifact, tokenizer = read_whole(source, out, force=force)
    more = list(of_scripts(tokenizer, scripts)) if scripts else []
    say("counting the pieces of the corpus")
    usage = count(tokenizer, documents)
    result, new = with_pieces(artifact, tokenizer, [*usage.ranked, *more], most)
    write_trimmed(out, artifact, tokenizer, result, new, force=force)
    comparison, equal = compare(tokenizer, result, usage)
    difference = compared(artifact, source, out, result, equal)
    before, after = (
        sum(entry.end - entry.begin for _, _, entry in one.tensors.values()) for one in (artifact, read_model(out))
    )
    return Result(comparison, before, after, difference)


def with_pieces(
    artifact: Artifact, tokenizer: Tokenizer, ranked: Iterable[int], most: int = 0
) -> tuple[Trimmed, ModelConfig]:
    """Return a model's tokenizer with some of its pieces, and the model's config with it; see `trim`.

    Raises: UnsupportedModelError, UsageError.
    """
    config = artifact.config
    roles = {getattr(config, role) for role in ROLES} | set(end_ids(config, artifact.files))
    always = sorted(index for index in roles if 0 <= index < tokenizer.vocab_size)
    result = trim(tokenizer, artifact.files, list(dict.fromkeys([*always, *ranked])), most)
    new_of = {index: new for new, index in enumerate(result.kept)}
    renumbered: dict[str, Any] = {role: new_of.get(getattr(config, role), -1) for role in ROLES}
    return result, replace(config, vocab_size=len(result.kept), **renumbered)


def write_trimmed(
    out: Path, artifact: Artifact, tokenizer: Tokenizer, result: Trimmed, config: ModelConfig, *, force: bool
) -> None:
    """Write a model with the pieces of a trimmed tokenizer."""
    earlier = artifact.provenance
    provenance = {**earlier, "vocabulary": {"from": artifact.config.vocab_size, "tokenizer": tokenizer.sha256}}
    state = rows(artifact.stored_state(), artifact.config, config, result.kept)
    write_artifact(out, config, state, files=result.files, provenance=provenance, force=force)


def refuse_source(source: Path, out: Path) -> None:
    """Check that a model is not replaced by the result, which is compared with it.

    Raises: UsageError.
    """
    if out.resolve() == source.resolve():
        raise UsageError(f"`-o {out}` is the model itself", "write the result elsewhere: it is compared with the model")


def read_whole(source: Path, out: Path, *, force: bool) -> tuple[Artifact, Tokenizer]:
    """Return a model whose vocabulary is to be changed, and its tokenizer.

    Raises: UnsupportedModelError for quantized models and separate vocabularies; UsageError without a tokenizer; OutputError
    if `out` exists.
    """
    artifact = read_model(source)
    if artifact.schemes:
        raise UnsupportedModelError(
            f"`{source}` is quantized: rows of its tables cannot be changed", "change the original, then quantize"
        )
    if artifact.config.source_vocab_size:
        raise UnsupportedModelError(
            f"`{source}` has a vocabulary for each language, which cannot be changed", "use a model with one vocabulary"
        )
    refuse_source(source, out)
    refuse_overwrite(out, out.exists(), force=force)
    tokenizer = find_tokenizer(artifact.files)
    if tokenizer is None:
        raise UsageError(f"`{source}` has no tokenizer", "a model folder with `tokenizer.json` or `tokenizer.model`")
    return artifact, tokenizer


def rows(
    state: Mapping[str, "Tensor"], config: ModelConfig, new: ModelConfig, kept: Sequence[int]
) -> dict[str, "Tensor"]:
    """Return a state in which tables of the vocabulary have some of their rows."""
    import torch

    before, after, index = parameter_shapes(config), parameter_shapes(new), torch.tensor(kept)
    return {
        name: tensor if name not in before or before[name] == after[name] else tensor[index]
        for name, tensor in state.items()
    }


def compared(
    artifact: Artifact, source: Path, out: Path, result: Trimmed, texts: Sequence[Sequence[int]]
) -> float | None:
    """Return the largest difference of the outputs of two models on ids of texts; None without such a text."""
    import torch

    new_of = {index: new for new, index in enumerate(result.kept)}
    longest = min(MOST_TOKENS, artifact.config.max_positions or MOST_TOKENS)
    chosen = [list(ids)[:longest] for ids in texts if ids][:MOST_TEXTS]
    if not chosen:
        return None
    before, after = (load_model(path, device="cpu", dtype="float32").model for path in (source, out))
    largest, kept, bare = 0.0, torch.tensor(result.kept), is_bare(artifact)
    with torch.no_grad():
        for ids in chosen:
            old, new = (outputs(model, own, bare) for model, own in ((before, ids), (after, [new_of[i] for i in ids])))
            if old.shape != new.shape:
                old = old[..., kept]
            largest = max(largest, float((old - new).abs().max()))
    return largest


def outputs(model: "LanguageModel", ids: Sequence[int], bare: bool) -> "Tensor":
    """Return what a model computes for a text: logits, label scores, or states."""
    import torch

    ids_BT = torch.tensor([ids])
    more: dict[str, Any] = {"decoder_input_ids_BT": ids_BT} if model.config.family == "encoder_decoder" else {}
    if model.config.n_labels:
        label = model.classify if model.config.head == "text" else model.label_tokens
        return label(ids_BT, **more)
    hidden = model.hidden(ids_BT, **more)
    return hidden if bare else model.head(hidden)
