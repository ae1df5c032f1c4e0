"""Names, shapes and number of a config's parameters, without building the model."""

import math
from dataclasses import dataclass

from llmctl.config import ModelConfig
from llmctl.model.shapes import complete, has_bias, has_classifier_bias, has_shared_bias, has_transform

Shape = tuple[int, ...]

IN_EXPERTS = ".mlp.experts."
"""Part of the names of experts' parameters."""


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return name -> shape of every entry of `LanguageModel(config).state_dict()`, for a complete config."""
    V, D, E = config.vocab_size, config.d_model, config.d_embedding or config.d_model
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (V, E)}
    if config.source_vocab_size:
        shapes["model.encoder.embed_tokens.weight"] = (config.source_vocab_size, E)
    if config.family == "encoder_decoder":
        shapes |= stack_shapes(config, "model.encoder.", config.n_layers, cross=False)
        shapes |= stack_shapes(config, "model.decoder.", config.n_decoder_layers, cross=True)
    else:
        shapes |= stack_shapes(config, "model.", config.n_layers, cross=False)
    if has_transform(config):
        width = D if config.n_labels else E
        shapes |= linear("head_dense", width, D, bias=config.head_transform_bias) | norm(config, "head_norm", width)
    if config.n_labels:  # a classifier has no vocabulary head
        if config.pooled_activation != "none":
            shapes |= linear("classifier_dense", D, D, bias=True)
        return shapes | linear("classifier", config.n_labels, D, bias=has_classifier_bias(config))
    return shapes | linear("lm_head", V, E, bias=config.logits_bias)


def stack_shapes(config: ModelConfig, prefix: str, n_layers: int, *, cross: bool) -> dict[str, Shape]:
    """Return the parameter shapes of one stack of layers."""
    D, E = config.d_model, config.d_embedding or config.d_model
    shapes: dict[str, Shape] = {}
    if config.positions == "learned":
        shapes[prefix + "embed_positions.weight"] = (config.max_positions + config.position_offset, E)
    if config.positions == "disentangled":
        shapes[prefix + "embed_distances.weight"] = (config.n_relative_buckets, D)
        shapes |= norm(config, prefix + "distance_norm")
    if has_shared_bias(config):
        shapes[prefix + "relative_bias.weight"] = (config.n_relative_buckets, config.n_heads)
    if config.n_token_types:
        shapes[prefix + "embed_token_types.weight"] = (config.n_token_types, E)
    if config.embedding_norm:
        shapes |= norm(config, prefix + "embedding_norm", E)
    if config.d_embedding:
        shapes |= linear(prefix + "embed_projection", D, E, bias=True)
    for layer in range(1 if config.share_layers else n_layers):
        shapes |= block_shapes(config, f"{prefix}layers.{layer}.", cross=cross, first=layer == 0)
    if config.query_layer:
        shapes[prefix + "query_embeddings.weight"] = (config.max_positions, D)
        shapes |= block_shapes(config, prefix + "query_layer.", cross=False, first=False)
    if config.norm_position != "post":
        shapes |= norm(config, prefix + "norm")
    return shapes


def block_shapes(config: ModelConfig, prefix: str, *, cross: bool, first: bool) -> dict[str, Shape]:
    """Return the parameter shapes of one layer; `first`: of the first."""
    shapes = {} if first and not config.first_norm else norm(config, prefix + "input_layernorm")
    shapes |= attention_shapes(config, prefix + "self_attn.")
    if cross:
        shapes |= norm(config, prefix + "cross_attention_layernorm") | attention_shapes(config, prefix + "cross_attn.")
    if config.parallel != "shared":
        shapes |= norm(config, prefix + "post_attention_layernorm")
    if config.norm_position == "both":
        shapes |= norm(config, prefix + "attention_output_layernorm") | norm(config, prefix + "mlp_output_layernorm")
    if config.relative_bias_per_layer:
        shapes[prefix + "relative_bias.weight"] = (config.n_relative_buckets, config.n_heads)
    if config.n_experts:
        shapes[prefix + "mlp.router.weight"] = (config.n_experts, config.d_model)
    for expert in range(config.n_experts):
        shapes |= feed_forward_shapes(config, f"{prefix}mlp.experts.{expert}.")
    return shapes if config.n_experts else shapes | feed_forward_shapes(config, prefix + "mlp.")


def feed_forward_shapes(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    """Return the parameter shapes of one feed-forward layer, or of one expert."""
    D, F = config.d_model, config.d_ff
    shapes: dict[str, Shape] = {}
    for name in ("gate_proj", "up_proj") if config.gated else ("up_proj",):
        shapes |= linear(prefix + name, F, D, bias=config.mlp_bias)
    return shapes | linear(prefix + "down_proj", D, F, bias=has_bias(config.mlp_output_bias, config.mlp_bias))


def attention_shapes(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    """Return the parameter shapes of one attention module."""
    D, H, bias = config.d_model, config.head_dim, config.attention_bias
    shapes = linear(prefix + "q_proj", config.n_heads * H, D, bias=bias)
    shapes |= linear(prefix + "k_proj", config.n_kv_heads * H, D, bias=bias)
    shapes |= linear(prefix + "v_proj", config.n_kv_heads * H, D, bias=bias)
    output_bias = has_bias(config.attention_output_bias, bias)
    shapes |= linear(prefix + "o_proj", D, config.n_heads * H, bias=output_bias)
    if config.qk_norm:
        q, k = (config.n_heads * H, config.n_kv_heads * H) if config.qk_norm_kind == "width" else (H, H)
        shapes |= {prefix + "q_norm.weight": (q,), prefix + "k_norm.weight": (k,)}
    return shapes


def linear(name: str, n_out: int, n_in: int, *, bias: bool) -> dict[str, Shape]:
    """Return the parameter shapes of a linear layer."""
    weight: dict[str, Shape] = {name + ".weight": (n_out, n_in)}
    return weight | {name + ".bias": (n_out,)} if bias else weight


def norm(config: ModelConfig, name: str, width: int = 0) -> dict[str, Shape]:
    """Return the parameter shapes of a norm over the hidden channels, or over `width` channels."""
    if not config.norm_weight:
        return {}
    weight: dict[str, Shape] = {name + ".weight": (width or config.d_model,)}
    biased = config.norm == "layernorm" and config.norm_bias
    return weight | {name + ".bias": weight[name + ".weight"]} if biased else weight


def count(config: ModelConfig) -> int:
    """Return the number of parameters, a tied weight counted once."""
    return count_parameters(config).total


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by kind.

    embedding: lookup tables (tokens, positions, distances, token types, queries). non_embedding: everything else, including an
    untied head. matrices: the matrices in non_embedding, without an untied head. head: size of the output head's matrix,
    tied or not.
    """

    total: int
    embedding: int
    non_embedding: int
    matrices: int
    head: int


TABLES = ("embed_", "relative_bias", "query_embeddings")
"""Parts of the names of parameters that are looked up by row."""


def count_parameters(config: ModelConfig) -> Parameters:
    """Count a model's parameters without building it.

    Raises: UsageError if the configuration contradicts itself.
    """
    config = complete(config)
    shapes = parameter_shapes(config)
    head_name = "classifier.weight" if config.n_labels else "lm_head.weight"
    head = math.prod(shapes.pop(head_name))
    embedding = sum(math.prod(shape) for name, shape in shapes.items() if any(part in name for part in TABLES))
    rest = {name: shape for name, shape in shapes.items() if not any(part in name for part in TABLES)}
    matrices = sum(math.prod(shape) for shape in rest.values() if len(shape) == 2)
    vectors = sum(math.prod(shape) for shape in rest.values() if len(shape) == 1)
    is_tied = config.tie_embeddings and not config.n_labels
    non_embedding = matrices + vectors + (0 if is_tied else head)
    return Parameters(embedding + non_embedding, embedding, non_embedding, matrices, head)
