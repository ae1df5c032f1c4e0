"""Export a model as GGUF: write a temporary file, verify it, and only then rename it."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llmctl.artifacts.load import Loaded, fitting_tokenizer, without_weights
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import ModelConfig
from llmctl.converting.gguf_check import Proof, prove
from llmctl.errors import ArtifactError, UsageError
from llmctl.files import atomic_path
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import refuse_overwrite
from llmctl.formats.generation_settings import end_ids
from llmctl.formats.gguf.architectures import architecture_for
from llmctl.formats.gguf.model import tensor_names
from llmctl.formats.gguf.write import (
    ALIGNMENT,
    ENTRY_BYTES,
    Planned,
    Written,
    check_kind,
    dropped_window,
    file_bytes,
    file_type,
    find_type,
    gguf_module,
    metadata_bytes,
    model_values,
    plan_blocks,
    write_gguf,
)
from llmctl.formats.gguf.write_tokenizer import refuse, tokenizer_values
from llmctl.formats.sentence_encoder import sentence_encoder
from llmctl.inference.chat_template import find_template
from llmctl.model.parameters import parameter_shapes
from llmctl.quant.grid import Codes
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
    ready = prepare(artifact, source)
    refuse_overwrite(out, out.exists() or out.is_symlink(), force=force)
    return write_verified(ready, out, plan_blocks(artifact.config, kind), artifact.state(), kind=kind)


class Ready(NamedTuple):
    """A model whose GGUF file can be written: role -> token id, and the metadata of model and tokenizer."""

    artifact: Artifact
    tokenizer: Tokenizer
    ids: dict[str, int]
    values: dict[str, Any]


def prepare(artifact: Artifact, source: Path) -> Ready:
    """Return the metadata of a model's GGUF file; `source` is its path.

    Raises: ArtifactError for a model or tokenizer that GGUF cannot represent; MissingExtraError.
    """
    check_kind(artifact.config, artifact.architecture, source)
    tokenizer = fitting_tokenizer(artifact)
    if tokenizer is None:
        raise ArtifactError(
            f"`{source}` has no tokenizer, which a GGUF file must contain", "import the model with its tokenizer files"
        )
    gguf_module()
    loaded = Loaded(without_weights(artifact.config), tokenizer, artifact)
    ids = special_ids(artifact, tokenizer)
    pooling = sentence_encoder(artifact.files).pooling or "mean"
    values = model_values(artifact.config, general_of(artifact, source), pooling=pooling)
    values |= tokenizer_values(
        tokenizer.files(),
        artifact.config.vocab_size,
        ids,
        adds_bos=bool(loaded.frame.before),
        template=find_template(artifact.files),
    )
    values["general.name"] = name_for(str(values["general.name"]), values["tokenizer.ggml.tokens"])
    if artifact.config.family == "encoder" and values["tokenizer.ggml.model"] != "bert":
        raise refuse("of an encoder is not BERT's WordPiece")
    return Ready(artifact, tokenizer, ids, values)


def write_verified(
    ready: Ready,
    out: Path,
    plan: Mapping[str, Planned],
    state: Mapping[str, Tensor],
    codes: Mapping[str, Codes] | None = None,
    *,
    kind: str,
    shown: Path | None = None,
) -> dict[str, Any]:
    """Write the file, read it back, and return a record of both.

    state: the weights of the original; codes: those chosen for its modules, the others get the nearest; shown: the file's
    later name, for errors.
    Raises: ArtifactError for a failed verification, which removes the file; OutputError.
    """
    artifact = ready.artifact
    original = Loaded(without_weights(artifact.config), ready.tokenizer, artifact)
    values = values_of(ready, plan)
    with atomic_path(out) as temporary:
        written = write_gguf(temporary, artifact.config, state, values, plan, codes or {})
        proof = prove(temporary, shown or out, original, state, written.meant, ready.ids)
    return record_of(out, kind, written, proof) | {"ignored_window": dropped_window(artifact.config)}


def values_of(ready: Ready, plan: Mapping[str, Planned]) -> dict[str, Any]:
    """Return the metadata of a file."""
    return {**ready.values, "general.file_type": file_type(ready.artifact.config, plan)}


def planned_bytes(ready: Ready, kind: str) -> int:
    """Return the size of the file of a type."""
    config = ready.artifact.config
    plan = plan_blocks(config, kind)
    return file_bytes(config, values_of(ready, plan), plan)


def other_bytes(ready: Ready, modules: Collection[str]) -> int:
    """Return the bytes that a file has at most besides the weights of some modules; matrices that are not theirs have 16 bits."""
    config = ready.artifact.config
    return metadata_bytes(ready.values, architecture_for(config).name) + rest_bytes(config, modules)


def rest_bytes(config: ModelConfig, modules: Collection[str]) -> int:
    """Return the bytes of the tensors of `other_bytes`, with the entries of all."""
    shapes, total = parameter_shapes(config), 0
    for there, (block, _) in plan_blocks(config, "f16").items():
        names = tensor_names(config, architecture_for(config))[there]
        total += len(there) + ENTRY_BYTES + ALIGNMENT
        if names[0].removesuffix(".weight") not in modules:
            total += sum(math.prod(shapes[name]) for name in names) * (2 if block == "F16" else 4)
    return total


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


def report(record: dict[str, Any]) -> list[str]:
    """Return the lines that report what was written and verified."""
    proof = record["proof"]
    n_tokens, vectors = proof["llama_cpp_tokens"], proof["llama_cpp_cosine"]
    compared = "not installed"
    if n_tokens is not None:
        compared = f"{n_tokens} of {proof['llama_cpp_of']} greedy tokens, KL {proof['llama_cpp_kl']:.4g}"
    if vectors is not None:
        same = f"the ids of {proof['llama_cpp_texts']} texts"
        compared = f"vectors with a cosine of at least {vectors:.4f}, {same}"
    equal = f"{proof['tensors_equal']} tensors and the token ids of {proof['texts_equal']} texts are as expected"
    kept = f"vectors with a cosine of at least {proof['cosine']:.4f}" if proof["cosine"] is not None else ""
    if proof["kl"] is not None:
        kept = f"KL {proof['kl']:.4g} nats/token, {proof['top1']:.1%} top-1 agreement ({proof['tokens']} tokens)"
    made = f"{record['type']}, {record['bits_per_weight']:.2f} bits per weight, {record['bytes'] / 1e6:.1f} MB"
    others = [
        f"note: {other['tensors']} tensors are {other['block']}: rows of {other['row']} do not divide into blocks of "
        f"{other['wanted']}"
        for other in record["other_blocks"]
    ]
    if window := record["ignored_window"]:
        others.append(f"note: llama.cpp ignores the attention window of {window:,} tokens: longer texts differ there")
    program = "llama-cli" if proof["cosine"] is None else "llama-embedding"
    return [
        *others,
        f"read back: {equal}, logits within {proof['logits_max_difference']:.1g}; llama_cpp: {compared}",
        f"compared with the original: {kept}",
        f"{record['path']}: {made}; next: {program} -m {shlex.quote(record['path'])}",
    ]
