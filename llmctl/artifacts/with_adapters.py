"""A base model with adapters merged into its weights, as an `Artifact`: find the base, check it, merge.

Merging, and importing torch, happens only when tensors are requested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.artifacts import hub
from llmctl.artifacts.find import refuse_data
from llmctl.errors import ArtifactError, NotFoundError, UnsupportedModelError, UsageError
from llmctl.formats.adapter import (
    ADAPTER_WEIGHTS,
    Adapter,
    adapted_config,
    fit,
    identity,
    is_adapter,
    read_adapter,
    read_parts,
)
from llmctl.formats.adapter_names import Architecture, LowRank, architecture_of
from llmctl.formats.artifact import Artifact, few, read_artifact
from llmctl.formats.transformers_backend import is_installed, read_through_transformers
from llmctl.model.parameters import parameter_shapes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmctl.config import ModelConfig

Weighted = tuple[Adapter, float]


@dataclass(frozen=True)
class Adapted(Artifact):
    """A base and its adapters, merged when the state is read; `tensors` are the base's."""

    base: Artifact | None = None
    adapters: tuple[Weighted, ...] = ()

    def state(self, dtype: "torch.dtype | None" = None) -> dict[str, "Tensor"]:
        """Return the merged state of `LanguageModel(config)`, rounded once, from float32 to `dtype`."""
        import torch

        assert self.base is not None
        target = dtype or torch.float32
        state = self.base.stored_state()
        state |= merged(state, architecture_on(self.base, self.config), self.adapters, target)
        return {name: tensor.to(target) for name, tensor in fitted(state, self.config).items()}

    def stored_state(self) -> dict[str, "Tensor"]:
        """Return the merged state in the base's stored dtypes."""
        assert self.base is not None
        state = self.base.stored_state()
        return fitted(state | merged(state, architecture_on(self.base, self.config), self.adapters), self.config)


def read_model(path: Path, backend: str = "native") -> Artifact:
    """Read a model folder or file, or an adapter folder as its base with the adapter merged.

    backend: what computes it: llmctl (native), transformers, or auto: transformers for what llmctl does not read.
    Raises: NotFoundError, also if the base does not exist; UsageError for a data file; ArtifactError.
    """
    if path.exists():
        refuse_data(path)
    if backend == "transformers":
        return read_through_transformers(path)
    try:
        return read_chain(path, ())
    except UnsupportedModelError:
        if backend != "auto" or not path.is_dir() or is_adapter(path) or not is_installed():
            raise
        return read_through_transformers(path)


def read_chain(path: Path, above: tuple[Path, ...]) -> Artifact:
    """Read a model whose base may itself be an adapter; `above` are the adapters already visited."""
    path = path.parent if path.name == ADAPTER_WEIGHTS else path
    if not is_adapter(path):
        return read_artifact(path)
    if path.resolve() in above:
        raise ArtifactError(
            f"the adapter `{path}` is its own base, through a chain of {len(above)} adapters",
            "correct `base_model_name_or_path` in its adapter_config.json",
        )
    adapter = read_adapter(path)
    return adapt(read_chain(find_base(adapter), (*above, path.resolve())), [(adapter, 1.0)])


def find_base(adapter: Adapter) -> Path:
    """Find an adapter's base: its path may be relative to the adapter's folder or the working directory, or be `org/name`.

    Raises: NotFoundError naming the missing base, and what `hub.find` raises.
    """
    hint = f"pass the base: -m BASE --adapter {adapter.path}"
    if not adapter.base:
        raise NotFoundError(f"the adapter `{adapter.path}` does not name its base", hint)
    cwd = Path.cwd()
    # Joining with an absolute path yields that path.
    for candidate in (adapter.path / adapter.base, cwd / adapter.base):
        if candidate.exists():
            resolved = candidate.resolve()
            return resolved.relative_to(cwd) if resolved.is_relative_to(cwd) else resolved
    # Ours name the revision of a base on the Hub: without one it was a folder, which no stranger's model may replace.
    may_be_published = bool(adapter.revision) or not adapter.base_sha256
    reference = hub.parse(f"{adapter.base}@{adapter.revision or 'main'}") if may_be_published else None
    if reference is not None:
        try:
            return hub.find(reference)
        except NotFoundError as error:
            raise NotFoundError(f"the base of the adapter `{adapter.path}`: {error}", error.hint) from None
    raise NotFoundError(f"`{adapter.base}`, the base of the adapter `{adapter.path}`, does not exist", hint)


def adapt(base: Artifact, adapters: Sequence[Weighted]) -> Adapted:
    """Combine a base with adapters, after every check that does not read weights.

    Raises: ArtifactError for an adapter of another base; UsageError for adapters that cannot be combined.
    """
    check_together(adapters)
    config = base.config
    # An adapter with a classification head changes the config, and with it the layers that the others must fit.
    for adapter, _ in adapters:
        check_identity(adapter, base)
        config = adapted_config(adapter, base) if adapter.whole else config
    architecture = architecture_on(base, config)
    for adapter, _ in adapters:
        fit(adapter, architecture)
    check_complete(base, architecture, adapters)
    family = architecture.family
    hf = {"architectures": [family.architecture], "model_type": family.model_type} | family.write_config(config)
    all_files = (base.files, *(adapter.files for adapter, _ in adapters))
    files = {name: data for part in all_files for name, data in part.items()}  # an adapter's files replace the base's
    names = [{"name": a.path.resolve().name, "weight": weight, **a.provenance} for a, weight in adapters]
    return Adapted(
        path=adapters[-1][0].path,
        architecture=family.architecture,
        config=config,
        files=files,
        provenance={**base.provenance, "adapters": [*base.provenance.get("adapters", []), *names]},
        metadata=base.metadata,
        hf=base.hf if config == base.config else hf,
        tensors=base.tensors,
        base=base,
        adapters=tuple(adapters),
    )


def check_identity(adapter: Adapter, base: Artifact) -> None:
    """Check that an adapter that records the digest of its base's weights is used with those weights.

    Raises: ArtifactError.
    """
    if adapter.base_sha256 in ("", identity_of(base)):
        return
    try:
        is_named = find_base(adapter).samefile(base.path)
    except (NotFoundError, OSError):
        is_named = False
    raise ArtifactError(
        f"the adapter `{adapter.path}` was trained on weights other than those of `{base.path}`",
        "the base has changed since: restore its weights, or train the adapter again"
        if is_named
        else f"use its own base, `{adapter.base}`",
    )


def architecture_on(base: Artifact, config: "ModelConfig") -> Architecture:
    """Return the architecture of a config: the base's own, unless a classification head was added."""
    same = (config.n_labels, config.head) == (base.config.n_labels, base.config.head)
    return architecture_of(config, base.family if same else None)


def check_together(adapters: Sequence[Weighted]) -> None:
    """Check that adapters can be summed: DoRA magnitudes and classification heads cannot.

    Raises: UsageError naming an adapter that cannot.
    """
    with_head = [adapter for adapter, _ in adapters if adapter.whole]
    if len(with_head) > 1:
        raise UsageError(
            f"`{with_head[0].path}` and `{with_head[1].path}` both contain a classification head", "use one of them"
        )
    for adapter, weight in adapters:
        if adapter.dora and len(adapters) > 1:
            raise UsageError(f"`{adapter.path}` is a DoRA adapter, which cannot be combined", "use it alone")
        if weight != 1 and (adapter.dora or adapter.whole):
            kind = "is a DoRA adapter" if adapter.dora else "contains a classification head"
            raise UsageError(
                f"`{adapter.path}` {kind}, so its weight must be 1, not {weight:g}", f"--adapter {adapter.path}"
            )


def check_complete(base: Artifact, architecture: Architecture, adapters: Sequence[Weighted]) -> None:
    """Check that base and adapters together contain the complete classification head.

    Raises: ArtifactError naming the missing tensors.
    """
    provided = {name for adapter, _ in adapters for name in adapter.whole}
    known = parameter_shapes(base.config)
    missing = [name for name, ours in architecture.head.items() if ours not in known and name not in provided]
    if missing:
        raise ArtifactError(
            f"neither `{base.path}` nor the adapter `{adapters[-1][0].path}` contains {few(missing)}",
            "use a base with a classification head, or save the adapter with the head in modules_to_save",
        )


def identity_of(artifact: Artifact) -> str:
    """Return a digest of a model's weights, including merged adapters."""
    if not isinstance(artifact, Adapted) or artifact.base is None:
        return identity(artifact.tensors)
    digest = sha256(identity_of(artifact.base).encode())
    for adapter, weight in artifact.adapters:
        file = adapter.path / ADAPTER_WEIGHTS
        tensors = {name: (file, name, entry) for name, entry in adapter.header.tensors.items()}
        digest.update(f"{weight} {identity(tensors)}".encode())
    return digest.hexdigest()


def merged(
    state: Mapping[str, "Tensor"],
    architecture: Architecture,
    adapters: Sequence[Weighted],
    dtype: "torch.dtype | None" = None,
) -> dict[str, "Tensor"]:
    """Return the parameters that adapters change, in `dtype` or their own dtype; sums use at least float32."""
    import torch

    from llmctl.model.lora import merge, scale_of

    sums: dict[str, list[tuple[LowRank, float]]] = {}
    head: dict[str, Tensor] = {}
    for adapter, weight in adapters:
        parts, whole = read_parts(adapter, architecture)
        head |= whole
        for module, part in parts.items():
            factor = weight * scale_of(part.rank, part.alpha, rslora=adapter.rslora)
            sums.setdefault(module + ".weight", []).append((part, factor))
    changed: dict[str, Tensor] = {}
    # All adapters of a weight are summed before it is rounded to its dtype, once.
    for name, layer_parts in sums.items():
        before = state[name]
        total = before.to(torch.promote_types(before.dtype, torch.float32))
        for part, factor in layer_parts:
            magnitude = None if part.magnitude_O is None else part.magnitude_O.to(before.device)
            total = merge(total, part.a_RI.to(before.device), part.b_OR.to(before.device), factor, magnitude)
        changed[name] = total.to(dtype or before.dtype)
    like = state["model.embed_tokens.weight"]
    return changed | {name: tensor.to(like.device, dtype or like.dtype) for name, tensor in head.items()}


def fitted(state: Mapping[str, "Tensor"], config: "ModelConfig") -> dict[str, "Tensor"]:
    """Keep only the parameters of this config: a classifier drops the base's vocabulary head."""
    return {name: state[name] for name in parameter_shapes(config)}
