"""Describe a model file from its header alone, without reading tensors or importing torch.

Supports safetensors files and folders, adapters, and GGUF. A valid file of an unsupported architecture is described as
far as possible; a damaged one is refused.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.files import parse_json
from llmctl.formats.adapter import ADAPTER_WEIGHTS, is_adapter, read_adapter
from llmctl.formats.artifact import CONFIG, check_kind, count_parameters, parse_object, read_artifact, read_headers
from llmctl.formats.safetensors import Header
from llmctl.tokenizer.header_files import COMPRESSED, PLAIN
from llmctl.tokenizer.published_sentencepiece import class_name, is_published
from llmctl.tokenizer.sentencepiece import MODEL_FILE


def describe(path: Path) -> dict[str, Any]:
    """Return architecture, sizes, tokenizer, provenance, metadata and tensors of a model file or folder.

    Raises: NotFoundError; ArtifactError if a file is damaged or its tensors do not match its configuration.
    """
    if path.suffix == ".gguf" and path.is_file():
        return describe_gguf(path)
    folder = path.parent if path.name == ADAPTER_WEIGHTS else path
    if is_adapter(folder):
        return describe_adapter(folder)
    check_kind(path)
    headers = read_headers(path)
    record = describe_tensors(path, headers)
    metadata = next(iter(headers.values())).metadata if len(headers) == 1 else {}
    folder = path if path.is_dir() else path.parent
    if "llmctl.config" not in metadata and not (folder / CONFIG).is_file():
        return record | {"architecture": None, "metadata": plain_metadata(metadata)}
    try:
        artifact = read_artifact(path)
    except ArtifactError as error:
        named = named_architecture(metadata, folder)
        if "does not read" not in str(error):  # the wording of errors for unsupported, undamaged models
            raise
        return record | {"architecture": named, "unread": str(error), "metadata": plain_metadata(metadata)}
    return record | {
        "architecture": artifact.architecture,
        "family": artifact.config.family,
        "context": artifact.config.max_positions,
        "vocabulary": artifact.config.vocab_size,
        **head_of(artifact.config),
        "quantized": {name: asdict(scheme) for name, scheme in artifact.schemes.items()},
        "tokenizer": tokenizer_kind(artifact.files),
        "files": sorted(artifact.files),
        "config": artifact.hf,
        "provenance": artifact.provenance,
        "metadata": plain_metadata(metadata),
    }


def head_of(config: ModelConfig) -> dict[str, Any]:
    """Return the kind of a classification head and the names of its outputs; nothing for a model without one."""
    if not config.n_labels:
        return {}
    names = ("start", "end") if config.head == "span" else config.labels
    return {"head": config.head, "labels": list(names) or config.n_labels}


def describe_adapter(path: Path) -> dict[str, Any]:
    """Return the same for an adapter, whose base need not exist."""
    adapter = read_adapter(path)
    values = adapter.values
    ranks = sorted({adapter.entry(parts["a"]).shape[0] for parts in adapter.low_rank.values()})
    record = describe_tensors(path, {path / ADAPTER_WEIGHTS: adapter.header})
    return record | {
        "format": "PEFT adapter",
        "adapter": f"{'DoRA' if adapter.dora else 'LoRA'}, rank {', '.join(map(str, ranks))}",
        "alpha": values["lora_alpha"],
        "targets": ", ".join(sorted({name.rpartition(".")[2] for name in adapter.low_rank})),
        "layers": len(adapter.low_rank),
        "head": ", ".join(adapter.whole) or None,
        "task": values.get("task_type"),
        "base": adapter.base or None,
        "files": sorted(adapter.files),
        "config": values,
        "provenance": adapter.provenance,
        "metadata": plain_metadata(adapter.header.metadata),
    }


def named_architecture(metadata: Mapping[str, str], folder: Path) -> str:
    """Return the architecture named in a configuration, supported or not."""
    text = metadata.get("llmctl.config") or (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    values = parse_object(text, str(folder / CONFIG))
    names = values.get("architectures") or [values.get("model_type")]
    return str(names[0] if isinstance(names, list) else names)[:80]


def describe_tensors(path: Path, headers: Mapping[Path, Header]) -> dict[str, Any]:
    """Return parameter count, size, dtypes and tensors over all weight files."""
    tensors = {name: entry for header in headers.values() for name, entry in header.tensors.items()}
    dtypes: dict[str, int] = {}  # dtype -> number of tensors
    for entry in tensors.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + 1
    return {
        "path": str(path),
        "format": "safetensors",
        "parameters": sum(map(count_parameters, headers.values())),
        "bytes": sum(file.stat().st_size for file in headers),
        "dtypes": dtypes,
        "tensors": {name: [entry.dtype, list(entry.shape)] for name, entry in tensors.items()},
    }


def describe_gguf(path: Path) -> dict[str, Any]:
    """Return the same for a GGUF file of any architecture."""
    from llmctl.formats.gguf.container import read_gguf_header

    header = read_gguf_header(path)
    data = header.metadata
    architecture = str(data.get("general.architecture"))
    dtypes: dict[str, int] = {}
    for tensor in header.tensors.values():
        dtypes[tensor.block.name] = dtypes.get(tensor.block.name, 0) + 1
    tokens = data.get("tokenizer.ggml.tokens")
    return {
        "path": str(path),
        "format": f"gguf {header.version}",
        "parameters": sum(product(tensor.shape) for tensor in header.tensors.values()),
        "bytes": path.stat().st_size,
        "dtypes": dtypes,
        "tensors": {name: [tensor.block.name, list(tensor.shape)] for name, tensor in header.tensors.items()},
        "architecture": architecture,
        "context": data.get(f"{architecture}.context_length"),
        "vocabulary": len(tokens) if isinstance(tokens, list) else None,
        "tokenizer": data.get("tokenizer.ggml.model"),
        "metadata": {key: shortened(value) for key, value in data.items()},
    }


def shortened(value: Any) -> Any:
    """Return a metadata value; replace a long list by its length."""
    return f"{len(value)} values" if isinstance(value, list) and len(value) > 16 else value


def product(shape: tuple[int, ...] | list[int]) -> int:
    """Return the number of elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def plain_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the header's metadata without the entries that are shown separately."""
    separate = ("llmctl.config", PLAIN, COMPRESSED, "llmctl.provenance", "llmctl.ranks")
    return {key: value for key, value in metadata.items() if key not in separate}


def tokenizer_kind(files: Mapping[str, bytes]) -> str | None:
    """Return the type of tokenizer that these files define, or None."""
    if MODEL_FILE in files:
        return "sentencepiece"
    if is_published(files):
        try:
            return f"sentencepiece ({class_name(files) or 'of an unknown class'})"
        except ArtifactError:
            return "sentencepiece (unreadable)"
    if "tokenizer.json" in files:
        try:
            kind = parse_json(files["tokenizer.json"])["model"]["type"]
        except (ValueError, KeyError, TypeError, RecursionError):
            kind = "unreadable"
        return f"tokenizer.json ({kind})"
    if "vocab.txt" in files:
        return "WordPiece (vocab.txt)"
    return "byte-level BPE (vocab.json, merges.txt)" if "merges.txt" in files else None
