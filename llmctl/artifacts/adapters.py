"""Adapters on loaded models: attach for training, save, or merge for inference (`--adapter PATH` or `PATH=WEIGHT`).

Knows nothing about training. Bases with adapters merged from disk are in `with_adapters.py`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.find import Ability, find_named, require_family
from llmctl.artifacts.hub import in_cache, shown
from llmctl.artifacts.load import Loaded, fitting_tokenizer, without_weights
from llmctl.artifacts.with_adapters import (
    adapt,
    architecture_on,
    check_identity,
    find_base,
    fitted,
    identity_of,
    merged,
)
from llmctl.errors import UsageError
from llmctl.families.published import LARGEST
from llmctl.formats.adapter import ADAPTER_WEIGHTS, Adapter, is_adapter, read_adapter, read_parts
from llmctl.formats.adapter_names import LowRank, architecture_of
from llmctl.formats.adapter_write import write_adapter
from llmctl.formats.artifact import Artifact

if TYPE_CHECKING:
    from llmctl.model.transformer import LanguageModel


def named_adapter(name: str) -> tuple[Adapter, float]:
    """Read the adapter named by `PATH` or `PATH=WEIGHT`; return it with its weight.

    Raises: NotFoundError, ArtifactError; UsageError for a weight that is not a number or a path that is not an adapter.
    """
    target, weight = name, 1.0
    before, equals, after = name.rpartition("=")
    if equals and not Path(name).exists():  # a path may contain `=` itself
        target, weight = before, to_weight(after, name)
    path = find_named(target, "any")
    path = path.parent if path.name == ADAPTER_WEIGHTS else path
    if not is_adapter(path):
        raise UsageError(f"`{shown(path)}` is not an adapter folder", f"to use it as a model, pass -m {target}")
    return read_adapter(path), weight


def to_weight(text: str, name: str) -> float:
    """Parse an adapter's weight.

    Raises: UsageError if it is not a finite number.
    """
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= LARGEST:
        raise UsageError(
            f"`--adapter {name}`: the weight `{text}` is not a finite number", "PATH=0.5 applies half of the adapter"
        )
    return weight


def base_of(names: Sequence[str]) -> Path:
    """Return the path of the first adapter's base model.

    Raises: NotFoundError if adapter or base does not exist; UsageError; ArtifactError.
    """
    return find_base(named_adapter(names[0])[0])


def apply_adapters(loaded: Loaded, names: Sequence[str], *, able: Ability = "any") -> Loaded:
    """Return a new model with the adapters, scaled by their weights, merged into `loaded`.

    An adapter may contain a classification head, a tokenizer or a chat template.
    Raises: NotFoundError, ArtifactError for an adapter of another base, UsageError for adapters that cannot be combined
    or if the result is not `able`.
    """
    if not names:
        return loaded
    artifact = adapt(loaded.artifact, [named_adapter(name) for name in names])
    require_family(artifact.config, able, artifact.path)
    tokenizer = loaded.tokenizer if artifact.files == loaded.artifact.files else fitting_tokenizer(artifact)
    from llmctl.model.quantized import dequantize

    dequantize(loaded.model)  # merged weights do not lie on the base's quantization grid
    state = loaded.model.state_dict()
    state |= merged(state, architecture_on(loaded.artifact, artifact.config), artifact.adapters)
    model = without_weights(artifact.config)
    model.load_state_dict(fitted(state, artifact.config), assign=True)
    model.tie()
    # Computed buffers (sinusoidal positions) are not part of the state; the new model has them on the meta device.
    for name, buffer in loaded.model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    return Loaded(model.eval(), tokenizer, artifact)


def load_adapter(target: "Loaded | LanguageModel", path: Path) -> list[str]:
    """Attach an adapter to a model's layers, unmerged, to continue its training; return the layers' names.

    Raises: NotFoundError; ArtifactError for an adapter of another base, or one with a head that the model lacks.
    """
    from llmctl.model.lora import adapted_kind, adapter_modules, freeze

    adapter = read_adapter(path)
    model = target.model if isinstance(target, Loaded) else target
    assert not adapter_modules(model), "the model has adapters already: merge them first"
    architecture = architecture_of(model.config)
    if isinstance(target, Loaded):
        check_identity(adapter, target.artifact)
        architecture = architecture_on(target.artifact, model.config)
    parts, head = read_parts(adapter, architecture)
    for name, part in parts.items():
        layer = model.get_submodule(name)
        adapted = adapted_kind(layer)(
            layer,  # type: ignore[arg-type]
            rank=part.rank,
            alpha=part.alpha,
            dropout=adapter.dropout,
            dora=adapter.dora,
            rslora=adapter.rslora,
        )
        adapted.lora_A.data.copy_(part.a_RI)
        adapted.lora_B.data.copy_(part.b_OR)
        if adapted.lora_magnitude is not None and part.magnitude_O is not None:
            adapted.lora_magnitude.data.copy_(part.magnitude_O)
        model.set_submodule(name, adapted)
    for name, tensor in head.items():
        model.get_parameter(name).data.copy_(tensor)
    freeze(model)
    return list(parts)


def save_adapter(
    model: "LanguageModel",
    out: Path,
    *,
    base: Artifact,
    provenance: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> Path:
    """Write a model's adapters, and its classification head if it has one, in PEFT's format.

    base: the base model on disk; files: a tokenizer or chat template to store with the adapter.
    Raises: OutputError.
    """
    from llmctl.model.lora import adapter_modules, adapter_state

    modules = adapter_modules(model)
    assert modules, "the model has no adapters"
    first = next(iter(modules.values()))
    published = in_cache(base.path)
    parts = {
        name: LowRank(
            layer.alpha,
            layer.lora_A.detach(),
            layer.lora_B.detach(),
            None if layer.lora_magnitude is None else layer.lora_magnitude.detach(),
        )
        for name, layer in modules.items()
    }
    return write_adapter(
        out,
        architecture_on(base, model.config),
        parts,
        {name: tensor for name, tensor in adapter_state(model).items() if name.rpartition(".")[0] not in modules},
        weights=model.state_dict(),
        base=name_for(base.path, out) if published is None else published.repository,
        revision=None if published is None else published.revision,
        base_sha256=identity_of(base),
        provenance=provenance,
        dropout=first.dropout,
        rslora=first.rslora,
        files=files,
        force=force,
    )


def name_for(base: Path, out: Path) -> str:
    """Return the base's path as an adapter stores it.

    It is relative to the adapter if the base is inside it, or if both are below the working directory, so that they
    can be moved together; otherwise absolute. Links are resolved: `runs/latest` will point elsewhere later.
    """
    cwd, base, out = Path.cwd().resolve(), base.resolve(), out.resolve()
    if base.is_relative_to(out) or (base.is_relative_to(cwd) and out.is_relative_to(cwd)):
        return os.path.relpath(base, out)
    return str(base)
