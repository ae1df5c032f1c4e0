"""Adapters on loaded models: put on for training, saved, or merged for use (`--adapter PATH` or `PATH=WEIGHT`).

Knows nothing of how an adapter is trained. What finds and merges one on disk is `adapted.py`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.find import Ability, find_named, require_family
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
from llmctl.formats.adapter import ADAPTER_WEIGHTS, Adapter, is_adapter, read_adapter, read_parts
from llmctl.formats.adapter_names import LowRank, architecture_of
from llmctl.formats.adapter_write import write_adapter
from llmctl.formats.artifact import Artifact

if TYPE_CHECKING:
    from llmctl.model.transformer import LanguageModel


def named_adapter(name: str) -> tuple[Adapter, float]:
    """Return the adapter that `PATH` or `PATH=WEIGHT` means, and its weight.

    Raises: NotFoundError, ArtifactError; UsageError for a weight that is no number, or a model that is no adapter.
    """
    place, weight = name, 1.0
    before, sign, after = name.rpartition("=")
    if sign and not Path(name).exists():
        place, weight = before, to_weight(after, name)
    path = find_named(place, "any")
    path = path.parent if path.name == ADAPTER_WEIGHTS else path
    if not is_adapter(path):
        raise UsageError(f"`{path}` is no adapter's folder", f"a model is named with -m: -m {path}")
    return read_adapter(path), weight


def to_weight(text: str, name: str) -> float:
    """Return a weight.

    Raises: UsageError for what is no finite number.
    """
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"`--adapter {name}` has the weight `{text}`", "PATH=0.5 takes half of what an adapter adds")
    return weight


def base_of(names: Sequence[str]) -> Path:
    """Return the base that the first of these adapters names.

    Raises: NotFoundError, also when the base is not there; UsageError; ArtifactError.
    """
    return find_base(named_adapter(names[0])[0])


def apply_adapters(loaded: Loaded, names: Sequence[str], *, able: Ability = "any") -> Loaded:
    """Return the model with adapters merged into its weights, each times its weight; the one given stays as it is.

    An adapter may bring a classification head, a tokenizer, a chat template.
    Raises: NotFoundError, ArtifactError for one of another base, UsageError for ones that cannot be combined or make
    of the model what is not `able`.
    """
    if not names:
        return loaded
    artifact = adapt(loaded.artifact, [named_adapter(name) for name in names])
    require_family(artifact.config, able, artifact.path)
    tokenizer = loaded.tokenizer if artifact.files == loaded.artifact.files else fitting_tokenizer(artifact)
    loaded.model.multiply_out()  # a sum has other codes than the base
    state = loaded.model.state_dict()
    state |= merged(state, architecture_on(loaded.artifact, artifact.config), artifact.adapters)
    model = without_weights(artifact.config)
    model.load_state_dict(fitted(state, artifact.config), assign=True)
    model.tie()
    for name, buffer in loaded.model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    return Loaded(model.eval(), tokenizer, artifact)


def load_adapter(target: "Loaded | LanguageModel", path: Path) -> list[str]:
    """Put an adapter on a model's layers, unmerged and ready to be trained on, and return the layers' names.

    Raises: NotFoundError; ArtifactError for an adapter of another base, or one whose head the model does not have.
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
    """Write the adapters on a model's layers, and its classification head if it has one, as PEFT reads them.

    base: the model on disk whose weights lie under the adapters; files: a tokenizer or chat template to go with it.
    Raises: OutputError.
    """
    from llmctl.model.lora import adapter_modules, adapter_state

    modules = adapter_modules(model)
    assert modules, "the model has no adapters"
    first = next(iter(modules.values()))
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
        base=name_for(base.path, out),
        base_sha256=identity_of(base),
        provenance=provenance,
        dropout=first.dropout,
        rslora=first.rslora,
        files=files,
        force=force,
    )


def name_for(base: Path, out: Path) -> str:
    """Return how an adapter names its base: from its own folder where it lies in it or both under here, else in full.

    What is moved together stays together; links such as `runs/latest` will mean another model one day.
    """
    here, base, out = Path.cwd().resolve(), base.resolve(), out.resolve()
    if base.is_relative_to(out) or (base.is_relative_to(here) and out.is_relative_to(here)):
        return os.path.relpath(base, out)
    return str(base)
