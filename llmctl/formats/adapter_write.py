"""Write adapters in PEFT's format, so that PEFT loads them onto the published base with the same results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl import __version__
from llmctl.errors import OutputError
from llmctl.families.native import write_fields as native_values
from llmctl.files import atomic_path, json_text, write_bytes, writing
from llmctl.formats.adapter import ADAPTER_WEIGHTS, HEAD_FIELDS, PICKLE, PREFIX
from llmctl.formats.adapter_names import (
    Architecture,
    LowRank,
    PublishedLinear,
    common,
    owners,
    stack,
    target_modules,
)
from llmctl.formats.artifact import ADAPTER_CONFIG, FILES, INDEX, WEIGHTS
from llmctl.formats.artifact_write import refuse_taken
from llmctl.formats.safetensors import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor


def write_adapter(
    out: Path,
    architecture: Architecture,
    parts: Mapping[str, LowRank],
    head: Mapping[str, "Tensor"],
    *,
    weights: Mapping[str, "Tensor"],
    base: str,
    revision: str | None = None,
    base_sha256: str,
    provenance: Mapping[str, Any],
    dropout: float = 0.0,
    rslora: bool = False,
    files: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> Path:
    """Write the adapters of a model's layers (by our names) and the parameters of its head; return `out`.

    architecture: of the adapted model with its head; revision: of a base that is a model of the Hugging Face Hub;
    weights: the frozen weights, used only for the row norms of layers without an adapter that share a fused layer with
    adapted ones (GPT-2 with DoRA). A new folder is created atomically; in an existing one the weights are written last,
    so that an incomplete adapter is never loaded.
    Raises: OutputError if an adapter exists and `force` is not given, or if the disk refuses.
    """
    # Check everything before the first write, including that the folder is not a model's.
    refuse_taken(out, (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLE, *(files or {})), force=force)
    if any((out / name).exists() for name in (WEIGHTS, INDEX)):
        raise OutputError(f"cannot write an adapter to `{out}`: it contains a model", "choose another folder with -o")
    stacked: dict[str, tuple[PublishedLinear, LowRank]] = {}
    for linear in architecture.linears:
        combined = stack(linear, parts, weights, rslora=rslora)
        if combined is not None:
            stacked[linear.path] = (linear, combined)
    published = {name: head[ours] for name, ours in architecture.head.items() if ours in head}
    tensors = factors(stacked) | {PREFIX + name: tensor for name, tensor in published.items()}
    values = settings(architecture, stacked, list(published), base=base, dropout=dropout, rslora=rslora)
    if revision is not None:
        values["revision"] = revision
    metadata = {
        "format": "pt",
        "llmctl.version": __version__,
        "llmctl.provenance": json.dumps(dict(provenance), sort_keys=True, ensure_ascii=False),
        "llmctl.base_sha256": base_sha256,
        "llmctl.ranks": json.dumps({name: part.rank for name, part in parts.items()}, sort_keys=True),
        **(head_metadata(architecture) if published else {}),
    }
    texts = {**(files or {}), ADAPTER_CONFIG: json_text(values).encode()}
    if out.exists():
        # Remove the old weights first: a crash must not leave them with the new settings.
        with writing(out):
            for name in (ADAPTER_WEIGHTS, PICKLE):
                (out / name).unlink(missing_ok=True)
        write_parts(out, texts, tensors, metadata)
        return out
    with atomic_path(out) as temporary:
        write_parts(temporary, texts, tensors, metadata)
    return out


def head_metadata(architecture: Architecture) -> dict[str, str]:
    """Return the description of a classification head, for which PEFT's settings have no fields."""
    values = {name: value for name, value in native_values(architecture.config).items() if name in HEAD_FIELDS}
    return {"llmctl.head": json.dumps(values, sort_keys=True, ensure_ascii=False)}


def write_parts(
    folder: Path, texts: Mapping[str, bytes], tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]
) -> None:
    """Write the small files, then the weights."""
    for name, data in texts.items():
        assert name in FILES or name == ADAPTER_CONFIG, name
        write_bytes(folder / name, data)
    write_safetensors(folder / ADAPTER_WEIGHTS, tensors, metadata)


def factors(stacked: Mapping[str, tuple[PublishedLinear, LowRank]]) -> dict[str, "Tensor"]:
    """Return the tensors by PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for path, (_, part) in stacked.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = part.a_RI
        tensors[f"{PREFIX}{path}.lora_B.weight"] = part.b_OR
        if part.magnitude_O is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = part.magnitude_O
    return tensors


def settings(
    architecture: Architecture,
    stacked: Mapping[str, tuple[PublishedLinear, LowRank]],
    head: Sequence[str],
    *,
    base: str,
    dropout: float,
    rslora: bool,
) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    rank, rank_pattern = common({path: part.rank for path, (_, part) in stacked.items()})
    alpha, alpha_pattern = common({path: part.alpha for path, (_, part) in stacked.items()})
    return {
        "peft_type": "LORA",
        "task_type": task_type(architecture),
        "base_model_name_or_path": base,
        "r": whole_number(rank),
        "lora_alpha": whole_number(alpha),
        "rank_pattern": {path: whole_number(value) for path, value in rank_pattern.items()},
        "alpha_pattern": {path: whole_number(value) for path, value in alpha_pattern.items()},
        "lora_dropout": dropout,
        "target_modules": target_modules(architecture, set(stacked)),
        "modules_to_save": owners(head) or None,
        "bias": "none",
        "fan_in_fan_out": any(linear.is_transposed for linear, _ in stacked.values()),
        "use_dora": any(part.magnitude_O is not None for _, part in stacked.values()),
        "use_rslora": rslora,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def whole_number(value: float) -> float:
    """Convert a float with an integer value to int, as PEFT writes it."""
    return int(value) if value == int(value) else value


def task_type(architecture: Architecture) -> str | None:
    """Return PEFT's name of the task; it has none for masked language modeling."""
    config = architecture.config
    if config.n_labels:
        return "SEQ_CLS"
    if config.family == "encoder":
        return "FEATURE_EXTRACTION" if architecture.family.architecture == "BertModel" else None
    return "CAUSAL_LM" if config.family == "decoder" else "SEQ_2_SEQ_LM"
