"""The linear layers of published architectures and how PEFT's settings select them.

PEFT names a layer by its path in the published architecture. If that architecture fuses several of our layers into one
(GPT-2's `c_attn`), one PEFT adapter corresponds to several of ours; `split` and `stack` convert between the two without
changing the result. Knows nothing about files.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import FORMS, Heads
from llmctl.families.table import family_for
from llmctl.model.parameters import IN_EXPERTS, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

NOT_ADAPTED = (
    *("lm_head", "embed_tokens", "embed_positions", "embed_distances", "embed_token_types", "query_embeddings"),
    *("relative_bias", "router"),
)
"""Our modules with a weight matrix that cannot have an adapter."""
UNSEEN = ("pooler.dense", "bert.pooler.dense", "cls.seq_relationship", "cls.predictions.decoder", "lm_head")
"""Modules of published architectures that our models lack; the `target_modules` we write must not match them."""

POOLER = "pooler.dense"
"""BERT's layer for sentence pairs, which our models have only if they are classifiers."""
BODIES = ("model.", "transformer.", "bert.")
"""Prefixes of the body in a model with a head."""
SIMPLE = re.compile(r"[\w.\\^$-]{1,200}([*+][\w.\\^$-]{0,200})?", re.ASCII)
"""Regular expressions with at most one repetition: these cannot take exponential time to match."""


@dataclass(frozen=True)
class PublishedLinear:
    """A linear layer of a published model: its path, and our layers that it contains, stacked along the outputs.

    sizes: output rows of each of our layers; n_in: inputs. form, heads: the order of the rows, see `FORMS`.
    """

    path: str
    modules: tuple[str, ...]
    sizes: tuple[int, ...]
    n_in: int
    is_transposed: bool = False
    form: str = "plain"
    heads: Heads = Heads()

    def reordered(self, adapter: "LowRank", *, writing: bool = False) -> "LowRank":
        """Return an adapter of the published layer with its rows in our order, or the other way round."""
        if self.form == "plain":
            return adapter
        form = FORMS[self.form]
        move = form.write if writing else form.read
        magnitude_O = None if adapter.magnitude_O is None else move(adapter.magnitude_O, self.heads)
        return replace(adapter, b_OR=move(adapter.b_OR, self.heads), magnitude_O=magnitude_O)


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
    def linears(self) -> list[PublishedLinear]:
        """The linear layers that can have an adapter."""
        shapes = parameter_shapes(self.config)
        linears = []
        for stored in self.family.layout(self.config):
            if stored.name.endswith(".weight") and all(is_linear(name, shapes) for name in stored.holds):
                modules = tuple(name.removesuffix(".weight") for name in stored.holds)
                sizes, n_in = tuple(shapes[name][0] for name in stored.holds), shapes[stored.holds[0]][1]
                path, is_transposed = stored.name.removesuffix(".weight"), stored.form == "transposed"
                form = "plain" if is_transposed else stored.form
                linears.append(PublishedLinear(path, modules, sizes, n_in, is_transposed, form, stored.heads))
        return linears

    @cached_property
    def head(self) -> dict[str, str]:
        """Published name -> our name of the classification head's parameters; empty without a head."""
        if not self.config.n_labels:
            return {}
        layout = self.family.layout(self.config)
        return {stored.name: stored.holds[0] for stored in layout if stored.holds[0].startswith("classifier")}


def architecture_of(config: ModelConfig, family: FamilyFormat | None = None) -> Architecture:
    """Return the architecture of a config, of the given family or the one that publishes such models."""
    return Architecture(config, family or family_for(config))


def is_linear(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether a parameter is the weight of an adaptable linear layer."""
    owner = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and len(shapes[name]) == 2 and owner not in NOT_ADAPTED and IN_EXPERTS not in name


def by_path(linears: Iterable[PublishedLinear]) -> dict[str, PublishedLinear]:
    """Index layers by path, with and without the body's prefix."""
    table = {linear.path: linear for linear in linears}
    return {bare(path): linear for path, linear in table.items()} | table


def look_up(table: Mapping[str, PublishedLinear], path: str) -> PublishedLinear | None:
    """Return the layer at a path, even if the path has a body prefix that the base, saved without a head, lacks."""
    return table.get(path) or table.get(bare(path))


def bare(path: str) -> str:
    """Return a path without the body's prefix."""
    return next((path.removeprefix(body) for body in BODIES if path.startswith(body)), path)


def target_modules(architecture: Architecture, chosen: Collection[str]) -> list[str]:
    """Return the shortest suffixes by which PEFT selects exactly these paths, or full paths if no suffix does."""
    paths = [stored.name.rpartition(".")[0] for stored in architecture.family.layout(architecture.config)]
    parents = {path[: dot.start()] for path in paths for dot in re.finditer(r"\.", path)}
    # PEFT matches suffixes of all module paths, including parents and modules that our models do not have.
    others = ({*paths, *parents, *UNSEEN}) - set(chosen)
    return sorted({shortest_suffix(path, others) for path in chosen})


def shortest_suffix(path: str, others: Collection[str]) -> str:
    """Return the shortest suffix of a path, without its layer number, that no other path has; else the path."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        suffix = ".".join(parts[-count:])
        if parts[-count].isdigit():
            break
        if not any(other == suffix or other.endswith("." + suffix) for other in others):
            return suffix
    return path


def common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the most common value and, as PEFT's `*_pattern`, the values of all other paths.

    A pattern's key matches the end of a path: the last name if all its layers agree, else the full path.
    """
    # PEFT has one default value, and patterns for exceptions.
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
    """Compile the keys of a PEFT pattern, which match the end of a path.

    Raises: ArtifactError for a key with more than one repetition, which could take exponential time to match.
    """
    rules = []
    for key, value in pattern.items():
        if not SIMPLE.fullmatch(key):
            raise ArtifactError(
                f"`{where}` has the key `{key[:80]}`, which llmctl does not read",
                "write layer names, or regular expressions with at most one repetition",
            )
        try:
            rules.append((re.compile(rf"(.*\.)?({key})$"), value))  # PEFT's rule: the key matches a whole suffix
        except re.error as error:
            raise ArtifactError(
                f"`{where}` has the key `{key[:80]}`, which is not a regular expression: {error}", "correct the key"
            ) from error
    return rules


def from_pattern(pattern: Iterable[tuple[re.Pattern[str], Any]], path: str) -> Any:
    """Return the value of the first key that matches a path, or None."""
    return next((value for key, value in pattern if key.match(path)), None)


def split(linear: PublishedLinear, adapter: LowRank, ranks: Mapping[str, int], *, rslora: bool) -> dict[str, LowRank]:
    """Split an adapter of a fused layer into adapters of our layers.

    Each gets its rows of B and all of A. If `stack` made the adapter (`ranks` of our layers, B block-diagonal), each
    gets back exactly its own factors. DoRA can be split by rows, since it normalizes each row separately.
    """
    import torch

    adapter = linear.reordered(adapter)
    if len(linear.modules) == 1:
        return {linear.modules[0]: adapter}
    sizes = list(linear.sizes)
    rows = torch.split(adapter.b_OR, sizes)
    magnitudes = [None] * len(rows) if adapter.magnitude_O is None else torch.split(adapter.magnitude_O, sizes)
    own = [ranks.get(module, 0) for module in linear.modules]
    if sum(own) == adapter.rank and min(own) >= 0:
        blocks = [torch.split(part, own, dim=1) for part in rows]
        # Further training in PEFT fills the off-diagonal blocks; then every layer needs the full rank.
        if not any(block.any() for i, part in enumerate(blocks) for j, block in enumerate(part) if i != j):
            factors = torch.split(adapter.a_RI, own)
            return {
                module: LowRank(portion(adapter, rank, rslora=rslora), factors[i], blocks[i][i], magnitudes[i])
                for i, (module, rank) in enumerate(zip(linear.modules, own, strict=True))
                if rank
            }
    return {
        module: LowRank(adapter.alpha, adapter.a_RI, part, magnitude)
        for module, part, magnitude in zip(linear.modules, rows, magnitudes, strict=True)
    }


def portion(adapter: LowRank, rank: int, *, rslora: bool) -> float:
    """Return the alpha with which a smaller rank has the same scale."""
    share = rank / adapter.rank
    return adapter.alpha * (share**0.5 if rslora else share)


def stack(
    linear: PublishedLinear, adapters: Mapping[str, LowRank], weights: Mapping[str, "Tensor"], *, rslora: bool
) -> LowRank | None:
    """Combine the adapters of our layers into one of the fused layer: A stacked, B block-diagonal; None without any.

    A layer without an adapter gets zero rows and, with DoRA, the row norms of its weight in `weights`.
    """
    import torch

    present = [(module, adapters[module]) for module in linear.modules if module in adapters]
    if not present:
        return None
    if len(linear.modules) == 1:
        return linear.reordered(present[0][1], writing=True)
    first = present[0][1]
    rank = sum(adapter.rank for _, adapter in present)
    # The alpha with which the summed rank has the scale of the first adapter.
    alpha = first.alpha * ((rank / first.rank) ** 0.5 if rslora else rank / first.rank)
    blocks, magnitudes = [], []
    for module, size in zip(linear.modules, linear.sizes, strict=True):
        adapter = adapters.get(module)
        block_OR = first.b_OR.new_zeros(size, 0)
        if adapter is not None:
            # The fused adapter has one scale, that of the first; the others' difference goes into B.
            ratio = scale(adapter, rslora=rslora) / scale(first, rslora=rslora)
            block_OR = adapter.b_OR if ratio == 1 else adapter.b_OR * ratio
        blocks.append(block_OR)
        if first.magnitude_O is not None:
            own = None if adapter is None else adapter.magnitude_O
            magnitudes.append(weights[module + ".weight"].norm(dim=1).to(first.magnitude_O) if own is None else own)
    a_RI = torch.cat([adapter.a_RI for _, adapter in present])
    stacked = LowRank(alpha, a_RI, torch.block_diag(*blocks), torch.cat(magnitudes) if magnitudes else None)
    return linear.reordered(stacked, writing=True)


def scale(adapter: LowRank, *, rslora: bool) -> float:
    """Return the factor of the product B A."""
    return adapter.alpha / (adapter.rank**0.5 if rslora else adapter.rank)


def owners(names: Sequence[str]) -> list[str]:
    """Return the modules that own these parameters, without duplicates."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
