"""Write a model as a folder or as a single self-contained file."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl import __version__
from llmctl.config import ModelConfig
from llmctl.errors import LlmctlError, OutputError
from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import stored_shape, to_stored
from llmctl.families.table import family_for
from llmctl.files import atomic_path, json_text, parse_json, write_bytes, writing
from llmctl.formats.artifact import ADAPTER_CONFIG, CONFIG, COUNT, FILES, INDEX, WEIGHTS, weights_of
from llmctl.formats.generation_settings import GENERATION, default_settings
from llmctl.formats.quantization import KEY, Schemes, family_with, stored_parts, write_schemes
from llmctl.formats.safetensors import write_safetensors
from llmctl.model.parameters import parameter_shapes
from llmctl.tokenizer.header_files import file_metadata
from llmctl.tokenizer.load import find_tokenizer
from llmctl.tokenizer.sentencepiece import MODEL_FILE, SentencePieceTokenizer

if TYPE_CHECKING:
    from torch import Tensor


def write_artifact(
    out: Path,
    config: ModelConfig,
    state: Mapping[str, "Tensor"],
    *,
    files: Mapping[str, bytes],
    provenance: Mapping[str, Any],
    schemes: Schemes | None = None,
    force: bool = False,
) -> Path:
    """Write a model as a folder, or as one file if `out` ends in .safetensors, and return `out`.

    A new folder is created atomically. In an existing one (a run folder) each file is written atomically, the weights
    last: their header contains all the rest, so the model is consistent whenever writing stops. Equal content gives
    equal bytes.

    config: complete (`LanguageModel(config).config`); state: its state, with or without a tied head; modules in
    `schemes` have packed tensors instead of a weight.
    Raises: OutputError if a model exists and `force` is not given, or if the disk refuses.
    """
    schemes = schemes or {}
    family = family_with(config, schemes)
    packed = weights_of(schemes)
    layout = [stored for stored in family.layout(config) if stored.name not in packed]
    constants = family.constants(config)
    tensors = to_stored(layout, state) | constants | stored_parts(state, schemes, config)
    quantization = {KEY: write_schemes(schemes, config)} if schemes else {}
    hf_text = json_text(hf_config(family, config, tensors) | quantization)
    other_files = complete_files(config, files)
    metadata = {
        "format": "pt",
        "llmctl.version": __version__,
        "llmctl.config": hf_text,
        **file_metadata(other_files, compressed=bool(schemes)),
        "llmctl.provenance": json.dumps(dict(provenance), sort_keys=True, ensure_ascii=False),
    }
    if (
        schemes or constants
    ):  # the parameter count cannot be read off packed tensors, nor among those that hold no parameters
        shapes = parameter_shapes(config)
        unquantized = [stored_shape(stored, shapes) for stored in family.layout(config)]
        metadata[COUNT] = str(sum(map(math.prod, unquantized)))
    if out.suffix == ".safetensors":
        refuse_overwrite(out, out.exists() or out.is_symlink(), force=force)
        write_safetensors(out, tensors, metadata)
        return out
    texts = {**other_files, CONFIG: hf_text.encode()}
    refuse_taken(out, (WEIGHTS, INDEX, CONFIG, ADAPTER_CONFIG, *texts), force=force)
    if not out.exists():
        with atomic_path(out) as temporary:
            write_folder(temporary, texts, lambda path: write_safetensors(path, tensors, metadata))
        return out
    write_folder(out, texts, lambda path: write_safetensors(path, tensors, metadata))
    if force:  # only afterwards: until the new weights exist, the old model stays usable
        remove_stale(out, set(texts))
    return out


def small_files(config: ModelConfig, state: Mapping[str, "Tensor"], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files beside the weights of a folder that `write_artifact` writes for a model that is not quantized."""
    family = family_for(config)
    tensors = to_stored(family.layout(config), state) | family.constants(config)
    hf_text = json_text(hf_config(family, config, tensors))
    return {**complete_files(config, files), CONFIG: hf_text.encode()}


def complete_files(config: ModelConfig, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a model's files with what other programs need in them."""
    return with_generation_config(config, with_special_tokens(config, files))


def write_folder(folder: Path, texts: Mapping[str, bytes], write_weights: Callable[[Path], None]) -> None:
    """Write the small files, then the weights."""
    for name, data in texts.items():
        assert name in FILES or name == CONFIG, name
        write_bytes(folder / name, data)
    write_weights(folder / WEIGHTS)


def remove_stale(folder: Path, keep: set[str]) -> None:
    """Remove leftovers of a previous model in this folder: its shards, and tokenizer files not in `keep`."""
    with writing(folder):
        for stale in (folder / INDEX, *folder.glob("model-[0-9]*-of-[0-9]*.safetensors")):
            stale.unlink(missing_ok=True)
        for name in set(FILES) - keep:
            (folder / name).unlink(missing_ok=True)


def refuse_overwrite(out: Path, exists: bool, *, force: bool) -> None:
    """Check that nothing is overwritten without `force`.

    Raises: OutputError.
    """
    if out.suffix not in (".safetensors", ".gguf") and out.is_file():
        raise OutputError(f"cannot write a model folder to `{out}`: it is a file", "choose another path with -o")
    if exists and not force:
        raise OutputError(f"`{out}` already exists", "choose another path with -o, or replace it with -f")


def refuse_taken(folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Check that a folder has no file of these names, unless `force` allows replacing them.

    Raises: OutputError naming the first.
    """
    refuse_overwrite(folder, exists=False, force=force)
    taken = next((name for name in names if os.path.lexists(folder / name)), None)
    if taken is not None and not force:
        raise OutputError(
            f"`{folder}` already exists and contains `{taken}`", "choose another path with -o, or replace it with -f"
        )


def hf_config(family: FamilyFormat, config: ModelConfig, tensors: Mapping[str, "Tensor"]) -> dict[str, Any]:
    """Return the content of config.json, with the dtype under its old (`torch_dtype`) and its new name (`dtype`)."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if not tensor.is_floating_point():
            continue
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.numel()
    dtype = max(sorted(sizes), key=lambda name: sizes[name])  # sorted: a tie must not depend on the order of tensors
    head = {"architectures": [family.architecture], "model_type": family.model_type}
    return head | family.write_config(config) | {"torch_dtype": dtype, "dtype": dtype}


def with_special_tokens(config: ModelConfig, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Let our own tokenizer's files say what stands around the texts of a model of this family.

    A classifier's tokenizer names the padding, which published decoders often lack.
    """
    try:
        if config.n_labels and config.pad_id >= 0 and "tokenizer_config.json" in files:
            settings = parse_json(files["tokenizer_config.json"])
            if not settings.get("pad_token") and (tokenizer := find_tokenizer(files)) is not None:
                padded = settings | {"pad_token": tokenizer.piece(config.pad_id)}
                files = {**files, "tokenizer_config.json": json_text(padded).encode()}
        if MODEL_FILE not in files:
            return dict(files)
        tokenizer = find_tokenizer(files)
        return (
            {**files, **tokenizer.files_for(config.family)}
            if isinstance(tokenizer, SentencePieceTokenizer)
            else dict(files)
        )
    except (
        LlmctlError,
        ValueError,
        TypeError,
        AttributeError,
    ):  # damaged: it stays as it is, and whoever uses it is told
        return dict(files)


def with_generation_config(config: ModelConfig, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Add a generation_config.json with the token ids if a generative model has none; sort the files by name."""
    known = {GENERATION: b"" if config.family == "encoder" else json_text(default_settings(config)).encode()}
    return {name: data for name, data in sorted({**known, **files}.items()) if data or name in files}
