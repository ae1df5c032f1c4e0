"""Write a model with the tokenizer of another: its rows of shared pieces, and combinations of them for the others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.with_adapters import read_model
from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.generation_settings import GENERATION
from llmctl.formats.quantization import EMBEDDING
from llmctl.model.parameters import parameter_shapes
from llmctl.preparing.extend_model import bytes_per_token
from llmctl.preparing.trim import Figures, passages
from llmctl.preparing.trim_model import ROLES, read_whole, refuse_source
from llmctl.runs.progress import paced
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import KNOWN_FILES, find_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("auto", "omp", "mean")
N_ATOMS = 64
"""The most shared pieces of which the row of another one is made."""

MOST_TEXTS = 500
"""Passages on which the tokenizers are compared."""

Parts = Mapping[int, tuple[Sequence[int], Sequence[float]]]
"""New id -> earlier ids, and with what factors their rows are added."""


@dataclass(frozen=True)
class Result(Figures):
    """The vocabulary's size, the pieces that both tokenizers have, how the others are made, and UTF-8 bytes per token."""

    vocab_size_before: int
    vocab_size: int
    shared: int
    method: str
    bytes_per_token_before: float
    bytes_per_token: float

    def lines(self) -> list[str]:
        """Return the same as text."""
        return [
            f"vocabulary       {self.vocab_size_before:,} -> {self.vocab_size:,}",
            f"shared pieces    {self.shared:,} ({100 * self.shared / max(self.vocab_size, 1):.1f}%), others: {self.method}",
            f"bytes per token  {self.bytes_per_token_before:.3f} -> {self.bytes_per_token:.3f}",
        ]


def transplant_model(
    source: Path,
    donor: Path,
    out: Path,
    documents: Iterable[str],
    *,
    method: str = "auto",
    n_atoms: int = N_ATOMS,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Write a model with the tokenizer of a donor, another model or only a tokenizer; documents: to compare them on.

    method: `omp` makes the row of a piece that only the donor has of the rows of shared pieces, with the factors that make
    its row in the donor (orthogonal matching pursuit); `mean` is the mean of the pieces that the text of the new one had
    before; `auto` is `omp` if the donor has weights.
    Source: Goddard and Fernandes Neto 2025, arXiv:2506.06607, section 3.
    Raises: UnsupportedModelError for quantized models; UsageError, OutputError, ArtifactError.
    """
    artifact, tokenizer = read_whole(source, out, force=force)
    refuse_source(donor, out)
    other = model_at(donor)
    new_tokenizer = find_tokenizer(other.files) if other is not None else load_tokenizer(donor)
    if new_tokenizer is None:
        raise UsageError(f"`{donor}` has no tokenizer", "a model folder with `tokenizer.json` or `tokenizer.model`")
    if new_tokenizer.has_target_vocabulary or tokenizer.has_target_vocabulary:
        named = donor if new_tokenizer.has_target_vocabulary else source
        raise UsageError(f"`{named}` has a vocabulary for each language", "use models with one vocabulary")
    if method == "omp" and other is None:
        raise UsageError(f"`--method omp` needs the weights of `{donor}`", "a model folder, or --method mean")
    texts = [text for text, _ in zip(passages(documents), range(MOST_TEXTS), strict=False)]
    method = method if method != "auto" else "mean" if other is None else "omp"
    config = artifact.config
    new = new_config(config, new_tokenizer, None if other is None else other.config)
    shared = shared_pieces(tokenizer, new_tokenizer)
    rest = [index for index in range(new.vocab_size) if index not in shared]
    state = artifact.stored_state()
    if method == "omp" and other is not None and shared and rest:
        say(f"combining the rows of {len(rest):,} pieces from {len(shared):,} shared ones")
        found = combined_parts(other, shared, rest, n_atoms, say)
    else:
        found = mean_parts(tokenizer, new_tokenizer, rest)
    parts = {index: ([earlier], [1.0]) for index, earlier in shared.items()} | dict(found)
    files = other_files(artifact.files, new_tokenizer, {} if other is None else other.files)
    provenance = {
        **artifact.provenance,
        "vocabulary": {"from": config.vocab_size, "tokenizer": tokenizer.sha256, "transplanted": method},
    }
    write_artifact(out, new, with_rows(state, config, new, parts), files=files, provenance=provenance, force=force)
    return Result(
        config.vocab_size,
        new.vocab_size,
        len(shared),
        method,
        bytes_per_token(tokenizer, texts),
        bytes_per_token(new_tokenizer, texts),
    )


def model_at(path: Path) -> Artifact | None:
    """Return the model at a path, None if it is only a tokenizer."""
    if path.suffix in (".safetensors", ".gguf") or (path / "config.json").is_file():
        return read_model(path)
    return None


def new_config(config: ModelConfig, tokenizer: Tokenizer, donor: ModelConfig | None) -> ModelConfig:
    """Return the config with the ids of another tokenizer; those of a donor's config, where it has some."""
    roles = {
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "mask_id": tokenizer.mask_id,
    }
    ids: dict[str, Any] = {}
    for role in ROLES:
        own = getattr(donor, role) if donor is not None else -1
        known = roles.get(role)
        ids[role] = own if own >= 0 else -1 if known is None else known
    if config.family == "encoder_decoder" and ids["decoder_start_id"] < 0:
        ids["decoder_start_id"] = next((ids[role] for role in ("bos_id", "pad_id", "eos_id") if ids[role] >= 0), 0)
    size = max(tokenizer.vocab_size, donor.vocab_size if donor is not None else 0)
    return replace(config, vocab_size=size, **ids)


def shared_pieces(before: Tokenizer, after: Tokenizer) -> dict[int, int]:
    """Return new id -> earlier id of the pieces that both have: with the same bytes, or special tokens of the same role."""
    known: dict[bytes, int] = {}
    for index in range(before.vocab_size):
        if data := before.piece_bytes(index):
            known.setdefault(data, index)
    shared = {}
    for index in range(after.vocab_size):
        data = after.piece_bytes(index)
        earlier = known.get(data) if data else before.special_id(after.piece(index))
        if earlier is not None:
            shared[index] = earlier
    for role in ("pad_id", "unk_id", "bos_id", "eos_id", "mask_id"):
        earlier, index = getattr(before, role), getattr(after, role)
        if earlier is not None and index is not None:
            shared.setdefault(index, earlier)
    return shared


def combined_parts(
    donor: Artifact, shared: Mapping[int, int], rest: Sequence[int], n_atoms: int, say: Callable[[str], None]
) -> Parts:
    """Return of which earlier rows the others are made, by the rows of the donor."""
    import torch

    from llmctl.model.sparse_combinations import combinations

    table = donor.state(torch.float32)[f"{EMBEDDING}.weight"]
    has_row = [index for index in rest if index < len(table)]
    atoms = [index for index in shared if index < len(table)]
    done = paced(say, "piece", len(has_row))
    chosen, factors = combinations(table[has_row], table[atoms], n_atoms, done=done)
    earlier = torch.tensor([shared[index] for index in atoms])[chosen]
    found = zip(has_row, earlier.tolist(), factors.tolist(), strict=True)
    return {index: (own, weights) for index, own, weights in found}


def mean_parts(before: Tokenizer, after: Tokenizer, rest: Sequence[int]) -> Parts:
    """Return of which earlier rows the others are the mean: those of the same text."""
    texts = {index: after.piece_bytes(index).decode("utf-8", "replace") for index in rest if index < after.vocab_size}
    rows = before.encode_batch(list(texts.values()))
    return {index: (ids, [1 / len(ids)] * len(ids)) for index, ids in zip(texts, rows, strict=True) if ids}


def other_files(files: Mapping[str, bytes], tokenizer: Tokenizer, donor: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a model's files with those of another tokenizer; ids in its settings for generation would mean others."""
    replaced = {*KNOWN_FILES, GENERATION}
    kept = {name: data for name, data in files.items() if name not in replaced}
    return kept | {name: data for name, data in donor.items() if name in replaced} | tokenizer.files()


def with_rows(
    state: Mapping[str, "Tensor"], config: ModelConfig, new: ModelConfig, parts: Parts
) -> dict[str, "Tensor"]:
    """Return a state in which tables of the vocabulary have other rows; one that is made of none is the mean of all."""
    import torch

    before, after = parameter_shapes(config), parameter_shapes(new)
    larger = parameter_shapes(replace(config, vocab_size=config.vocab_size + 1))
    found = dict(state)
    for name, tensor in state.items():
        if before.get(name) == larger.get(name):  # not a table of the vocabulary
            continue
        wide = tensor.float()
        mean = wide.mean(dim=0)
        rows = torch.empty(after[name], dtype=torch.float32)
        for index in range(new.vocab_size):
            ids, factors = parts.get(index, ((), ()))
            if len(ids) == 1 and factors[0] == 1.0:
                rows[index] = wide[ids[0]]
            elif ids:
                rows[index] = torch.tensor(factors) @ wide[list(ids)]
            else:
                rows[index] = mean
        found[name] = rows.to(tensor.dtype)
    return found
