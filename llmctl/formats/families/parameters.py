"""The names and shapes of a model's parameters as plain data, and how a published family stores each of them.

A second view of what `model/transformer.py` builds, without torch and without building it: a file is checked against
its configuration before a tensor is read. A test holds the two equal.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmctl.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """One tensor as a family stores it: its name, the parameters it holds, and in which layout.

    plain: as it is, or stacked along the rows when it holds several; transposed: (in, out) instead of (out, in), the
    Conv1D of GPT-2; row: a vector stored as a matrix of one row.
    """

    name: str
    holds: tuple[str, ...]
    layout: Literal["plain", "transposed", "row"] = "plain"


def plain(name: str, parameter: str) -> Stored:
    """Return a tensor that is stored as it is, under another name."""
    return Stored(name, (parameter,))


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return name -> shape of every entry of `LanguageModel(config).state_dict()`; the config must be complete."""
    V, D = config.vocab_size, config.d_model
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (V, D)}
    if config.family == "encoder_decoder":
        shapes |= stack_shapes(config, "model.encoder.", config.n_layers, cross=False)
        shapes |= stack_shapes(config, "model.decoder.", config.n_decoder_layers, cross=True)
    else:
        shapes |= stack_shapes(config, "model.", config.n_layers, cross=False)
    if config.n_labels:
        has_dense = config.pooled_activation != "none"
        if has_dense:
            shapes |= linear("classifier_dense", D, D, bias=True)
        return shapes | linear("classifier", config.n_labels, D, bias=has_dense)
    if config.head_transform:
        shapes |= linear("head_dense", D, D, bias=True) | norm(config, "head_norm")
    return shapes | linear("lm_head", V, D, bias=config.logits_bias)


def stack_shapes(config: ModelConfig, prefix: str, n_layers: int, *, cross: bool) -> dict[str, Shape]:
    """Return the parameters of one stack of layers."""
    D = config.d_model
    shapes: dict[str, Shape] = {}
    if config.positions == "learned":
        shapes[prefix + "embed_positions.weight"] = (config.max_positions + config.position_offset, D)
    if config.positions == "relative":
        shapes[prefix + "relative_bias.weight"] = (config.n_relative_buckets, config.n_heads)
    if config.n_token_types:
        shapes[prefix + "embed_token_types.weight"] = (config.n_token_types, D)
    if config.embedding_norm:
        shapes |= norm(config, prefix + "embedding_norm")
    for layer in range(n_layers):
        shapes |= block_shapes(config, f"{prefix}layers.{layer}.", cross=cross)
    if config.query_layer:
        shapes[prefix + "query_embeddings.weight"] = (config.max_positions, D)
        shapes |= block_shapes(config, prefix + "query_layer.", cross=False)
    if config.norm_position == "pre":
        shapes |= norm(config, prefix + "norm")
    return shapes


def block_shapes(config: ModelConfig, prefix: str, *, cross: bool) -> dict[str, Shape]:
    """Return the parameters of one layer."""
    D, F = config.d_model, config.d_ff
    shapes = norm(config, prefix + "input_layernorm") | attention_shapes(config, prefix + "self_attn.")
    if cross:
        shapes |= norm(config, prefix + "cross_attention_layernorm") | attention_shapes(config, prefix + "cross_attn.")
    shapes |= norm(config, prefix + "post_attention_layernorm")
    for name in ("gate_proj", "up_proj") if config.gated else ("up_proj",):
        shapes |= linear(f"{prefix}mlp.{name}", F, D, bias=config.mlp_bias)
    return shapes | linear(prefix + "mlp.down_proj", D, F, bias=config.mlp_bias)


def attention_shapes(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    """Return the parameters of one attention."""
    D, H, bias = config.d_model, config.head_dim, config.attention_bias
    shapes = linear(prefix + "q_proj", config.n_heads * H, D, bias=bias)
    shapes |= linear(prefix + "k_proj", config.n_kv_heads * H, D, bias=bias)
    shapes |= linear(prefix + "v_proj", config.n_kv_heads * H, D, bias=bias)
    shapes |= linear(prefix + "o_proj", D, config.n_heads * H, bias=bias)
    if config.qk_norm:
        shapes |= {prefix + "q_norm.weight": (H,), prefix + "k_norm.weight": (H,)}
    return shapes


def linear(name: str, n_out: int, n_in: int, *, bias: bool) -> dict[str, Shape]:
    """Return the parameters of a linear map."""
    weight: dict[str, Shape] = {name + ".weight": (n_out, n_in)}
    return weight | {name + ".bias": (n_out,)} if bias else weight


def norm(config: ModelConfig, name: str) -> dict[str, Shape]:
    """Return the parameters of a norm over the width."""
    weight: dict[str, Shape] = {name + ".weight": (config.d_model,)}
    return weight | {name + ".bias": (config.d_model,)} if config.norm == "layernorm" else weight


def with_bias(names: Mapping[str, str]) -> Iterator[Stored]:
    """Rename modules that have a weight and a bias."""
    for published, internal in names.items():
        yield plain(published + ".weight", internal + ".weight")
        yield plain(published + ".bias", internal + ".bias")


def stored_shape(stored: Stored, shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape in which a family stores a tensor."""
    parts = [shapes[name] for name in stored.holds]
    whole = (sum(part[0] for part in parts), *parts[0][1:])
    if stored.layout == "row":
        return (1, *whole)
    return whole[::-1] if stored.layout == "transposed" else whole


def to_parameters(
    layout: list[Stored], shapes: Mapping[str, Shape], take: Callable[[str], "Tensor"]
) -> dict[str, "Tensor"]:
    """Turn published tensors, fetched one by one with `take`, into the model's parameters."""
    import torch

    state: dict[str, Tensor] = {}
    for stored in layout:
        tensor = take(stored.name)
        if stored.layout == "row":
            tensor = tensor[0]
        elif stored.layout == "transposed":
            tensor = tensor.t() if tensor.dim() == 2 else tensor
        parts = torch.split(tensor, [shapes[name][0] for name in stored.holds]) if len(stored.holds) > 1 else (tensor,)
        state |= {name: part.contiguous() for name, part in zip(stored.holds, parts, strict=True)}
    return state


def to_stored(layout: list[Stored], state: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Turn the model's parameters into the tensors that a family publishes."""
    import torch

    published: dict[str, Tensor] = {}
    for stored in layout:
        parts = [state[name].detach() for name in stored.holds]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if stored.layout == "row":
            tensor = tensor[None]
        elif stored.layout == "transposed":
            tensor = tensor.t()
        published[stored.name] = tensor
    return published
