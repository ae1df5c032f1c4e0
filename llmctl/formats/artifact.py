"""Read a model: a folder in Hugging Face's layout, or one self-contained safetensors file.

The header of every `model.safetensors` we write also contains the configuration, the tokenizer files and the
provenance, so that a copy of that file alone is a complete model. These take precedence over separate files in the
folder, because they were written together with the weights. Pickles are never loaded. torch is imported only when
tensors are requested.
"""

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import stored_shape, to_parameters
from llmctl.families.table import family_of, with_architecture
from llmctl.files import contents, parse_json, read_own
from llmctl.formats.generation_settings import GENERATION, listed_ids, with_end_ids
from llmctl.formats.quantization import (
    HEAD_SCALE,
    IN_BYTES,
    IN_WORDS,
    PACKED,
    PARTS,
    SHAPE,
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
from llmctl.formats.sentence_encoder import SENTENCE_FILES
from llmctl.formats.stored_head import with_stored_head
from llmctl.model.parameters import Shape, parameter_shapes
from llmctl.quant.schemes import Scheme
from llmctl.tokenizer.header_files import LIMIT_BYTES, files_in_metadata
from llmctl.tokenizer.published_sentencepiece import with_class

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GGUF = "model.gguf"
"""The file of a run that writes GGUF."""
ADAPTER_CONFIG = "adapter_config.json"
COUNT = "llmctl.parameters"
# The only other files of a model, by Hugging Face's names: tokenizer, chat template, generation settings. A header
# may carry no other name: its files are written beside the weights, where `train.py` would replace the user's own.
FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "encoder.json",
    "merges.txt",
    "vocab.bpe",
    "chat_template.jinja",
    "generation_config.json",
    *SENTENCE_FILES,
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_SHARED = 1000
"""Most layers that may share one layer's weights."""


@dataclass(frozen=True)
class Artifact:
    """A model whose files have been checked; its tensors are still on disk.

    files: name -> content of the other files, except config.json; hf: config.json as stored; tensors: current name ->
    (file, name in the file, header entry); schemes: those of the quantized modules.
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
        """The family whose tensor names and layout the file uses."""
        return family_of(self.hf, str(self.path))

    @property
    def dtype(self) -> str:
        """The dtype of most of the stored bytes, by its safetensors name."""
        return most_common_dtype(entry for _, _, entry in self.tensors.values())

    def state(self, dtype: "torch.dtype | None" = None) -> dict[str, "Tensor"]:
        """Return the state of `LanguageModel(config)` in `dtype` (default float32), dequantized.

        Raises: ArtifactError if a file is damaged or missing.
        """
        import torch

        target = dtype or torch.float32
        state = {name: tensor.to(target) for name, tensor in self.stored_state().items()}
        if self.config.tie_embeddings and not self.config.n_labels:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def stored_state(self) -> dict[str, "Tensor"]:
        """Return the state of `LanguageModel(config)` in the dtypes on disk; the tensors are views of the files.

        Quantized weights are dequantized to float32.
        """
        return self.family.to_internal(dequantized(self._published(), self.schemes), self.config)

    def packed_state(self) -> dict[str, "Tensor"]:
        """Return the same, but with packed tensors in place of the weights of quantized modules."""
        if not self.schemes:
            return self.stored_state()
        published = self._published()
        layout = [stored for stored in self.family.layout(self.config) if stored.name not in weights_of(self.schemes)]
        state = to_parameters(layout, parameter_shapes(self.config), published.__getitem__)
        return state | {name: tensor for name, tensor in published.items() if name.rpartition(".")[2] in PARTS}

    def _published(self) -> dict[str, "Tensor"]:
        published: dict[str, Tensor] = {}
        # One pass per file: an index may spread the tensors over many.
        for path in {path for path, _, _ in self.tensors.values()}:
            names = {stored: name for name, (file, stored, _) in self.tensors.items() if file == path}
            published |= {names[stored]: tensor for stored, tensor in read_tensors(path, names).items()}
        return checked_sizes(in_words(published, self.schemes), self.schemes, self.config, self.path)


def most_common_dtype(entries: Iterable[TensorEntry]) -> str:
    """Return the floating-point dtype that takes the most bytes."""
    n_bytes: dict[str, int] = {}
    for entry in entries:
        if entry.dtype[:1] not in "IU":  # integers are quantization codes, not the dtype of parameters
            n_bytes[entry.dtype] = n_bytes.get(entry.dtype, 0) + entry.end - entry.begin
    return max(sorted(n_bytes), key=lambda dtype: n_bytes[dtype]) if n_bytes else "F32"


def read_artifact(path: Path) -> Artifact:
    """Read a model folder or a .safetensors file and check that its tensors match its configuration.

    Raises: NotFoundError if it does not exist; ArtifactError naming what is damaged, missing, or unsupported.
    """
    check_kind(path)
    folder = path if path.is_dir() else path.parent
    headers = read_headers(path)
    # Shards have no common header: only a single file contains the configuration.
    metadata = next(iter(headers.values())).metadata if len(headers) == 1 else {}
    hf, where = read_hf(metadata, folder, path)
    # What is written from here on has another config.json, which may not tell the class of the tokenizer any more.
    files = with_class(read_files(metadata, folder, path), hf)
    family = family_of(hf, where)
    stored = {name: (file, entry) for file, header in headers.items() for name, entry in header.tensors.items()}
    canonical = family.canonical(stored)
    config = family.resolve(family.read_config(hf), canonical)
    tensors = {name: (stored[original][0], original, stored[original][1]) for name, original in canonical.items()}
    # Checked before any code allocates by the number of layers: a malicious config could claim billions.
    n_layers = config.n_layers + config.n_decoder_layers
    if n_layers > (LARGEST_SHARED if config.share_layers else len(tensors)):
        raise mismatch(path, family, f"it has {len(tensors)} tensors for {config.n_layers} layers")
    try:
        config = with_architecture(with_stored_head(family, config, tensors, path), family)
    except UsageError as error:  # of our own configurations; here, of a file's
        raise ArtifactError(f"`{where}`: {error}", "download the model again, or correct that value") from error
    # A list of end tokens has no place in ModelConfig; transformers takes it over into the generation settings as well.
    if GENERATION not in files:
        files = with_end_ids(config, files, listed_ids(hf.get("eos_token_id")))
    schemes = read_schemes(hf, config, where)
    forms = {name: form_in(tensors, name, scheme) for name, scheme in schemes.items()}
    expected = stored_shapes(family, config, schemes, forms)
    check_tensors(family, config, tensors, path, expected, whole_dtypes(schemes, forms))
    return Artifact(
        path=path,
        architecture=family.architecture,
        config=config,
        files=files,
        provenance=parse_object(metadata.get("llmctl.provenance", "{}"), f"{path}: llmctl.provenance"),
        metadata=metadata,
        hf=hf,
        tensors={name: location for name, location in tensors.items() if name in expected},
        schemes=schemes,
    )


def checked_sizes(
    published: dict[str, "Tensor"], schemes: Schemes, config: ModelConfig, path: Path
) -> dict[str, "Tensor"]:
    """Return the tensors, whose packed codes are as many as the configuration says: the words do not tell.

    Raises: ArtifactError.
    """
    shapes = parameter_shapes(config) if schemes else {}
    for name in schemes:
        stored, expected = published[f"{name}.{SHAPE}"].tolist(), list(shapes[f"{name}.weight"])
        if stored != expected:
            raise ArtifactError(f"`{name}.{SHAPE}` of `{path}` is {stored}, not {expected}", "download the model again")
    return published


def weights_of(schemes: Schemes) -> set[str]:
    """Return the names of the weights that quantization replaces by packed tensors."""
    return {f"{name}.weight" for name in schemes}


def form_in(tensors: Mapping[str, Any], name: str, scheme: Scheme) -> str:
    """Return the form of a module's codes in a file: one per byte, or packed in words."""
    has_bytes = f"{name}.{WEIGHT}" in tensors and f"{name}.{PACKED}" not in tensors
    return IN_BYTES if has_bytes and fits_bytes(scheme) else IN_WORDS


def stored_shapes(
    family: FamilyFormat, config: ModelConfig, schemes: Schemes, forms: Mapping[str, str]
) -> dict[str, Shape]:
    """Return name -> shape of every tensor the file must contain.

    Raises: ArtifactError if packed weights would have to be split, renamed or reordered.
    """
    shapes = parameter_shapes(config)
    packed = weights_of(schemes)
    layout = family.layout(config)
    unquantized = {stored.name: stored_shape(stored, shapes) for stored in layout}
    as_ours = {stored.name for stored in layout if stored.form == "plain" and stored.holds == (stored.name,)}
    if not packed <= as_ours:
        raise ArtifactError(
            f"{family.architecture} stores {few(sorted(packed - as_ours))} under other names or in another order than "
            "llmctl, which packed codes do not allow",
            "import the model in bfloat16 or float32, and quantize it with `llmctl quantize`",
        )
    expected = {name: shape for name, shape in unquantized.items() if name not in packed}
    for name, scheme in schemes.items():
        parts = part_shapes(scheme, shapes[f"{name}.weight"], forms[name])
        expected |= {f"{name}.{part}": shape for part, shape in parts.items()}
    return expected


def count_parameters(header: Header) -> int:
    """Return the parameter count of a file: from its metadata if quantized, else the sum of its tensors' sizes."""
    recorded = header.metadata.get(COUNT, "")
    return int(recorded) if recorded.isdecimal() else sum(math.prod(entry.shape) for entry in header.tensors.values())


def check_kind(path: Path) -> None:
    """Check that a path is a safetensors model.

    Raises: NotFoundError; ArtifactError for a pickle or a GGUF file.
    """
    if not path.exists():
        raise NotFoundError(
            f"model `{path}` does not exist", "train one with `llmctl pretrain` or convert one with `llmctl import`"
        )
    if path.is_dir():
        if not (path / WEIGHTS).exists() and not (path / INDEX).exists():
            # Most older published models contain only pickles: explain instead of reporting a missing file.
            pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
            if pickles:
                raise refuse_pickle(path / pickles[0])
            if (path / GGUF).is_file():
                raise NotFoundError(
                    f"the model of `{path}` is a GGUF file", f"llmctl import {shlex.quote(str(path / GGUF))} -o MODEL"
                )
            raise NotFoundError(
                f"folder `{path}` has no `{WEIGHTS}`: {contents(path)}", "pass a model folder or a .safetensors file"
            )
    elif path.suffix in PICKLES:
        raise refuse_pickle(path)
    elif path.suffix == ".gguf":
        raise ArtifactError(f"`{path}` is a GGUF file", f"convert it first: llmctl import {path} -o MODEL")


def refuse_pickle(path: Path) -> ArtifactError:
    """Return the error for a pickle, which can run code when loaded."""
    return ArtifactError(
        f"`{path}` is a pickle, which can run code when loaded; llmctl never loads pickles",
        "convert it to safetensors on a machine where you trust it (transformers: save_pretrained)",
    )


def read_headers(path: Path) -> dict[Path, Header]:
    """Read the header of the weight file, or of every shard listed in the index."""
    if path.is_file():
        return {path: read_header(path)}
    if (path / WEIGHTS).exists():
        return {path / WEIGHTS: read_header(path / WEIGHTS)}
    index = path / INDEX
    weight_map = read_index(index)
    missing = [name for name in shard_names(index) if not (path / name).is_file()]
    if missing:
        raise ArtifactError(f"`{index}` lists `{missing[0]}`, which does not exist", "download the missing shards")
    # The index is not trusted: the shards' own headers decide, and must agree with it.
    headers = {path / name: read_header(path / name) for name in sorted(set(weight_map.values()))}
    absent = [name for name, file in weight_map.items() if name not in headers[path / file].tensors]
    if absent:
        raise ArtifactError(
            f"`{index}` lists the tensor `{absent[0]}` in `{weight_map[absent[0]]}`, which does not contain it",
            "download the model again",
        )
    return headers


def read_index(index: Path) -> dict[str, str]:
    """Return the index of a model in several files: tensor name -> file name.

    Raises: ArtifactError.
    """
    weight_map = parse_object(read_small(index).decode(errors="replace"), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(is_name(name) for name in weight_map.values()):
        raise ArtifactError(
            f"`{index}` has no valid `weight_map` of tensor names to file names", "download the model again"
        )
    return weight_map


def shard_names(index: Path) -> list[str]:
    """Return the names of the weight files that an index lists.

    Raises: ArtifactError.
    """
    return sorted(set(read_index(index).values()))


def is_name(value: Any) -> bool:
    """Tell whether this is a plain file name, which cannot point to another folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0:")


def read_hf(metadata: Mapping[str, str], folder: Path, path: Path) -> tuple[dict[str, Any], str]:
    """Return config.json, from the header or the folder, and its location for error messages."""
    if "llmctl.config" in metadata:
        where = f"{path}: llmctl.config"
        return parse_object(metadata["llmctl.config"], where), where
    file = folder / CONFIG
    if not file.is_file():
        raise ArtifactError(
            f"`{path}` contains no configuration, and there is no `{CONFIG}` next to it",
            "pass the model's folder, or copy its config.json there",
        )
    return parse_object(read_small(file).decode(errors="replace"), str(file)), str(file)


def read_files(metadata: Mapping[str, str], folder: Path, path: Path) -> dict[str, bytes]:
    """Return the tokenizer and other small files, from the header or the folder."""
    try:
        files = files_in_metadata(metadata)
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"`{path}`: the files in its header are damaged: {error}", "download the model again"
        ) from error
    if files is None:
        return {name: read_small(folder / name) for name in FILES if (folder / name).is_file()}
    for name in files:
        if name not in FILES:
            raise ArtifactError(
                f"`{path}: llmctl.files` contains the file name `{name[:80]}`, which is not a file of a model",
                "do not trust this file; ask where it was made",
            )
    return files


def read_small(path: Path) -> bytes:
    """Read a file that is not weights.

    Raises: ArtifactError if it is implausibly large.
    """
    size = path.stat().st_size
    if size > LIMIT_BYTES:
        raise ArtifactError(
            f"`{path}` has {size} bytes, more than the limit of {LIMIT_BYTES}", "download the file again"
        )
    return read_own(path)


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises: ArtifactError with its location.
    """
    try:
        obj = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{where}` is not JSON ({error})", "download or write the file again") from error
    if not isinstance(obj, dict):
        raise ArtifactError(
            f"`{where}` is a JSON {type(obj).__name__}, not an object", "download or write the file again"
        )
    return obj


def check_tensors(
    family: FamilyFormat,
    config: ModelConfig,
    tensors: Mapping[str, tuple[Path, str, TensorEntry]],
    path: Path,
    expected: Mapping[str, Shape],
    integers: Mapping[str, str],
) -> None:
    """Check names, shapes and dtypes of the stored tensors against the configuration, before any is read.

    integers: the dtypes of weights and scales that are stored as codes.
    Raises: ArtifactError naming the first few that are missing, unexpected, or of another shape or dtype.
    """
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise mismatch(path, family, f"missing: {few(missing)}")
    shared = {HEAD_SCALE} if config.tie_embeddings else set()  # a second copy for transformers, see `shares_bytes`
    extra = [name for name in tensors if name not in {*expected, *shared} and not family.is_ignored(name, config)]
    if extra:
        raise mismatch(path, family, f"unexpected: {few(extra)}")
    entries = {name: tensors[name][2] for name in expected}
    wrong = [
        f"{name} {entry.shape}, not {expected[name]}"
        for name, entry in entries.items()
        if entry.shape != expected[name]
    ]
    if wrong:
        raise mismatch(path, family, f"wrong shape: {few(wrong)}")
    other = [f"{name} {entry.dtype}" for name, entry in entries.items() if not has_dtype(name, entry.dtype, integers)]
    if other:
        raise mismatch(path, family, f"wrong dtype: {few(other)}")


def has_dtype(name: str, dtype: str, integers: Mapping[str, str]) -> bool:
    """Tell whether a tensor has the dtype it must have: that of its codes, or any floating-point one."""
    expected = integers.get(name) or WHOLE_DTYPES.get(name.rpartition(".")[2])
    return dtype == expected if expected else dtype in ("F32", "F16", "BF16", "F64")


def mismatch(path: Path, family: FamilyFormat, what: str) -> ArtifactError:
    """Return the error for weights that do not match their configuration."""
    return ArtifactError(
        f"the tensors of `{path}` do not match its configuration ({family.architecture}): {what}",
        "configuration and weights must come from the same model",
    )


def few(items: list[str]) -> str:
    """Format the first three items of a list for an error message."""
    rest = f", and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(f"`{item[:120]}`" for item in items[:3]) + rest
