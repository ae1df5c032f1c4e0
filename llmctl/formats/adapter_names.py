"""Which linear maps a published model has, under what paths, and how PEFT is told of some of them.

PEFT names a layer by its path in the published architecture. Where that architecture keeps several of our layers in
one (GPT-2's `c_attn`), one adapter there is several here: `split` and `stack` go between them without changing what
is computed. Knows nothing of files.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.formats.families.family import FamilyFormat
from llmctl.formats.families.table import family_for
from llmctl.model.parameters import parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

NOT_ADAPTED = (
    *("lm_head", "embed_tokens", "embed_positions", "embed_token_types", "query_embeddings"),
    "relative_bias",
)
"""Modules of ours with a matrix that take no adapter."""
UNSEEN = ("pooler.dense", "bert.pooler.dense", "cls.seq_relationship", "cls.predictions.decoder", "lm_head")
"""Modules of published architectures that our models do not have; no pattern of ours may select one."""

POOLER = "pooler.dense"
"""BERT's layer for sentence pairs, which our models leave out where they are no classifiers."""
BODIES = ("model.", "transformer.", "bert.")
"""Prefixes of the body in a model with a head."""
SIMPLE = re.compile(r"[\w.\\^$-]{1,200}([*+][\w.\\^$-]{0,200})?", re.ASCII)
"""Regular expressions with one repetition at most."""


@dataclass(frozen=True)
class Place:
    """A linear map of a published model: its path there, and the layers of ours that it holds one above the other.

    sizes: rows of each of those layers; n_in: columns.
    """

    path: str
    modules: tuple[str, ...]
    sizes: tuple[int, ...]
    n_in: int
    is_transposed: bool = False


@dataclass(frozen=True)
class LowRank:
    """The adapter of one layer: scale * B A, scale being alpha / rank or, with rsLoRA, alpha / sqrt(rank).

    Shapes: a_RI, b_OR, and magnitude_O with DoRA.
    """

    alpha: float
    a_RI: "Tensor"
    b_OR: "Tensor"
    magnitude_O: "Tensor | None" = None

    @property
    def rank(self) -> int:
        """The rank of the two factors."""
        return self.a_RI.shape[0]


@dataclass(frozen=True)
class Architecture:
    """A complete config and the family that publishes it."""

    config: ModelConfig
    family: FamilyFormat

    @cached_property
    def places(self) -> list[Place]:
        """The linear maps that can have an adapter."""
        shapes = parameter_shapes(self.config)
        found = []
        for stored in self.family.layout(self.config):
            if stored.name.endswith(".weight") and all(is_linear(name, shapes) for name in stored.holds):
                modules = tuple(name.removesuffix(".weight") for name in stored.holds)
                sizes, n_in = tuple(shapes[name][0] for name in stored.holds), shapes[stored.holds[0]][1]
                path, is_transposed = stored.name.removesuffix(".weight"), stored.layout == "transposed"
                found.append(Place(path, modules, sizes, n_in, is_transposed))
        return found

    @cached_property
    def head(self) -> dict[str, str]:
        """Published name -> our name of the parameters of a classification head."""
        if not self.config.n_labels:
            return {}
        stored = self.family.layout(self.config)
        return {one.name: one.holds[0] for one in stored if one.holds[0].startswith("classifier")}


def architecture_of(config: ModelConfig, family: FamilyFormat | None = None) -> Architecture:
    """Return the architecture of a config; `family` where it is known."""
    return Architecture(config, family or family_for(config))


def is_linear(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether a parameter is the weight of a linear layer that can have an adapter."""
    owner = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and len(shapes[name]) == 2 and owner not in NOT_ADAPTED


def by_path(found: Iterable[Place]) -> dict[str, Place]:
    """Return the places by their paths, and by what these are in the bare model without a head."""
    table = {place.path: place for place in found}
    return {bare(path): place for path, place in table.items()} | table


def look_up(table: Mapping[str, Place], path: str) -> Place | None:
    """Return the place that a path means, also where it has a prefix that the base, saved without a head, lacks."""
    return table.get(path) or table.get(bare(path))


def bare(path: str) -> str:
    """Return a path without what a model with a head puts before those of its body."""
    return next((path.removeprefix(body) for body in BODIES if path.startswith(body)), path)


def target_modules(architecture: Architecture, chosen: Collection[str]) -> list[str]:
    """Return the shortest names by whose ends PEFT selects exactly these paths, whole paths where none would."""
    paths = [stored.name.rpartition(".")[0] for stored in architecture.family.layout(architecture.config)]
    parents = {path[: dot.start()] for path in paths for dot in re.finditer(r"\.", path)}
    others = ({*paths, *parents, *UNSEEN}) - set(chosen)
    return sorted({shortest_end(path, others) for path in chosen})


def shortest_end(path: str, others: Collection[str]) -> str:
    """Return the shortest end of a path that no other path has, the number of a layer left out; else the path."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if parts[-count].isdigit():
            break
        if not any(other == end or other.endswith("." + end) for other in others):
            return end
    return path


def common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the value that most paths have and, as PEFT's `*_pattern`, those that differ: by last name if that does.

    A key of a pattern matches the end of a path.
    """
    usual = Counter(values.values()).most_common(1)[0][0]
    leaves: dict[str, set[float]] = {}
    for path, value in values.items():
        leaves.setdefault(path.rpartition(".")[2], set()).add(value)
    pattern = {}
    for path, value in values.items():
        leaf = path.rpartition(".")[2]
        if len(leaves[leaf]) > 1:
            pattern[path] = value
        elif value != usual:
            pattern[leaf] = value
    return usual, {path: value for path, value in pattern.items() if value != usual}


def compiled(pattern: Mapping[str, Any], where: str) -> list[tuple[re.Pattern[str], Any]]:
    """Return a PEFT pattern ready for matching: its keys match the end of a path.

    Raises: ArtifactError for a key that is no simple regular expression: others can take forever to match.
    """
    ready = []
    for key, value in pattern.items():
        if not SIMPLE.fullmatch(key):
            raise ArtifactError(f"`{where}` has the key `{key[:80]}`, which llmctl does not read")
        try:
            ready.append((re.compile(rf"(.*\.)?({key})$"), value))
        except re.error as error:
            raise ArtifactError(f"`{where}` has the key `{key[:80]}`: {error}") from error
    return ready


def from_pattern(pattern: Iterable[tuple[re.Pattern[str], Any]], path: str) -> Any:
    """Return the value of the first key that matches a path, or None."""
    return next((value for key, value in pattern if key.match(path)), None)


def split(place: Place, adapter: LowRank, ranks: Mapping[str, int], *, rslora: bool) -> dict[str, LowRank]:
    """Return the adapters of the layers that a place holds.

    Each takes its rows of B, all of A; where the place was stacked here (`ranks` of its layers) and the rest is
    zero, its own part of both, as it was. What DoRA divides by is a row's length, so rows can be parted.
    """
    import torch

    if len(place.modules) == 1:
        return {place.modules[0]: adapter}
    rows = torch.split(adapter.b_OR, list(place.sizes))
    lengths = [None] * len(rows) if adapter.magnitude_O is None else torch.split(adapter.magnitude_O, list(place.sizes))
    own = [ranks.get(module, 0) for module in place.modules]
    if sum(own) == adapter.rank and min(own) >= 0:
        blocks = [torch.split(part, own, dim=1) for part in rows]
        if not any(block.any() for i, part in enumerate(blocks) for j, block in enumerate(part) if i != j):
            factors = torch.split(adapter.a_RI, own)
            return {
                module: LowRank(portion(adapter, rank, rslora=rslora), factors[i], blocks[i][i], lengths[i])
                for i, (module, rank) in enumerate(zip(place.modules, own, strict=True))
                if rank
            }
    return {
        module: LowRank(adapter.alpha, adapter.a_RI, part, length)
        for module, part, length in zip(place.modules, rows, lengths, strict=True)
    }


def portion(adapter: LowRank, rank: int, *, rslora: bool) -> float:
    """Return the alpha that gives a smaller rank the same scale."""
    share = rank / adapter.rank
    return adapter.alpha * (share**0.5 if rslora else share)


def stack(
    place: Place, adapters: Mapping[str, LowRank], weights: Mapping[str, "Tensor"], *, rslora: bool
) -> LowRank | None:
    """Return one adapter for all layers of a place, or None where none of them has one: A stacked, B block-diagonal.

    A layer without one gets rows of zeros and, with DoRA, the lengths of its own weight from `weights`.
    """
    import torch

    present = [(module, adapters[module]) for module in place.modules if module in adapters]
    if not present:
        return None
    if len(place.modules) == 1:
        return present[0][1]
    first = present[0][1]
    rank = sum(adapter.rank for _, adapter in present)
    alpha = first.alpha * ((rank / first.rank) ** 0.5 if rslora else rank / first.rank)
    blocks, lengths = [], []
    for module, size in zip(place.modules, place.sizes, strict=True):
        adapter = adapters.get(module)
        block_OR = first.b_OR.new_zeros(size, 0)
        if adapter is not None:
            ratio = scale(adapter, rslora=rslora) / scale(first, rslora=rslora)
            block_OR = adapter.b_OR if ratio == 1 else adapter.b_OR * ratio
        blocks.append(block_OR)
        if first.magnitude_O is not None:
            own = None if adapter is None else adapter.magnitude_O
            lengths.append(weights[module + ".weight"].norm(dim=1).to(first.magnitude_O) if own is None else own)
    a_RI = torch.cat([adapter.a_RI for _, adapter in present])
    return LowRank(alpha, a_RI, torch.block_diag(*blocks), torch.cat(lengths) if lengths else None)


def scale(adapter: LowRank, *, rslora: bool) -> float:
    """Return the factor on B A."""
    return adapter.alpha / (adapter.rank**0.5 if rslora else adapter.rank)


def owners(names: Sequence[str]) -> list[str]:
    """Return the modules that parameters belong to, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
