"""Export a model as a GGUF file: write it under a temporary name, prove it, and only then give it its name."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.artifacts.load import Loaded, fitting_tokenizer, without_weights
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import ModelConfig
from llmctl.converting.gguf_check import Proof, prove
from llmctl.errors import ArtifactError, UsageError
from llmctl.files import atomic_path
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import refuse_overwrite
from llmctl.formats.gguf.write import Written, check_kind, find_type, gguf_module, model_values, write_gguf
from llmctl.formats.gguf.write_tokenizer import tokenizer_values
from llmctl.inference.chat_template import find_template
from llmctl.tokenizer.base import Tokenizer


def export_gguf(source: Path, out: Path | None, *, kind: str = "f16", force: bool = False) -> dict[str, Any]:
    """Write a decoder as a GGUF file, prove that what is read back is what was meant, and return the figures.

    kind: a type of `gguf_write.TYPES`; `out`: NAME-TYPE.gguf here if not given. Returns path, type, bytes, bits per
    weight, tensors per block, those that got another block, and the proof's figures. Nothing is left of a file that fails.
    Raises: UsageError; ArtifactError for a model or tokenizer that llama.cpp does not express, or a failed proof;
    MissingExtraError; OutputError; those of reading.
    """
    kind = find_type(kind)
    artifact = read_model(source)
    out = out or Path(f"{name_of(source)}-{kind}.gguf")
    if out.suffix != ".gguf":
        raise UsageError(f"`--to gguf` writes a file X.gguf, `{out}` is not one", "name a file X.gguf with -o")
    check_kind(artifact.config, artifact.architecture, source)
    tokenizer = fitting_tokenizer(artifact)
    if tokenizer is None:
        raise ArtifactError(f"`{source}` has no tokenizer, which a GGUF file has to carry", "import the model with it")
    gguf_module()
    refuse_overwrite(out, out.exists() or out.is_symlink(), force=force)
    original = Loaded(without_weights(artifact.config), tokenizer, artifact)
    ids = special_ids(artifact.config, tokenizer)
    values = model_values(artifact.config, kind, general_of(artifact, source))
    values |= tokenizer_values(
        tokenizer.files(),
        artifact.config.vocab_size,
        ids,
        adds_bos=original.begins_with_bos and tokenizer.bos_id is not None,
        template=find_template(artifact.files),
    )
    state = artifact.state()
    with atomic_path(out) as temporary:
        written = write_gguf(temporary, artifact.config, state, values, kind)
        proof = prove(temporary, out, original, state, written.meant, ids)
    return record_of(out, kind, written, proof)


def name_of(source: Path) -> str:
    """Return the name of a model: its folder's, or its file's."""
    whole = source.resolve()
    return whole.stem if whole.is_file() else whole.name


def special_ids(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """Return llama.cpp's name of a role -> its token: what the model's config says, else the tokenizer."""
    found = {
        "bos": (config.bos_id, tokenizer.bos_id),
        "eos": (config.eos_id, tokenizer.eos_id),
        "unknown": (-1, tokenizer.unk_id),
        "padding": (config.pad_id, tokenizer.pad_id),
    }
    ids = {role: first if first >= 0 else second for role, (first, second) in found.items()}
    return {role: index for role, index in ids.items() if index is not None}


def general_of(artifact: Artifact, source: Path) -> dict[str, str]:
    """Return name and license as they came in with the model; the name is else its folder's or file's."""
    imported = artifact.provenance.get("imported")
    told: Mapping[str, Any] = imported if isinstance(imported, Mapping) else {}
    found = {key: told.get(f"general.{key}") for key in ("name", "license")}
    kept = {key: value for key, value in found.items() if isinstance(value, str) and value}
    return {"name": name_of(source)} | kept


def record_of(out: Path, kind: str, written: Written, proof: Proof) -> dict[str, Any]:
    """Return what there is to say of an export."""
    blocks = [planned.block for planned in written.blocks.values()]
    n_weights = sum(tensor.numel() for tensor in written.meant.values())
    return {
        "path": str(out),
        "to": "gguf",
        "type": kind,
        "bytes": out.stat().st_size,
        "parameters": n_weights,
        "bits_per_weight": round(written.n_bytes * 8 / n_weights, 3),
        "tensors": {block: blocks.count(block) for block in sorted(set(blocks))},
        "other_blocks": other_blocks(written),
        "proof": proof.record(),
    }


def other_blocks(written: Written) -> list[dict[str, Any]]:
    """Return which rows are no whole blocks of the format they were to have, what holds them, and how many tensors."""
    counts = Counter(
        (planned.wanted, planned.block, written.meant[name].shape[-1])
        for name, planned in written.blocks.items()
        if planned.block != planned.wanted
    )
    return [
        {"wanted": wanted, "block": block, "row": row, "tensors": n}
        for (wanted, block, row), n in sorted(counts.items())
    ]
