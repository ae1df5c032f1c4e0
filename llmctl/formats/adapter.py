"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors` in a folder.

Keys are those of the published architecture of the base, `base_model.model.<path>.lora_A.weight`. The header of what
is written here also says where the adapter comes from and of which weights it is, so that another base is refused. As
with models nothing read is trusted, nothing is guessed, and pickles are never loaded.
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
from llmctl.formats.adapter_names import (
    POOLER,
    Architecture,
    LowRank,
    Place,
    architecture_of,
    bare,
    by_path,
    compiled,
    from_pattern,
    look_up,
)
from llmctl.formats.adapter_names import split as split_place
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
from llmctl.formats.families.classifiers import CLASSIFIERS
from llmctl.formats.families.family import Published
from llmctl.formats.families.native import checked
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
"""Ways to draw the first factors; others change the base's weights."""
READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "use_dora", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "base_model_name_or_path", "init_lora_weights"),
}
NO_MATTER = {
    *("auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out", "target_modules"),
    *("exclude_modules", "modules_to_save", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
}
"""Settings that change nothing of what the tensors say; any other that is set is refused."""
SAMPLE_BYTES = 65536


@dataclass(frozen=True)
class Adapter:
    """An adapter that was found and checked by itself, its tensors still on disk.

    low_rank: path in the base -> part (`a`, `b`, `magnitude`) -> key in the file; whole: parameter of the base that is
    stored as a whole -> key; files: tokenizer and chat template that were saved beside it.
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
        """Whether rows are brought to learned lengths."""
        return bool(self.values.get("use_dora"))

    @property
    def dropout(self) -> float:
        """The dropout it was trained with."""
        return float(self.values.get("lora_dropout") or 0.0)

    @property
    def base(self) -> str:
        """What it calls its base; empty where it does not say."""
        return str(self.values.get("base_model_name_or_path") or "")

    @property
    def base_sha256(self) -> str:
        """The `identity` of its base; empty in an adapter that was made elsewhere."""
        return self.header.metadata.get("llmctl.base_sha256", "")

    @property
    def provenance(self) -> dict[str, Any]:
        """Where it comes from."""
        return self.metadata_object("llmctl.provenance")

    def pattern(self, key: str) -> list[tuple[Pattern[str], float]]:
        """Return `rank_pattern` or `alpha_pattern`, ready for matching."""
        return compiled(self.values.get(key) or {}, f"{self.path / ADAPTER_CONFIG}: {key}")

    def metadata_object(self, key: str) -> dict[str, Any]:
        """Return a JSON object of the header; empty where it is not there."""
        return parse_object(self.header.metadata.get(key, "{}"), f"{self.path / ADAPTER_WEIGHTS}: {key}")

    def entry(self, key: str) -> TensorEntry:
        """Return a tensor's entry in the header."""
        return self.header.tensors[key]


def is_adapter(path: Path) -> bool:
    """Tell whether this is an adapter's folder; one that also holds a model counts as the model."""
    if any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        return False
    return (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_WEIGHTS).is_file()


def read_adapter(path: Path) -> Adapter:
    """Read an adapter's folder and check what can be checked without its base.

    Raises: NotFoundError when there is none; ArtifactError naming what is damaged, or not read.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        raise NotFoundError(f"the folder `{path}` has no `{ADAPTER_CONFIG}`", "name the folder of a PEFT adapter")
    if not (path / ADAPTER_WEIGHTS).is_file():
        if (path / PICKLE).is_file():
            raise refuse_pickle(path / PICKLE)
        raise NotFoundError(f"the adapter `{path}` has no `{ADAPTER_WEIGHTS}`", "fetch or save it again")
    values = parse_object(read_small(path / ADAPTER_CONFIG).decode(errors="replace"), str(path / ADAPTER_CONFIG))
    check_values(values, str(path / ADAPTER_CONFIG))
    header = read_header(path / ADAPTER_WEIGHTS)
    files = {name: read_small(path / name) for name in FILES if (path / name).is_file()}
    adapter = Adapter(path, values, header, files, {}, {})
    for key, entry in header.tensors.items():
        sort_in(adapter, key, entry)
    check_parts(adapter)
    return adapter


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Check the settings: those that are read for their values, all others for being off.

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
        if value and key not in READ and key not in NO_MATTER:
            raise hf.refuse(key, value, "LoRA and DoRA on linear layers, with a classification head")


def sort_in(adapter: Adapter, key: str, entry: TensorEntry) -> None:
    """Note what a tensor is.

    Raises: ArtifactError for a key or a dtype that is not understood.
    """
    if not key.startswith(PREFIX):
        raise not_read(adapter, f"the tensor `{key[:120]}`, whose name does not begin with `{PREFIX}`")
    if entry.dtype not in ("F32", "F16", "BF16", "F64"):
        raise not_read(adapter, f"the tensor `{key[:120]}` of dtype {entry.dtype}")
    name = key.removeprefix(PREFIX)
    for suffix, part in PARTS.items():
        if name.endswith(suffix):
            adapter.low_rank.setdefault(name.removesuffix(suffix), {})[part] = key
            return
    if ".lora_" in name:
        raise not_read(adapter, f"the tensor `{key[:120]}`")
    adapter.whole[name] = key


def not_read(adapter: Adapter, what: str) -> ArtifactError:
    """Return the error for something in an adapter that is not understood."""
    return ArtifactError(
        f"the adapter `{adapter.path}` has {what}, which llmctl does not read",
        "what is read: LoRA and DoRA on linear layers, with a classification head",
    )


def check_parts(adapter: Adapter) -> None:
    """Check that every layer has its factors and that their ranks are those of the settings.

    Raises: ArtifactError naming the layer.
    """
    if not adapter.low_rank:
        raise not_read(adapter, "no tensor `....lora_A.weight`")
    wanted = {"a", "b", "magnitude"} if adapter.dora else {"a", "b"}
    ranks = adapter.pattern("rank_pattern")
    for path, parts in adapter.low_rank.items():
        if set(parts) != wanted:
            odd = min(set(parts) ^ wanted)
            raise damaged(adapter, f"`{path}` {'lacks' if odd in wanted else 'has'} its `{odd}`")
        a, b = adapter.entry(parts["a"]).shape, adapter.entry(parts["b"]).shape
        rank = from_pattern(ranks, path) or adapter.values["r"]
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise damaged(adapter, f"the factors of `{path}` are {a} and {b}, its rank is {rank}")


def damaged(adapter: Adapter, what: str) -> ArtifactError:
    """Return the error for an adapter that contradicts itself."""
    return ArtifactError(f"the adapter `{adapter.path}` is damaged: {what}", "fetch or save it again")


def adapted_config(adapter: Adapter, base: Artifact) -> ModelConfig:
    """Return the config of the base with the adapter: with a head over labels where the adapter brings one.

    Raises: ArtifactError when the base's family has no such head.
    """
    said = adapter.metadata_object("llmctl.head")
    if said:
        return replace(base.config, **{name: checked(name, said[name]) for name in HEAD_FIELDS if name in said})
    if base.config.n_labels or not adapter.whole:
        return base.config
    model_type = base.hf.get("model_type")
    for row in CLASSIFIERS:
        if row.model_type == model_type:
            one = row.read_config({**base.hf, "id2label": {"0": ""}, "problem_type": None})
            outputs = next(name for name, ours in architecture_of(one, row).head.items() if ours == "classifier.weight")
            if outputs in adapter.whole and len(shape := adapter.entry(adapter.whole[outputs]).shape) == 2:
                names = {str(number): f"LABEL_{number}" for number in range(shape[0])}
                config = row.read_config({**base.hf, "id2label": names, "problem_type": None})
                kept = {field.name: getattr(base.config, field.name) for field in fields(ModelConfig)}
                return ModelConfig(**(kept | {name: getattr(config, name) for name in HEAD_FIELDS}))
    return base.config


def fit(adapter: Adapter, architecture: Architecture) -> dict[str, Place]:
    """Return path -> place of every layer that is adapted, names and shapes checked against the adapted architecture.

    Raises: ArtifactError naming what is not of this base.
    """
    table = by_path(architecture.places)
    found: dict[str, Place] = {}
    for path, parts in adapter.low_rank.items():
        place = look_up(table, path)
        if place is None and bare(path) == POOLER and architecture.family.model_type == "bert":
            continue
        if place is None:
            raise other_base(adapter, f"it adapts `{path[:120]}`, which is no layer of the base that takes adapters")
        a, b = adapter.entry(parts["a"]).shape, adapter.entry(parts["b"]).shape
        n_out = sum(place.sizes)
        lengths = adapter.entry(parts["magnitude"]).shape if adapter.dora else (n_out,)
        if (b[0], a[1], lengths) != (n_out, place.n_in, (n_out,)):
            raise other_base(adapter, f"`{path}` maps {a[1]} to {b[0]} there, {place.n_in} to {n_out} in the base")
        found[path] = place
    check_head(adapter, architecture)
    return found


def check_head(adapter: Adapter, architecture: Architecture) -> None:
    """Check that whole parameters are those of the classification head.

    Raises: ArtifactError naming what is not.
    """
    heads, shapes = architecture.head, parameter_shapes(architecture.config)
    unknown = [name for name in adapter.whole if name not in heads]
    if unknown:
        raise not_read(adapter, f"the whole parameters {few(unknown)}")
    for name, key in adapter.whole.items():
        here, there = shapes[heads[name]], adapter.entry(key).shape
        if here != there:
            raise other_base(adapter, f"`{name}` has the shape {there} there, {here} in the base")


def other_base(adapter: Adapter, what: str) -> ArtifactError:
    """Return the error for an adapter of another base."""
    hint = f"it names its base: `{adapter.base}`" if adapter.base else "name its base with -m"
    return ArtifactError(f"the adapter `{adapter.path}` does not fit this base: {what}", hint)


def read_parts(adapter: Adapter, architecture: Architecture) -> tuple[dict[str, LowRank], dict[str, "Tensor"]]:
    """Return the adapters of our layers, and the parameters of a head, from disk; see `fit` for the errors."""
    found = fit(adapter, architecture)
    tensors = read_tensors(adapter.path / ADAPTER_WEIGHTS)
    alphas = adapter.pattern("alpha_pattern")
    ranks = {name: rank for name, rank in adapter.metadata_object("llmctl.ranks").items() if type(rank) is int}
    parts: dict[str, LowRank] = {}
    for path, place in found.items():
        keys = adapter.low_rank[path]
        alpha = from_pattern(alphas, path)
        whole = LowRank(
            float(adapter.values["lora_alpha"] if alpha is None else alpha),
            tensors[keys["a"]],
            tensors[keys["b"]],
            tensors[keys["magnitude"]] if adapter.dora else None,
        )
        parts |= split_place(place, whole, ranks, rslora=adapter.rslora)
    return parts, {architecture.head[name]: tensors[key] for name, key in adapter.whole.items()}


def identity(tensors: Mapping[str, tuple[Path, str, TensorEntry]]) -> str:
    """Return what tells weights from others: a SHA-256 over names, dtypes, shapes and both ends of every tensor.

    Not over all bytes: a large base would be read twice at every start. The same weights in one file, in shards, or
    beside other metadata are the same.
    """
    digest = hashlib.sha256()
    begins: dict[Path, int] = {}
    for name, (path, _, entry) in sorted(tensors.items()):
        digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode())
        with path.open("rb") as file:
            if path not in begins:
                begins[path] = 8 + int(struct.unpack("<Q", file.read(8))[0])
            for begin in (entry.begin, max(entry.begin, entry.end - SAMPLE_BYTES)):
                file.seek(begins[path] + begin)
                digest.update(file.read(min(SAMPLE_BYTES, entry.end - begin)))
    return digest.hexdigest()
