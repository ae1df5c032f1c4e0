"""Import published folders, GGUF and single files, and export models as a single file or Hugging Face folder.

Weights are not rounded unless a dtype is given; torch is imported only for tensors.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.with_adapters import read_model
from llmctl.config import ModelConfig
from llmctl.errors import LlmctlError, UsageError
from llmctl.files import file_sha256, parse_json
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.generation_settings import listed_ids, with_end_ids
from llmctl.formats.quantization import PARTS, Schemes
from llmctl.formats.sentence_encoder import pooling_files
from llmctl.quant.schemes import SCALE_BITS
from llmctl.tables.dtypes import full_name
from llmctl.tokenizer.load import find_tokenizer
from llmctl.tokenizer.published_sentencepiece import is_published

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
MASKS = ("[MASK]", "<mask>", "<|mask|>")


def import_model(source: Path, out: Path, *, dtype: str = "", force: bool = False) -> Path:
    """Convert a published model to a model folder or single file and return its path.

    Weights keep their stored dtype (GGUF becomes float32) unless `dtype` is given.

    Raises: NotFoundError, ArtifactError, MissingExtraError from reading; OutputError from writing; UsageError.
    """
    dtype = full_name(dtype)
    if dtype and dtype not in DTYPES:
        raise UsageError(f"`--dtype {dtype}` is not supported", f"`--dtype` takes {', '.join(DTYPES)}")
    if source.suffix == ".gguf" and source.is_file():
        config, state, files, origin = read_gguf(source)
        earlier: Mapping[str, Any] = {}
        schemes: Schemes = {}
    else:
        artifact = read_model(source)
        config, state, files = artifact.config, artifact.packed_state(), artifact.files
        origin, earlier, schemes = origin_of(artifact), artifact.provenance, artifact.schemes
    config = with_mask_id(config, files)
    warn_of_numbers(state, source)
    warn_of_tokenizer(files, source)
    provenance = {**earlier, "imported": origin}
    state = cast(state, dtype)
    return write_artifact(out, config, state, files=files, provenance=provenance, schemes=schemes, force=force)


def export_model(source: Path, out: Path, *, to: str, force: bool = False) -> Path:
    """Write a model as a single file (`single`) or a Hugging Face folder (`hf`), with identical tensors.

    Raises: UsageError if `out` does not fit the format; NotFoundError, ArtifactError, OutputError.
    """
    if to not in ("single", "hf"):
        raise UsageError(f"`--to {to}` is not supported", "`--to` takes single, hf, gguf or onnx")
    if (to == "single") != (out.suffix == ".safetensors"):
        form = "a file X.safetensors" if to == "single" else "a folder"
        raise UsageError(f"`--to {to}` writes {form}, but `{out}` is not one", f"use `-o` with {form}")
    artifact = read_model(source)
    state, schemes = artifact.packed_state(), artifact.schemes
    if to == "hf":  # other tools read only 16-bit scales; 8-bit scales are exactly representable in them
        schemes = {name: replace(scheme, scale_bits=SCALE_BITS) for name, scheme in schemes.items()}
    return write_artifact(
        out,
        artifact.config,
        state,
        files=artifact.files,
        provenance=artifact.provenance,
        schemes=schemes,
        force=force,
    )


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, "Tensor"], dict[str, bytes], dict[str, Any]]:
    """Return configuration, float32 state, tokenizer files and origin of a GGUF file."""
    from llmctl.formats.gguf.container import read_gguf_header
    from llmctl.formats.gguf.model import gguf_config, gguf_state, pooling_of
    from llmctl.formats.gguf.tokenizer import tokenizer_files

    header = read_gguf_header(path)
    config = gguf_config(header)
    files = tokenizer_files(header.metadata, config.vocab_size, config.max_positions)
    if pooling := pooling_of(header):
        files |= pooling_files(pooling, config.d_model)
    ends = [header.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eot", "eom")]
    files = with_end_ids(config, files, listed_ids(ends))
    kept = ("general.name", "general.license", "general.architecture")
    origin = {"format": "gguf", "weights": {path.name: file_sha256(path)}}
    origin |= {key: header.metadata[key] for key in kept if isinstance(header.metadata.get(key), str)}
    return config, gguf_state(header, config), files, origin


def origin_of(artifact: Artifact) -> dict[str, Any]:
    """Return the origin of an imported model: file names without folders, so that equal imports give equal bytes."""
    files = sorted({path for path, _, _ in artifact.tensors.values()})
    return {
        "format": "safetensors",
        "general.architecture": artifact.architecture,
        "weights": {path.name: file_sha256(path) for path in files},
    }


def warn_of_numbers(state: Mapping[str, "Tensor"], source: Path) -> None:
    """Log which weights are not finite: the model predicts nothing with them."""
    import torch

    for name, tensor in state.items():
        n_wrong = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if n_wrong:
            log.warning("%s of the %s weights of `%s` in `%s` are not finite", n_wrong, tensor.numel(), name, source)


def warn_of_tokenizer(files: Mapping[str, bytes], source: Path) -> None:
    """Log that a model has no tokenizer that can be read: it will take only token ids."""
    try:
        if find_tokenizer(files) is None:
            listed = ", ".join(f"`{name}`" for name in sorted(files)) or "there are none"
            log.warning("no tokenizer among the files of `%s` (%s): the model takes only `--ids`", source, listed)
    except LlmctlError as error:
        log.warning("the tokenizer of `%s` cannot be read: %s; %s", source, error, error.hint)


def cast(state: dict[str, "Tensor"], dtype: str) -> dict[str, "Tensor"]:
    """Convert a state to a dtype by name; an empty name and packed tensors change nothing."""
    if not dtype:
        return state
    import torch

    target = getattr(torch, dtype)
    return {name: tensor if name.rpartition(".")[2] in PARTS else tensor.to(target) for name, tensor in state.items()}


def with_mask_id(config: ModelConfig, files: Mapping[str, bytes]) -> ModelConfig:
    """Set the mask token of an encoder, which many published configs define only in the tokenizer."""
    if config.family != "encoder" or config.mask_id >= 0:
        return config
    ids = special_ids(files)
    return replace(config, mask_id=next((ids[mask] for mask in MASKS if mask in ids), -1))


def special_ids(files: Mapping[str, bytes]) -> dict[str, int]:
    """Return token -> id of the added tokens in tokenizer.json, of all lines of vocab.txt, or of a sentencepiece model."""
    if "vocab.txt" in files:
        lines = files["vocab.txt"].decode(errors="replace").splitlines()
        return {line: index for index, line in enumerate(lines)}
    try:
        if is_published(files) and (tokenizer := find_tokenizer(files)):
            return {token: special.token_id for token, special in tokenizer.special_tokens().items()}
        added = parse_json(files.get("tokenizer.json", b"{}")).get("added_tokens", [])
        return {str(token["content"]): int(token["id"]) for token in added}
    except (LlmctlError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
