"""Export a model as GGUF: write a temporary file, verify it, and only then rename it."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmctl.artifacts.load import Loaded, fitting_tokenizer, without_weights
from llmctl.artifacts.with_adapters import read_model
from llmctl.converting.gguf_check import Proof, prove
from llmctl.errors import ArtifactError, UsageError
from llmctl.files import atomic_path
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import refuse_overwrite
from llmctl.formats.generation_settings import end_ids
from llmctl.formats.gguf.write import (
    Written,
    check_kind,
    dropped_window,
    find_type,
    gguf_module,
    model_values,
    plan_blocks,
    write_gguf,
)
from llmctl.formats.gguf.write_tokenizer import refuse, tokenizer_values
from llmctl.formats.sentence_encoder import sentence_encoder
from llmctl.inference.chat_template import find_template
from llmctl.tokenizer.base import Tokenizer


def export_gguf(source: Path, out: Path | None, *, kind: str = "f16", force: bool = False) -> dict[str, Any]:
    """Write a decoder as a GGUF file, verify it by reading it back, and return a record of both.

    kind: a type of `gguf.write.TYPES`; out: defaults to NAME-TYPE.gguf in the current directory. Returns path, type,
    bytes, bits per weight, tensors per block type, those that needed another block type, and the results of the
    verification. A file that fails verification is removed.
    Raises: UsageError; ArtifactError for a model or tokenizer that GGUF cannot represent, or a failed verification;
    MissingExtraError; OutputError; errors of reading.
    """
    kind = find_type(kind)
    artifact = read_model(source)
    out = out or Path(f"{name_of(source)}-{kind}.gguf")
    if out.suffix != ".gguf":
        raise UsageError(f"`--to gguf` writes a file X.gguf, but `{out}` is not one", "use `-o X.gguf`")
    check_kind(artifact.config, artifact.architecture, source)
    tokenizer = fitting_tokenizer(artifact)
    if tokenizer is None:
        raise ArtifactError(
            f"`{source}` has no tokenizer, which a GGUF file must contain", "import the model with its tokenizer files"
        )
    gguf_module()
    refuse_overwrite(out, out.exists() or out.is_symlink(), force=force)
    original = Loaded(without_weights(artifact.config), tokenizer, artifact)
    ids = special_ids(artifact, tokenizer)
    pooling = sentence_encoder(artifact.files).pooling or "mean"
    values = model_values(artifact.config, kind, general_of(artifact, source), pooling=pooling)
    values |= tokenizer_values(
        tokenizer.files(),
        artifact.config.vocab_size,
        ids,
        adds_bos=bool(original.frame.before),
        template=find_template(artifact.files),
    )
    values["general.name"] = name_for(str(values["general.name"]), values["tokenizer.ggml.tokens"])
    if artifact.config.family == "encoder" and values["tokenizer.ggml.model"] != "bert":
        raise refuse("of an encoder is not BERT's WordPiece")
    state = artifact.state()
    with atomic_path(out) as temporary:
        plan = plan_blocks(artifact.config, kind)
        written = write_gguf(temporary, artifact.config, state, values, plan, {})
        proof = prove(temporary, out, original, state, written.meant, ids)
    return record_of(out, kind, written, proof) | {"ignored_window": dropped_window(artifact.config)}


def name_of(source: Path) -> str:
    """Return the name of a model: that of its folder, or of its file without suffix."""
    whole = source.resolve()
    return whole.stem if whole.is_file() else whole.name


def special_ids(artifact: Artifact, tokenizer: Tokenizer) -> dict[str, int]:
    """Return role -> token id, by llama.cpp's role names: from the model config, else the tokenizer.

    `eot` is the first other id that ends a text: the end of a turn.
    """
    config = artifact.config
    more = [index for index in end_ids(config, artifact.files) if index != config.eos_id]
    candidates = {
        "bos": (config.bos_id, tokenizer.bos_id),
        "eos": (config.eos_id, tokenizer.eos_id),
        "unknown": (-1, tokenizer.unk_id),
        "padding": (config.pad_id, tokenizer.pad_id),
        "eot": (more[0] if more else -1, None),
    }
    if config.family == "encoder":  # the tokens around its texts are its tokenizer's
        candidates = {"padding": candidates["padding"]}
    ids = {role: first if first >= 0 else second for role, (first, second) in candidates.items()}
    return {role: index for role, index in ids.items() if index is not None}


def general_of(artifact: Artifact, source: Path) -> dict[str, str]:
    """Return the name and license recorded at import; the name defaults to that of the folder or file."""
    imported = artifact.provenance.get("imported")
    origin: Mapping[str, Any] = imported if isinstance(imported, Mapping) else {}
    general = {key: origin.get(f"general.{key}") for key in ("name", "license")}
    kept = {key: value for key, value in general.items() if isinstance(value, str) and value}
    return {"name": name_of(source)} | kept


PHI3, PHI3_TOKENS = re.compile("phi-?3", re.IGNORECASE), {"<unk>", "<s>", "</s>", "<|endoftext|>"}
"""A name by which llama.cpp recognizes Phi-3's tokenizer, and the tokens whose spaces it then treats otherwise."""


def name_for(name: str, tokens: Collection[str]) -> str:
    """Return a model's name; not one of Phi-3 for another tokenizer, which llama.cpp could then not load.

    Source: llama.cpp, src/llama-vocab.cpp, "set attributes by model/tokenizer/architecture name".
    """
    return name if set(tokens) >= PHI3_TOKENS else PHI3.sub("Phi 3", name)


def record_of(out: Path, kind: str, written: Written, proof: Proof) -> dict[str, Any]:
    """Return the record of an export."""
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
    """Return the row sizes that do not divide into blocks of the wanted type, the type used instead, and tensor counts."""
    counts = Counter(
        (planned.wanted, planned.block, written.meant[name].shape[-1])
        for name, planned in written.blocks.items()
        if planned.block != planned.wanted
    )
    return [
        {"wanted": wanted, "block": block, "row": row, "tensors": n}
        for (wanted, block, row), n in sorted(counts.items())
    ]
