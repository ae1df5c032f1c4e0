"""Merge models of one architecture and vocabulary into one, tensor by tensor."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.hub import named
from llmctl.artifacts.with_adapters import identity_of, read_model
from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import refuse_overwrite, write_artifact
from llmctl.model.shapes import complete
from llmctl.tables.merges import MERGES
from llmctl.tokenizer.load import find_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

KEPT = ("objective", "template")
"""What is known of the first model that holds for the result as well."""


def merge_models(
    sources: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] = (),
    method: str = "linear",
    base: Path | None = None,
    density: float = 0.2,
    force: bool = False,
) -> dict[str, Any]:
    """Write a model merged from others, in the dtypes of the first, with its tokenizer; return a record.

    weights: one for each model; equal ones by default. base: what all of them were trained from (ties). density: the share of
    each model's changes that is kept (ties).
    Raises: UsageError for settings that do not fit and models that differ, naming the first difference; UnsupportedModelError
    for quantized models; OutputError; errors of reading.
    """
    weights = check(sources, weights, method, base, density)
    artifacts = [opened(path) for path in sources]
    original = opened(base) if base is not None else None
    for other in artifacts[1:] if original is None else [*artifacts[1:], original]:
        refuse_difference(artifacts[0], other)
    refuse_overwrite(out, out.exists(), force=force)
    if any(out.resolve() == path.resolve() for path in sources):
        raise UsageError(f"`-o {out}` is one of the models", "write the result elsewhere")
    states = [artifact.stored_state() for artifact in artifacts]
    base_state = None if original is None else original.stored_state()
    merged = {
        name: merge_tensor(
            method,
            [state[name] for state in states],
            weights,
            None if base_state is None else base_state[name],
            density,
        )
        for name in states[0]
    }
    record = {
        "method": method,
        "models": [
            {"model": named(str(path)), "sha256": identity_of(one)}
            for path, one in zip(sources, artifacts, strict=True)
        ],
        "weights": list(weights),
        **({"base": named(str(base)), "density": density} if original is not None else {}),
    }
    first = artifacts[0]
    kept = {key: first.provenance[key] for key in KEPT if key in first.provenance}
    provenance = {**kept, "merged": record}
    path = write_artifact(out, first.config, merged, files=first.files, provenance=provenance, force=force)
    return {"path": str(path), **record}


def check(
    sources: Sequence[Path], weights: Sequence[float], method: str, base: Path | None, density: float
) -> Sequence[float]:
    """Return the weights of the models.

    Raises: UsageError for settings that do not fit each other.
    """
    if len(sources) < 2:
        raise UsageError("one model is given, a merge takes at least two", "llmctl merge MODEL OTHER -o OUT")
    row = MERGES[method]
    if row.most and len(sources) > row.most:
        raise UsageError(f"`--method {method}` takes {row.most} models, not {len(sources)}", "--method linear")
    if row.needs_base and base is None:
        raise UsageError(f"`--method {method}` needs the model that these were trained from", "--base MODEL")
    if base is not None and not row.needs_base:
        raise UsageError(f"`--base` is not used by `--method {method}`", "--method ties, or omit --base")
    if not 0 < density <= 1:
        raise UsageError(f"`--density {density:g}` is no share", "a number above 0, at most 1")
    if not weights:
        return [1.0 / len(sources)] * len(sources)
    if len(weights) != len(sources):
        raise UsageError(f"{len(weights)} weights are given for {len(sources)} models", "one weight for each model")
    if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise UsageError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} have no mean",
            "numbers of at least 0, one above it",
        )
    return weights


def opened(path: Path) -> Artifact:
    """Return a model whose weights can be merged; an adapter is merged into its base.

    Raises: UnsupportedModelError for a quantized model.
    """
    artifact = read_model(path)
    if artifact.schemes:
        raise UnsupportedModelError(
            f"`{path}` is quantized: its codes have no mean", "merge the original models, then quantize"
        )
    return artifact


def refuse_difference(first: Artifact, other: Artifact) -> None:
    """Refuse models whose weights do not mean the same.

    Raises: UsageError naming the difference.
    """
    own, theirs = (replace(complete(one.config), architecture="", labels=()) for one in (first, other))
    for name in own.__dataclass_fields__:
        before, after = getattr(own, name), getattr(theirs, name)
        if before != after:
            raise UsageError(
                f"`{first.path}` and `{other.path}` differ in `{name}`: {before} and {after}",
                "models can be merged that were trained from one model",
            )
    tokenizers = [find_tokenizer(one.files) for one in (first, other)]
    if all(tokenizers) and pieces_of(tokenizers[0]) != pieces_of(tokenizers[1]):
        raise UsageError(
            f"`{first.path}` and `{other.path}` have different tokenizers",
            "llmctl tokenize transplant gives a model the tokenizer of another",
        )
    if first.config.labels != other.config.labels:
        raise UsageError(f"`{first.path}` and `{other.path}` have different labels", "train both on the same labels")


def pieces_of(tokenizer: Any) -> list[str]:
    """Return the pieces of a tokenizer, by id."""
    return [tokenizer.piece(index) for index in range(tokenizer.vocab_size)]


def merge_tensor(
    method: str, tensors: "Sequence[Tensor]", weights: Sequence[float], base: "Tensor | None", density: float
) -> "Tensor":
    """Return one merged tensor in the dtype of the first."""
    from llmctl.model import merging

    dtype = tensors[0].dtype
    if not dtype.is_floating_point:
        return tensors[0]
    if method == "ties":
        assert base is not None
        return merging.ties(tensors, weights, base, density).to(dtype)
    merged: Tensor = getattr(merging, method)(tensors, weights)
    return merged.to(dtype)
