"""A model on disk: a folder in Hugging Face's layout, or one self-contained safetensors file; read and written.

The header of every `model.safetensors` written here also carries the configuration, the tokenizer files and where
the model comes from, so that a copy of the file alone is the whole model. Where a header carries them they go before
the files beside it: they were written in the same instant as the weights. Pickles are never loaded. Nothing here
imports torch until tensors are asked for.
"""

import json
import math
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, NotFoundError
from llmctl.formats.families.family import FamilyFormat
from llmctl.formats.families.parameters import stored_shape, to_parameters
from llmctl.formats.families.table import family_of
from llmctl.formats.quantization import (
    HEAD_SCALE,
    IN_BYTES,
    IN_WORDS,
    PACKED,
    PARTS,
    WEIGHT,
    WHOLE_DTYPES,
    Schemes,
    dequantized,
    fits_bytes,
    in_words,
    part_shapes,
    read_schemes,
    whole_dtypes,
)
from llmctl.formats.safetensors import Header, TensorEntry, read_header, read_tensors
from llmctl.model.parameters import Shape, parameter_shapes
from llmctl.quant.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ADAPTER_CONFIG = "adapter_config.json"
COUNT = "llmctl.parameters"
# Everything beside weights and configuration that a model needs to be used, as Hugging Face names it.
FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FILE_LIMIT_BYTES = 64_000_000  # a tokenizer larger than this is not one


@dataclass(frozen=True)
class Artifact:
    """A model that was found and checked, its tensors still on disk.

    files: everything beside the weights except config.json, name -> content; hf: config.json as it stands there;
    tensors: name in today's spelling -> (file, name in it, entry of its header); schemes: of modules in few bits.
    """

    path: Path
    architecture: str
    config: ModelConfig
    files: dict[str, bytes]
    provenance: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    hf: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[Path, str, TensorEntry]] = field(default_factory=dict)
    schemes: Schemes = field(default_factory=dict)

    @property
    def family(self) -> FamilyFormat:
        """The family whose names and layout the tensors are stored in."""
        return family_of(self.hf, str(self.path))

    @property
    def dtype(self) -> str:
        """The dtype most parameters are stored in, as safetensors names it."""
        return most_common_dtype(entry for _, _, entry in self.tensors.values())

    def state(self, dtype: "torch.dtype | None" = None) -> dict[str, "Tensor"]:
        """Return the state of `LanguageModel(config)`: float32 unless another dtype is asked for.

        Raises: ArtifactError when a file is damaged or has gone.
        """
        import torch

        wanted = dtype or torch.float32
        state = {name: tensor.to(wanted) for name, tensor in self.stored_state().items()}
        if self.config.tie_embeddings and not self.config.n_labels:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def stored_state(self) -> dict[str, "Tensor"]:
        """Return the state of `LanguageModel(config)` in the dtypes on disk; the tensors are views of the files.

        What is held in few bits is multiplied out, in float32.
        """
        return self.family.to_internal(dequantized(self._published(), self.schemes), self.config)

    def packed_state(self) -> dict[str, "Tensor"]:
        """Return the same, but modules in few bits with their packed tensors in place of a weight."""
        if not self.schemes:
            return self.stored_state()
        published = self._published()
        layout = [stored for stored in self.family.layout(self.config) if stored.name not in weights_of(self.schemes)]
        state = to_parameters(layout, parameter_shapes(self.config), published.__getitem__)
        return state | {name: tensor for name, tensor in published.items() if name.rpartition(".")[2] in PARTS}

    def _published(self) -> dict[str, "Tensor"]:
        published: dict[str, Tensor] = {}
        for path in {path for path, _, _ in self.tensors.values()}:
            names = {there: name for name, (file, there, _) in self.tensors.items() if file == path}
            published |= {names[there]: tensor for there, tensor in read_tensors(path, names).items()}
        return in_words(published, self.schemes)


def most_common_dtype(entries: Iterable[TensorEntry]) -> str:
    """Return the dtype that takes the most bytes."""
    n_bytes: dict[str, int] = {}
    for entry in entries:
        if entry.dtype[:1] not in "IU":  # codes
            n_bytes[entry.dtype] = n_bytes.get(entry.dtype, 0) + entry.end - entry.begin
    return max(sorted(n_bytes), key=lambda dtype: n_bytes[dtype]) if n_bytes else "F32"


def read_artifact(path: Path) -> Artifact:
    """Read a model folder, or one .safetensors file, and check that its tensors are those of its configuration.

    Raises: NotFoundError when there is none; ArtifactError naming what is damaged, missing, or not read.
    """
    check_kind(path)
    folder = path if path.is_dir() else path.parent
    headers = read_headers(path)
    metadata = next(iter(headers.values())).metadata if len(headers) == 1 else {}
    hf, where = read_hf(metadata, folder, path)
    files = read_files(metadata, folder, path)
    family = family_of(hf, where)
    found = {name: (file, entry) for file, header in headers.items() for name, entry in header.tensors.items()}
    canonical = family.canonical(found)
    config = family.resolve(family.read_config(hf), canonical)
    tensors = {name: (found[there][0], there, found[there][1]) for name, there in canonical.items()}
    if config.n_layers + config.n_decoder_layers > len(tensors):  # before anything grows with a number that lies
        raise mismatch(path, family, f"it has {len(tensors)} tensors for {config.n_layers} layers")
    schemes = read_schemes(hf, config, where)
    forms = {name: form_in(tensors, name, scheme) for name, scheme in schemes.items()}
    wanted = stored_shapes(family, config, schemes, forms)
    check_tensors(family, config, tensors, path, wanted, whole_dtypes(schemes, forms))
    return Artifact(
        path=path,
        architecture=family.architecture,
        config=config,
        files=files,
        provenance=parse_object(metadata.get("llmctl.provenance", "{}"), f"{path}: llmctl.provenance"),
        metadata=metadata,
        hf=hf,
        tensors={name: place for name, place in tensors.items() if name in wanted},
        schemes=schemes,
    )


def weights_of(schemes: Schemes) -> set[str]:
    """Return the names of the weights that modules in few bits do not have."""
    return {f"{name}.weight" for name in schemes}


def form_in(tensors: Mapping[str, Any], name: str, scheme: Scheme) -> str:
    """Return how a file holds the codes of a module."""
    has_bytes = f"{name}.{WEIGHT}" in tensors and f"{name}.{PACKED}" not in tensors
    return IN_BYTES if has_bytes and fits_bytes(scheme) else IN_WORDS


def stored_shapes(
    family: FamilyFormat, config: ModelConfig, schemes: Schemes, forms: Mapping[str, str]
) -> dict[str, Shape]:
    """Return name -> shape of everything that has to be stored."""
    shapes = parameter_shapes(config)
    packed = weights_of(schemes)
    wanted = {stored.name: stored_shape(stored, shapes) for stored in family.layout(config)}
    lost = packed - set(wanted)
    assert not lost, f"{family.architecture} does not store {few(sorted(lost))} by itself"
    kept = {name: shape for name, shape in wanted.items() if name not in packed}
    for name, scheme in schemes.items():
        parts = part_shapes(scheme, shapes[f"{name}.weight"], forms[name])
        kept |= {f"{name}.{part}": shape for part, shape in parts.items()}
    return kept


def n_numbers(header: Header) -> int:
    """Return how many numbers the tensors of a header stand for."""
    told = header.metadata.get(COUNT, "")
    return int(told) if told.isdecimal() else sum(math.prod(entry.shape) for entry in header.tensors.values())


def check_kind(path: Path) -> None:
    """Refuse what is not there and what is not a safetensors model.

    Raises: NotFoundError; ArtifactError with the way out.
    """
    if not path.exists():
        raise NotFoundError(f"there is no model at `{path}`", "llmctl pretrain makes one; llmctl import brings one in")
    if path.is_dir():
        if not (path / WEIGHTS).exists() and not (path / INDEX).exists():
            pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
            if pickles:
                raise refuse_pickle(path / pickles[0])
            raise NotFoundError(f"the folder `{path}` has no `{WEIGHTS}`", "name a model folder or a .safetensors file")
    elif path.suffix in PICKLES:
        raise refuse_pickle(path)
    elif path.suffix == ".gguf":
        raise ArtifactError(f"`{path}` is a GGUF file", f"llmctl import {path} -o MODEL turns it into a model folder")


def refuse_pickle(path: Path) -> ArtifactError:
    """Return the error for a file that could run code when loaded."""
    return ArtifactError(
        f"`{path}` is a pickle, which can run code when it is loaded; llmctl never loads one",
        "save the model as safetensors where you trust it (transformers: save_pretrained)",
    )


def read_headers(path: Path) -> dict[Path, Header]:
    """Return the headers of the one weight file, or of every shard that the index lists."""
    if path.is_file():
        return {path: read_header(path)}
    if (path / WEIGHTS).exists():
        return {path / WEIGHTS: read_header(path / WEIGHTS)}
    index = path / INDEX
    weight_map = parse_object(read_small(index).decode(errors="replace"), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(is_name(name) for name in weight_map.values()):
        raise ArtifactError(f"`{index}` has no `weight_map` from tensor names to file names", "fetch the model again")
    missing = sorted({name for name in weight_map.values() if not (path / name).is_file()})
    if missing:
        raise ArtifactError(f"`{index}` lists `{missing[0]}`, which is not there", "fetch the missing shards")
    headers = {path / name: read_header(path / name) for name in sorted(set(weight_map.values()))}
    astray = [name for name, file in weight_map.items() if name not in headers[path / file].tensors]
    if astray:
        raise ArtifactError(f"`{index}` says that `{astray[0]}` is in `{weight_map[astray[0]]}`, which lacks it")
    return headers


def is_name(value: Any) -> bool:
    """Say whether this is a plain file name: it leads nowhere else."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0:")


def read_hf(metadata: Mapping[str, str], folder: Path, path: Path) -> tuple[dict[str, Any], str]:
    """Return config.json, from the header or from beside it, and where it stands."""
    if "llmctl.config" in metadata:
        where = f"{path}: llmctl.config"
        return parse_object(metadata["llmctl.config"], where), where
    file = folder / CONFIG
    if not file.is_file():
        raise ArtifactError(
            f"`{path}` carries no configuration, and no `{CONFIG}` stands beside its weights",
            "name the model's folder, or put its config.json there",
        )
    return parse_object(read_small(file).decode(errors="replace"), str(file)), str(file)


def read_files(metadata: Mapping[str, str], folder: Path, path: Path) -> dict[str, bytes]:
    """Return the tokenizer and its like, from the header or from beside it."""
    if "llmctl.files" not in metadata:
        return {name: read_small(folder / name) for name in FILES if (folder / name).is_file()}
    where = f"{path}: llmctl.files"
    files: dict[str, bytes] = {}
    for name, text in parse_object(metadata["llmctl.files"], where).items():
        if not is_name(name) or name in (CONFIG, WEIGHTS, INDEX):
            raise ArtifactError(f"`{where}` has the file name `{str(name)[:80]}`, which is not allowed")
        try:
            files[name] = b64decode(text, validate=True)
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"`{where}` does not hold `{name}` as base64") from error
    return files


def read_small(path: Path) -> bytes:
    """Return a file that is not weights.

    Raises: ArtifactError when it is too large to be what its name says.
    """
    size = path.stat().st_size
    if size > FILE_LIMIT_BYTES:
        raise ArtifactError(f"`{path}` has {size} bytes, more than such a file can have ({FILE_LIMIT_BYTES})")
    return path.read_bytes()


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises: ArtifactError saying where it stands.
    """
    try:
        obj = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{where}` is not JSON ({error})", "fetch or write the file again") from error
    if not isinstance(obj, dict):
        raise ArtifactError(f"`{where}` is not a JSON object")
    return obj


def check_tensors(
    family: FamilyFormat,
    config: ModelConfig,
    tensors: Mapping[str, tuple[Path, str, TensorEntry]],
    path: Path,
    wanted: Mapping[str, Shape],
    whole: Mapping[str, str],
) -> None:
    """Check names and shapes of the stored tensors against the configuration, before any is read.

    whole: the dtypes of weights that are codes.
    Raises: ArtifactError naming the first few that are missing, left over, or of another shape.
    """
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise mismatch(path, family, f"missing: {few(missing)}")
    shared = {HEAD_SCALE} if config.tie_embeddings else set()
    extra = [name for name in tensors if name not in {*wanted, *shared} and not family.is_ignored(name, config)]
    if extra:
        raise mismatch(path, family, f"not part of it: {few(extra)}")
    found = {name: tensors[name][2] for name in wanted}
    wrong = [
        f"{name} {entry.shape}, not {wanted[name]}" for name, entry in found.items() if entry.shape != wanted[name]
    ]
    if wrong:
        raise mismatch(path, family, f"of another shape: {few(wrong)}")
    other = [f"{name} {entry.dtype}" for name, entry in found.items() if not is_of_kind(name, entry.dtype, whole)]
    if other:
        raise mismatch(
            path,
            family,
            f"codes that are no whole numbers of their width, or others that are not floating-point numbers: {few(other)}",
        )


def is_of_kind(name: str, dtype: str, whole: Mapping[str, str]) -> bool:
    """Tell whether a tensor has numbers of its kind: whole ones where they are codes, else floating-point ones."""
    wanted = whole.get(name) or WHOLE_DTYPES.get(name.rpartition(".")[2])
    return dtype == wanted if wanted else dtype in ("F32", "F16", "BF16", "F64")


def mismatch(path: Path, family: FamilyFormat, what: str) -> ArtifactError:
    """Return the error for weights that are not those of their configuration."""
    return ArtifactError(
        f"the tensors of `{path}` are not those of its configuration ({family.architecture}): {what}",
        "its configuration and its weights must come from the same model",
    )


def few(items: list[str]) -> str:
    """Return the first three of a list for an error message."""
    rest = f", and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(f"`{item[:120]}`" for item in items[:3]) + rest
