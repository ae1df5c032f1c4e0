"""Read adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Keys follow the base's published architecture: `base_model.model.<path>.lora_A.weight`. The headers of our own adapters
also contain the provenance and a digest of the base's weights, so that another base is refused. Files are not trusted:
unknown settings are refused and pickles are never loaded.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from re import Pattern
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, NotFoundError
from llmctl.families.classifiers import CLASSIFIERS
from llmctl.families.native import checked
from llmctl.families.published import Published
from llmctl.formats.adapter_names import (
    POOLER,
    Architecture,
    LowRank,
    PublishedLinear,
    architecture_of,
    bare,
    by_path,
    compiled,
    from_pattern,
    look_up,
)
from llmctl.formats.adapter_names import split as split_linear
from llmctl.formats.artifact import (
    ADAPTER_CONFIG,
    FILES,
    INDEX,
    WEIGHTS,
    Artifact,
    few,
    parse_object,
    read_small,
    refuse_pickle,
)
from llmctl.formats.safetensors import Header, TensorEntry, read_header, read_tensors
from llmctl.model.parameters import parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
HEAD_FIELDS = ("n_labels", "labels", "problem", "pooling", "pooled_activation")
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Supported `init_lora_weights`; the other methods (PiSSA, OLoRA, LoftQ, ...) change the base's weights."""
READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "use_dora", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "base_model_name_or_path", "init_lora_weights", "revision"),
}
NO_MATTER = {
    *("auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out", "target_modules"),
    *("exclude_modules", "modules_to_save", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
}
"""Settings that do not change the result; any other one that is set is refused."""
SAMPLE_BYTES = 65536
"""How much `identity` reads of the beginning and the end of every tensor."""


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files have been checked, without the base; its tensors are still on disk.

    low_rank: path in the base -> part (`a`, `b`, `magnitude`) -> key in the file; whole: parameter of the base that is
    stored in full (classification head) -> key; files: tokenizer and chat template stored with it.
    """

    path: Path
    values: dict[str, Any]
    header: Header
    files: dict[str, bytes]
    low_rank: dict[str, dict[str, str]]
    whole: dict[str, str]

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(rank)."""
        return bool(self.values.get("use_rslora"))

    @property
    def dora(self) -> bool:
        """Whether weight rows are rescaled to learned magnitudes."""
        return bool(self.values.get("use_dora"))

    @property
    def dropout(self) -> float:
        """The dropout it was trained with."""
        return float(self.values.get("lora_dropout") or 0.0)

    @property
    def base(self) -> str:
        """The path or name of its base, empty if it has none."""
        return str(self.values.get("base_model_name_or_path") or "")

    @property
    def revision(self) -> str:
        """The revision of its base on the Hugging Face Hub, empty if it does not say."""
        return str(self.values.get("revision") or "")

    @property
    def base_sha256(self) -> str:
        """The `identity` of its base, empty if another program wrote the adapter."""
        return self.header.metadata.get("llmctl.base_sha256", "")

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made."""
        return self.metadata_object("llmctl.provenance")

    def pattern(self, key: str) -> list[tuple[Pattern[str], float]]:
        """Return `rank_pattern` or `alpha_pattern` with compiled keys."""
        return compiled(self.values.get(key) or {}, f"{self.path / ADAPTER_CONFIG}: {key}")

    def metadata_object(self, key: str) -> dict[str, Any]:
        """Parse a JSON object in the header's metadata; empty if missing."""
        return parse_object(self.header.metadata.get(key, "{}"), f"{self.path / ADAPTER_WEIGHTS}: {key}")

    def entry(self, key: str) -> TensorEntry:
        """Return a tensor's entry in the header."""
        return self.header.tensors[key]


def is_adapter(path: Path) -> bool:
    """Tell whether this is an adapter folder; one that also contains model weights counts as the model."""
    if any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        return False
    return (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_WEIGHTS).is_file()


def read_adapter(path: Path) -> Adapter:
    """Read an adapter folder and check what can be checked without its base.

    Raises: NotFoundError if files are missing; ArtifactError naming what is damaged or unsupported.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        raise NotFoundError(f"folder `{path}` has no `{ADAPTER_CONFIG}`", "pass the folder of a PEFT adapter")
    if not (path / ADAPTER_WEIGHTS).is_file():
        if (path / PICKLE).is_file():
            raise refuse_pickle(path / PICKLE)
        raise NotFoundError(f"the adapter `{path}` has no `{ADAPTER_WEIGHTS}`", "download or save it again")
    values = parse_object(read_small(path / ADAPTER_CONFIG).decode(errors="replace"), str(path / ADAPTER_CONFIG))
    check_values(values, str(path / ADAPTER_CONFIG))
    header = read_header(path / ADAPTER_WEIGHTS)
    files = {name: read_small(path / name) for name in FILES if (path / name).is_file()}
    adapter = Adapter(path, values, header, files, {}, {})
    for key, entry in header.tensors.items():
        classify_tensor(adapter, key, entry)
    check_parts(adapter)
    return adapter


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Check the settings: supported ones for valid values, all others for being unset.

    Raises: ArtifactError naming the key.
    """
    hf = Published(values, f"the adapter `{where}`")
    hf.only("peft_type", "LORA")
    if values.get("peft_type") is None:
        raise hf.refuse("peft_type", None, "LORA")
    hf.only("task_type", *TASKS)
    hf.only("bias", "none")
    hf.only("init_lora_weights", *INITS)
    hf.integer("r")
    hf.number("lora_alpha")
    if not 0 <= hf.number("lora_dropout", 0.0) < 1:
        raise hf.refuse("lora_dropout", values["lora_dropout"], "a number from 0 to below 1")
    for key in ("use_dora", "use_rslora"):
        hf.flag(key)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict):
            raise hf.refuse(key, pattern, "an object")
        for name in pattern:
            Published(pattern, f"the adapter `{where}`, {key}").number(name)
    if not isinstance(values.get("base_model_name_or_path") or "", str):
        raise hf.refuse("base_model_name_or_path", values["base_model_name_or_path"], "a path")
    for key, value in values.items():
        # An unknown setting that is set may change the result; unset ones come with newer versions of PEFT.
        if value and key not in READ and key not in NO_MATTER:
            raise hf.refuse(key, value, "LoRA and DoRA on linear layers, with a classification head")


def classify_tensor(adapter: Adapter, key: str, entry: TensorEntry) -> None:
    """Add a tensor to `adapter.low_rank` or `adapter.whole` according to its name.

    Raises: ArtifactError for an unknown name or dtype.
    """
    if not key.startswith(PREFIX):
        raise not_read(adapter, f"the tensor `{key[:120]}`, whose name does not start with `{PREFIX}`")
    if entry.dtype not in ("F32", "F16", "BF16", "F64"):
        raise not_read(adapter, f"the tensor `{key[:120]}` of dtype {entry.dtype}")
    name = key.removeprefix(PREFIX)
    # Everything that is not a low-rank factor is a parameter of modules_to_save, stored in full.
    for suffix, part in PARTS.items():
        if name.endswith(suffix):
            adapter.low_rank.setdefault(name.removesuffix(suffix), {})[part] = key
            return
    if ".lora_" in name:
        raise not_read(adapter, f"the tensor `{key[:120]}`")
    adapter.whole[name] = key


def not_read(adapter: Adapter, what: str) -> ArtifactError:
    """Return the error for an unsupported part of an adapter."""
    return ArtifactError(
        f"the adapter `{adapter.path}` has {what}, which llmctl does not read",
        "supported: LoRA and DoRA on linear layers, with a classification head",
    )


def check_parts(adapter: Adapter) -> None:
    """Check that every layer has its factors and that their ranks match the settings.

    Raises: ArtifactError naming the layer.
    """
    if not adapter.low_rank:
        raise not_read(adapter, "no tensor `....lora_A.weight`")
    expected = {"a", "b", "magnitude"} if adapter.dora else {"a", "b"}
    ranks = adapter.pattern("rank_pattern")
    for path, parts in adapter.low_rank.items():
        if set(parts) != expected:
            part = min(set(parts) ^ expected)
            problem = "has no" if part in expected else "has an unexpected"
            raise damaged(adapter, f"`{path}` {problem} `{part}`")
        a, b = adapter.entry(parts["a"]).shape, adapter.entry(parts["b"]).shape
        rank = from_pattern(ranks, path) or adapter.values["r"]
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise damaged(adapter, f"the factors of `{path}` have the shapes {a} and {b}, but its rank is {rank}")


def damaged(adapter: Adapter, what: str) -> ArtifactError:
    """Return the error for an inconsistent adapter."""
    return ArtifactError(f"the adapter `{adapter.path}` is damaged: {what}", "download or save it again")


def adapted_config(adapter: Adapter, base: Artifact) -> ModelConfig:
    """Return the base's config, with a classification head if the adapter contains one.

    Our adapters describe the head in their metadata; for others it follows from the published classifier of the base.
    Raises: ArtifactError if the description is invalid.
    """
    head = adapter.metadata_object("llmctl.head")
    if head:
        # Their heads are of whole texts.
        own = {name: checked(name, head[name]) for name in HEAD_FIELDS if name in head}
        return replace(base.config, head="text", **own)
    if base.config.n_labels or not adapter.whole:
        return base.config
    model_type = base.hf.get("model_type")
    for row in CLASSIFIERS:
        if row.model_type == model_type:
            # With one label, only to find the published name of the output layer; its shape has the number of labels.
            trial = row.read_config({**base.hf, "id2label": {"0": ""}, "problem_type": None})
            head_names = architecture_of(trial, row).head
            outputs = next(name for name, ours in head_names.items() if ours == "classifier.weight")
            if outputs in adapter.whole and len(shape := adapter.entry(adapter.whole[outputs]).shape) == 2:
                names = {str(number): f"LABEL_{number}" for number in range(shape[0])}
                config = row.read_config({**base.hf, "id2label": names, "problem_type": None})
                kept = {field.name: getattr(base.config, field.name) for field in fields(ModelConfig)}
                return ModelConfig(**(kept | {name: getattr(config, name) for name in HEAD_FIELDS}))
    return base.config


def fit(adapter: Adapter, architecture: Architecture) -> dict[str, PublishedLinear]:
    """Return path -> linear layer of every adapted layer, after checking names and shapes against the architecture.

    Raises: ArtifactError naming what does not match this base.
    """
    table = by_path(architecture.linears)
    adapted: dict[str, PublishedLinear] = {}
    for path, parts in adapter.low_rank.items():
        linear = look_up(table, path)
        if linear is None and bare(path) == POOLER and architecture.family.model_type == "bert":
            continue  # a classifier without a pooler does not use its adapter
        if linear is None:
            raise other_base(adapter, f"it adapts `{path[:120]}`, which is not an adaptable layer of the base")
        a, b = adapter.entry(parts["a"]).shape, adapter.entry(parts["b"]).shape
        n_out = sum(linear.sizes)
        magnitude = adapter.entry(parts["magnitude"]).shape if adapter.dora else (n_out,)
        if (b[0], a[1], magnitude) != (n_out, linear.n_in, (n_out,)):
            raise other_base(
                adapter, f"`{path}` has {a[1]} inputs and {b[0]} outputs, but {linear.n_in} and {n_out} in the base"
            )
        adapted[path] = linear
    check_head(adapter, architecture)
    return adapted


def check_head(adapter: Adapter, architecture: Architecture) -> None:
    """Check that all parameters stored in full belong to the classification head.

    Raises: ArtifactError naming those that do not.
    """
    heads, shapes = architecture.head, parameter_shapes(architecture.config)
    unknown = [name for name in adapter.whole if name not in heads]
    if unknown:
        raise not_read(adapter, f"the full parameters {few(unknown)}")
    for name, key in adapter.whole.items():
        in_base, in_adapter = shapes[heads[name]], adapter.entry(key).shape
        if in_base != in_adapter:
            raise other_base(adapter, f"`{name}` has the shape {in_adapter}, but {in_base} in the base")


def other_base(adapter: Adapter, what: str) -> ArtifactError:
    """Return the error for an adapter of another base."""
    hint = f"use its own base, `{adapter.base}`" if adapter.base else "pass its base with -m"
    return ArtifactError(f"the adapter `{adapter.path}` does not fit this base: {what}", hint)


def read_parts(adapter: Adapter, architecture: Architecture) -> tuple[dict[str, LowRank], dict[str, "Tensor"]]:
    """Read the low-rank factors by our layer names, and the parameters of a head; see `fit` for the errors."""
    adapted = fit(adapter, architecture)
    tensors = read_tensors(adapter.path / ADAPTER_WEIGHTS)
    alphas = adapter.pattern("alpha_pattern")
    ranks = {name: rank for name, rank in adapter.metadata_object("llmctl.ranks").items() if type(rank) is int}
    parts: dict[str, LowRank] = {}
    for path, linear in adapted.items():
        keys = adapter.low_rank[path]
        alpha = from_pattern(alphas, path)
        whole = LowRank(
            float(adapter.values["lora_alpha"] if alpha is None else alpha),
            tensors[keys["a"]],
            tensors[keys["b"]],
            tensors[keys["magnitude"]] if adapter.dora else None,
        )
        parts |= split_linear(linear, whole, ranks, rslora=adapter.rslora)
    return parts, {architecture.head[name]: tensors[key] for name, key in adapter.whole.items()}


def identity(tensors: Mapping[str, tuple[Path, str, TensorEntry]]) -> str:
    """Return a SHA-256 that identifies weights: over names, dtypes, shapes and both ends of every tensor.

    Not over all bytes, which would read a large base twice at every start. It does not depend on sharding or metadata.
    """
    digest = hashlib.sha256()
    data_starts: dict[Path, int] = {}  # tensor offsets count from the end of the header
    for name, (path, _, entry) in sorted(tensors.items()):
        digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode())
        with path.open("rb") as file:
            if path not in data_starts:
                data_starts[path] = 8 + int(struct.unpack("<Q", file.read(8))[0])
            for begin in (entry.begin, max(entry.begin, entry.end - SAMPLE_BYTES)):
                file.seek(data_starts[path] + begin)
                digest.update(file.read(min(SAMPLE_BYTES, entry.end - begin)))
    return digest.hexdigest()
