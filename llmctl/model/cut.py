"""Structured pruning: build a smaller model from selected layers, channels, heads and feed-forward units.

Every layer keeps the same number of each, so that any runtime loads the result. The selection is per layer, except that
hidden channels are shared by all layers, and heads by all layers with a common table of relative positions. Pruning
nothing leaves every bit unchanged.
Source: the axes are Minitron's, Muralidharan et al. 2024, arXiv:2407.14679, section 2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.model.prunable import check_supported, scales_at
from llmctl.model.shapes import complete, theta_of, window_of

LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
WIDE = (
    *("embed_tokens", "embed_positions", "embed_distances", "embed_token_types", "query_embeddings"),
    *("lm_head", "classifier"),
)
"""Modules whose weight's columns are the hidden channels, by the last part of their name."""


@dataclass(frozen=True)
class Kept:
    """The parts of a model to keep; anything not listed is kept completely.

    layers: layer numbers by the stack's prefix (`model.`, `model.encoder.`, `model.decoder.`). channels: the hidden
    channels. groups: key/value heads, with all their query heads, by the attention's name. units: feed-forward units by
    the layer's prefix. norms: factors on the weights of norms, by name.
    """

    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    channels: Tensor | None = None
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    units: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)


def prefixes(config: ModelConfig) -> dict[str, int]:
    """Return the prefix of each stack and its number of layers."""
    if config.family == "encoder_decoder":
        return {"model.encoder.": config.n_layers, "model.decoder.": config.n_decoder_layers}
    return {"model.": config.n_layers}


def cut(config: ModelConfig, state: Mapping[str, Tensor], kept: Kept) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and the state of the pruned model.

    config: complete; state: that of `LanguageModel(config)`.
    Raises: UsageError for a model with an unsupported setting, and if encoder and decoder would need different attention
    windows.
    """
    config = complete(config)
    check_supported(config, "pruning")
    if not config.first_norm and 0 not in kept.layers.get("model.", (0,)):
        raise UsageError(
            "the first layer, which has no norm before attention, cannot be removed", "keep the first layer"
        )
    smaller = cut_config(config, kept)
    # T5 scales logits by d_model^-0.5; removing channels changes that, which the final norm compensates. It also makes up
    # for a tied head whose embedding makes up for another scale.
    embedded = config.embedding_scale / smaller.embedding_scale
    ratio = 1.0 if config.n_labels else config.logits_scale / smaller.logits_scale
    ratio /= embedded if config.tie_embeddings and not config.n_labels else 1.0
    embeddings = ("model.embed_tokens.weight", "model.encoder.embed_tokens.weight")
    tables = (*embeddings, *(("lm_head.weight",) if config.tie_embeddings else ()))
    final = f"{list(prefixes(config))[-1]}norm."
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = renamed(name, kept)
        if new is None:
            continue
        part = sliced(name, tensor, config, kept)
        factor = kept.norms.get(name.removesuffix(".weight"), 1.0) if name.endswith("norm.weight") else 1.0
        if ratio != 1.0 and name in (final + "weight", final + "bias"):
            factor *= ratio
        if name in tables:
            factor *= embedded
        result[new] = part * factor if factor != 1.0 else part.clone()
    return smaller, result


def cut_config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """Return the config of the pruned model."""
    changes: dict[str, object] = {}
    counts = {prefix: len(kept.layers.get(prefix, range(n))) for prefix, n in prefixes(config).items()}
    changes["n_layers"] = next(iter(counts.values()))
    if config.family == "encoder_decoder":
        changes["n_decoder_layers"] = counts["model.decoder."]
    if kept.layers:
        changes |= {name: kept_facts(config, kept, name) for name in PER_LAYER if getattr(config, name)}
    if kept.channels is not None:
        changes["d_model"] = len(kept.channels)
        changes |= scales_at(config, len(kept.channels))
    if kept.groups:
        n_groups = len(next(iter(kept.groups.values())))
        changes |= {"n_kv_heads": n_groups, "n_heads": n_groups * (config.n_heads // config.n_kv_heads)}
    if kept.units:
        changes["d_ff"] = len(next(iter(kept.units.values())))
    return complete(replace(config, **changes))  # type: ignore[arg-type]


PER_LAYER = {"attention_windows": window_of, "rope_thetas": theta_of}
"""Fields that are cycled over the layers, and the function that returns a layer's value."""


def kept_facts(config: ModelConfig, kept: Kept, name: str) -> tuple[float, ...]:
    """Return the values of a field of `PER_LAYER` for the kept layers, in order.

    Raises: UsageError if the two stacks of an encoder-decoder, which share one list, would need different ones.
    """
    values = []
    for prefix, n_layers in prefixes(config).items():
        layers = [*kept.layers.get(prefix, range(n_layers))]
        # PanGu-Alpha's query layer follows the last block and has a window of its own.
        layers += [n_layers] * config.query_layer
        values.append(tuple(PER_LAYER[name](config, layer) for layer in layers))
    longest = max(values, key=len)
    if any(own != longest[: len(own)] for own in values):
        raise UsageError(
            f"encoder and decoder share `model.{name}` {getattr(config, name)}, but would need different ones after "
            "removing these layers",
            "keep the same layers in both, or all",
        )
    return longest


def renamed(name: str, kept: Kept) -> str | None:
    """Return a parameter's name in the pruned model, None if its layer is removed."""
    match = LAYER.match(name)
    if match is None:
        return name
    prefix, layer, rest = match[1].removesuffix("layers."), int(match[2]), match[3]
    layers = kept.layers.get(prefix)
    if layers is None:
        return name
    return f"{match[1]}{layers.index(layer)}{rest}" if layer in layers else None


def sliced(name: str, tensor: Tensor, config: ModelConfig, kept: Kept) -> Tensor:
    """Return the kept rows and columns of a parameter."""
    module, _, kind = name.rpartition(".")
    owner, _, last = module.rpartition(".")
    rows, columns = sides(owner, last, config, kept)
    return pick(tensor, rows, columns if kind == "weight" and tensor.dim() > 1 else None)


def sides(owner: str, last: str, config: ModelConfig, kept: Kept) -> tuple[Tensor | None, Tensor | None]:
    """Return the kept rows and columns of a module's weight (None: all); its bias follows the rows."""
    channels, units = kept.channels, kept.units.get(owner.removesuffix("mlp"))
    if last in ("q_proj", "k_proj", "v_proj"):
        return head_rows(config, kept.groups.get(owner), queries=last == "q_proj"), channels
    if last == "relative_bias":
        # The table of relative positions has a column per query head; the layers of a stack share it, or have one each.
        places = (owner + ".layers.", owner + ".self_attn")
        own = [groups for name, groups in kept.groups.items() if name.startswith(places)]
        return None, query_heads(config, own[0]) if own else None
    if last in ("q_norm", "k_norm"):
        wide = config.qk_norm_kind == "width"
        return (head_rows(config, kept.groups.get(owner), queries=last == "q_norm") if wide else None), None
    if config.d_embedding and last in (*WIDE, "embedding_norm", "head_norm") and last != "classifier":
        return None, None  # as wide as the embeddings
    if last == "embed_projection":
        return channels, None
    if last == "head_dense" and config.d_embedding:
        return None, channels
    table = {
        "o_proj": (channels, head_rows(config, kept.groups.get(owner), queries=True)),
        "gate_proj": (units, channels),
        "up_proj": (units, channels),
        "down_proj": (channels, units),
        **dict.fromkeys(WIDE, (None, channels)),
    }
    return table.get(last, (channels, channels))  # norms, and square layers on the residual stream (head_dense, ...)


def query_heads(config: ModelConfig, groups: Tensor) -> Tensor:
    """Return the query heads of key/value groups."""
    size = config.n_heads // config.n_kv_heads
    return (groups[:, None] * size + torch.arange(size)).flatten()


def head_rows(config: ModelConfig, groups: Tensor | None, *, queries: bool) -> Tensor | None:
    """Return the rows of a projection that belong to the kept heads."""
    if groups is None:
        return None
    heads = query_heads(config, groups) if queries else groups
    return (heads[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()


def pick(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Select rows and columns of a tensor (None: all)."""
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None else tensor[:, columns]
