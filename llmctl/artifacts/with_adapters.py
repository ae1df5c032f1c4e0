"""A base with adapters merged into its weights, as a model like any other: find the base, check it, merge.

Nothing is merged, and torch is not loaded, until tensors are asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.errors import ArtifactError, NotFoundError, UsageError
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
from llmctl.model.parameters import parameter_shapes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmctl.config import ModelConfig

Weighted = tuple[Adapter, float]


@dataclass(frozen=True)
class Adapted(Artifact):
    """A base and the adapters that its weights are read with; `tensors` are the base's."""

    base: Artifact | None = None
    adapters: tuple[Weighted, ...] = ()

    def state(self, dtype: "torch.dtype | None" = None) -> dict[str, "Tensor"]:
        """Return the merged state of `LanguageModel(config)`, rounded once: from float32 to the dtype asked for."""
        import torch

        assert self.base is not None
        wanted = dtype or torch.float32
        state = self.base.stored_state()
        state |= merged(state, architecture_on(self.base, self.config), self.adapters, wanted)
        return {name: tensor.to(wanted) for name, tensor in fitted(state, self.config).items()}

    def stored_state(self) -> dict[str, "Tensor"]:
        """Return the merged state in the dtypes that the base has on disk."""
        assert self.base is not None
        state = self.base.stored_state()
        return fitted(state | merged(state, architecture_on(self.base, self.config), self.adapters), self.config)


def read_model(path: Path) -> Artifact:
    """Read a model's folder or file, or an adapter's folder as its base with the adapter in it.

    Raises: NotFoundError, also when the base is not there; ArtifactError.
    """
    return read_chain(path, ())


def read_chain(path: Path, above: tuple[Path, ...]) -> Artifact:
    """Read a model whose base may be an adapter of another; `above` are those that led here."""
    path = path.parent if path.name == ADAPTER_WEIGHTS else path
    if not is_adapter(path):
        return read_artifact(path)
    if path.resolve() in above:
        raise ArtifactError(f"the adapter `{path}` is, over {len(above)} adapters, its own base")
    adapter = read_adapter(path)
    return adapt(read_chain(find_base(adapter), (*above, path.resolve())), [(adapter, 1.0)])


def find_base(adapter: Adapter) -> Path:
    """Return the place of an adapter's base: as it says, from its own folder, or from here.

    Raises: NotFoundError saying which base, and how to name it.
    """
    hint = f"-m BASE --adapter {adapter.path}"
    if not adapter.base:
        raise NotFoundError(f"the adapter `{adapter.path}` does not say what its base is", hint)
    here = Path.cwd()
    # An absolute path stays itself when joined to another.
    for place in (adapter.path / adapter.base, here / adapter.base):
        if place.exists():
            whole = place.resolve()
            return whole.relative_to(here) if whole.is_relative_to(here) else whole
    raise NotFoundError(f"`{adapter.base}`, the base of the adapter `{adapter.path}`, is not there", hint)


def adapt(base: Artifact, adapters: Sequence[Weighted]) -> Adapted:
    """Return a base with adapters, everything checked that can be without reading weights.

    Raises: ArtifactError for an adapter of another base; UsageError for adapters that cannot be combined.
    """
    check_together(adapters)
    config = base.config
    for adapter, _ in adapters:
        check_identity(adapter, base)
        config = adapted_config(adapter, base) if adapter.whole else config
    architecture = architecture_on(base, config)
    for adapter, _ in adapters:
        fit(adapter, architecture)
    check_complete(base, architecture, adapters)
    family = architecture.family
    hf = {"architectures": [family.architecture], "model_type": family.model_type} | family.write_config(config)
    files = {name: data for files in (base.files, *(one.files for one, _ in adapters)) for name, data in files.items()}
    names = [{"name": one.path.resolve().name, "weight": weight, **one.provenance} for one, weight in adapters]
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
    """Check that an adapter that says of which weights it is gets these.

    Raises: ArtifactError.
    """
    if adapter.base_sha256 in ("", identity_of(base)):
        return
    try:
        is_named = find_base(adapter).samefile(base.path)
    except (NotFoundError, OSError):
        is_named = False
    raise ArtifactError(
        f"the adapter `{adapter.path}` was trained on other weights than those of `{base.path}`",
        "they have changed since: bring the old ones back, or train the adapter again"
        if is_named
        else f"it names its base: `{adapter.base}`",
    )


def architecture_on(base: Artifact, config: "ModelConfig") -> Architecture:
    """Return the architecture of a config on a base: the base's own unless a classification head was put on."""
    return architecture_of(config, base.family if config.n_labels == base.config.n_labels else None)


def check_together(adapters: Sequence[Weighted]) -> None:
    """Check that adapters can be added up: lengths of rows and heads over labels cannot.

    Raises: UsageError naming the one that cannot.
    """
    with_head = [adapter for adapter, _ in adapters if adapter.whole]
    if len(with_head) > 1:
        raise UsageError(f"`{with_head[0].path}` and `{with_head[1].path}` each bring a classification head")
    for adapter, weight in adapters:
        if adapter.dora and len(adapters) > 1:
            raise UsageError(f"`{adapter.path}` is a DoRA adapter, which cannot be added to others", "use it alone")
        if weight != 1 and (adapter.dora or adapter.whole):
            kind = "is a DoRA adapter" if adapter.dora else "brings a classification head"
            raise UsageError(f"`{adapter.path}` {kind}, which takes no weight but 1, not {weight:g}")


def check_complete(base: Artifact, architecture: Architecture, adapters: Sequence[Weighted]) -> None:
    """Check that base and adapters together have the whole classification head.

    Raises: ArtifactError naming what is in neither.
    """
    there = {name for adapter, _ in adapters for name in adapter.whole}
    known = parameter_shapes(base.config)
    missing = [name for name, ours in architecture.head.items() if ours not in known and name not in there]
    if missing:
        raise ArtifactError(
            f"neither `{base.path}` nor the adapter `{adapters[-1][0].path}` has {few(missing)}",
            "a base with the whole classification head has; or save the adapter with it in modules_to_save",
        )


def identity_of(artifact: Artifact) -> str:
    """Return what tells a model's weights from others; merged adapters belong to them."""
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
    """Return the parameters that adapters change, in `dtype` or the state's own; sums are taken in float32 at least."""
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
    for name, parts_of_one in sums.items():
        before = state[name]
        total = before.to(torch.promote_types(before.dtype, torch.float32))
        for part, factor in parts_of_one:
            lengths = None if part.magnitude_O is None else part.magnitude_O.to(before.device)
            total = merge(total, part.a_RI.to(before.device), part.b_OR.to(before.device), factor, lengths)
        changed[name] = total.to(dtype or before.dtype)
    like = state["model.embed_tokens.weight"]
    return changed | {name: tensor.to(like.device, dtype or like.dtype) for name, tensor in head.items()}


def fitted(state: Mapping[str, "Tensor"], config: "ModelConfig") -> dict[str, "Tensor"]:
    """Return the parameters of this config alone: without the head over the vocabulary that a classifier lacks."""
    return {name: state[name] for name in parameter_shapes(config)}
