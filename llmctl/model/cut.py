"""A smaller model out of a larger one: which layers, channels, heads and feed-forward units stay.

What stays is the same number in every layer, so that any runtime loads the result; which they are is a layer's own, except
for hidden channels, which all layers share, and for heads under one table of relative positions. Pruning nothing
changes no bit.
Source: the axes are Minitron's, Muralidharan et al. 2024, arXiv:2407.14679, section 2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.model.shapes import complete, window_of
from llmctl.model.supports import BLOCK, BLOCK_CHOICES, describe, unsupported

LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
WIDE = ("embed_tokens", "embed_positions", "embed_token_types", "query_embeddings", "lm_head", "classifier")
"""Tables of rows over the hidden channels, by the last part of their module's name."""


def check_supported(config: ModelConfig, doing: str) -> None:
    """Refuse a model with a switch that cutting and refitting do not know.

    Raises: UsageError naming the switches.
    """
    names = unsupported(config, BLOCK, BLOCK_CHOICES)
    if names:
        raise UsageError(
            f"{doing} does not support models with {describe(config, names)}",
            "train a student of its own shape: pass a preset or a model folder as `--student`",
        )


@dataclass(frozen=True)
class Kept:
    """What stays of a model; what is not named stays whole.

    layers: the numbers of those that stay, by the stack's prefix (`model.`, `model.encoder.`, `model.decoder.`). channels: the
    hidden channels. groups: key/value heads, with all their queries, by the attention's name. units: feed-forward units
    by the layer's prefix. norms: factors on the weights of norms, by name.
    """

    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    channels: Tensor | None = None
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    units: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)


def prefixes(config: ModelConfig) -> dict[str, int]:
    """Return the prefixes of a model's stacks with the number of their layers."""
    if config.family == "encoder_decoder":
        return {"model.encoder.": config.n_layers, "model.decoder.": config.n_decoder_layers}
    return {"model.": config.n_layers}


def cut(config: ModelConfig, state: Mapping[str, Tensor], kept: Kept) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and the state of what stays of a model.

    Raises: UsageError for a model with a switch that is not known here, and for layers of an encoder-decoder whose
    attention windows cannot be told together.
    Shapes: `config` is complete, `state` the state of `LanguageModel(config)`.
    """
    config = complete(config)
    check_supported(config, "pruning")
    smaller = cut_config(config, kept)
    ratio = 1.0 if config.n_labels else config.logits_scale / smaller.logits_scale
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = renamed(name, kept)
        if new is None:
            continue
        part = sliced(name, tensor, config, kept)
        factor = kept.norms.get(name.removesuffix(".weight"), 1.0) if name.endswith("norm.weight") else 1.0
        if ratio != 1.0 and name == f"{list(prefixes(config))[-1]}norm.weight":
            factor *= ratio  # the states under the head keep their scale
        result[new] = part * factor if factor != 1.0 else part.clone()
    return smaller, result


def cut_config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """Return the shape of what stays."""
    changes: dict[str, object] = {}
    counts = {prefix: len(kept.layers.get(prefix, range(n))) for prefix, n in prefixes(config).items()}
    changes["n_layers"] = next(iter(counts.values()))
    if config.family == "encoder_decoder":
        changes["n_decoder_layers"] = counts["model.decoder."]
    if config.attention_windows and kept.layers:
        changes["attention_windows"] = kept_windows(config, kept)
    if kept.channels is not None:
        changes["d_model"] = len(kept.channels)
        if config.logits_scale != 1.0 and config.logits_scale == config.d_model**-0.5:
            changes["logits_scale"] = len(kept.channels) ** -0.5
    if kept.groups:
        n_groups = len(next(iter(kept.groups.values())))
        changes |= {"n_kv_heads": n_groups, "n_heads": n_groups * (config.n_heads // config.n_kv_heads)}
    if kept.units:
        changes["d_ff"] = len(next(iter(kept.units.values())))
    return complete(replace(config, **changes))  # type: ignore[arg-type]


def kept_windows(config: ModelConfig, kept: Kept) -> tuple[int, ...]:
    """Return the attention windows of the layers that stay, in their order.

    Raises: UsageError where the two stacks of an encoder-decoder, which share one list, would need two.
    """
    windows = []
    for prefix, n_layers in prefixes(config).items():
        layers = [*kept.layers.get(prefix, range(n_layers))]
        layers += [n_layers] * config.query_layer
        windows.append(tuple(window_of(config, layer) for layer in layers))
    longest = max(windows, key=len)
    if any(own != longest[: len(own)] for own in windows):
        raise UsageError(
            f"encoder and decoder share the attention windows {config.attention_windows}, which layers that go would part",
            "keep the same layers in both, or all",
        )
    return longest


def renamed(name: str, kept: Kept) -> str | None:
    """Return the name that a parameter has in the smaller model; None where its layer goes."""
    found = LAYER.match(name)
    if found is None:
        return name
    prefix, layer, rest = found[1].removesuffix("layers."), int(found[2]), found[3]
    layers = kept.layers.get(prefix)
    if layers is None:
        return name
    return f"{found[1]}{layers.index(layer)}{rest}" if layer in layers else None


def sliced(name: str, tensor: Tensor, config: ModelConfig, kept: Kept) -> Tensor:
    """Return the rows and columns of a parameter that stay."""
    module, _, kind = name.rpartition(".")
    owner, _, last = module.rpartition(".")
    rows, columns = sides(owner, last, config, kept)
    return pick(tensor, rows, columns if kind == "weight" and tensor.dim() > 1 else None)


def sides(owner: str, last: str, config: ModelConfig, kept: Kept) -> tuple[Tensor | None, Tensor | None]:
    """Return which rows and columns of a module's weight stay; None is all. Its bias has the rows."""
    channels, units = kept.channels, kept.units.get(owner.removesuffix("mlp"))
    if last in ("q_proj", "k_proj", "v_proj"):
        return head_rows(config, kept.groups.get(owner), queries=last == "q_proj"), channels
    if last == "relative_bias":
        own = [groups for name, groups in kept.groups.items() if name.startswith(owner + ".layers.")]
        return None, query_heads(config, own[0]) if own else None
    table = {
        "o_proj": (channels, head_rows(config, kept.groups.get(owner), queries=True)),
        "gate_proj": (units, channels),
        "up_proj": (units, channels),
        "down_proj": (channels, units),
        "q_norm": (None, None),
        "k_norm": (None, None),
        **dict.fromkeys(WIDE, (None, channels)),
    }
    return table.get(last, (channels, channels))  # norms, and maps of the stream onto itself


def query_heads(config: ModelConfig, groups: Tensor) -> Tensor:
    """Return the query heads of groups."""
    size = config.n_heads // config.n_kv_heads
    return (groups[:, None] * size + torch.arange(size)).flatten()


def head_rows(config: ModelConfig, groups: Tensor | None, *, queries: bool) -> Tensor | None:
    """Return the rows of a projection that belong to the heads that stay."""
    if groups is None:
        return None
    heads = query_heads(config, groups) if queries else groups
    return (heads[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()


def pick(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return rows and columns of a tensor."""
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None else tensor[:, columns]
