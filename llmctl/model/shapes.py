"""Values derived from a ModelConfig: defaults for its zeros, consistency checks, layer counts, widths."""

from dataclasses import replace
from typing import Literal

from llmctl.config import ModelConfig
from llmctl.errors import UsageError

OutputBias = Literal["same", "yes", "no"]

LARGEST_TABLE = 1 << 17
"""Most sinusoidal positions: their table is computed whole, and no tensor of a file vouches for its size."""


def complete(config: ModelConfig) -> ModelConfig:
    """Replace every 0 that means "derive" by its value, and check that the model can be built.

    Raises: UsageError listing all inconsistencies.
    """
    d_ff = config.d_ff or (64 * max(1, round(8 * config.d_model / 3 / 64)) if config.gated else 4 * config.d_model)
    head_dim = config.head_dim or config.d_model // max(config.n_heads, 1)
    full = replace(
        config,
        attention_output_bias=shown_bias(config.attention_output_bias, config.attention_bias),
        mlp_output_bias=shown_bias(config.mlp_output_bias, config.mlp_bias),
        n_decoder_layers=(config.n_decoder_layers or config.n_layers) if config.family == "encoder_decoder" else 0,
        n_kv_heads=config.n_kv_heads or config.n_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        embedding_scale=config.embedding_scale or float(max(config.d_model, 1)) ** 0.5,
        attention_scale=config.attention_scale or (default_scale(config.positions, head_dim) if head_dim else 0.0),
    )
    problems = contradictions(config, full)
    if problems:
        raise UsageError("the model cannot be built: " + "; ".join(problems), "`llmctl presets` lists valid shapes")
    return full


def default_scale(positions: str, head_dim: int) -> float:
    """Return the usual factor on attention scores: 1 / sqrt(head_dim); disentangled scores are sums of three products."""
    return float((3 if positions == "disentangled" else 1) * head_dim) ** -0.5


def shown_bias(kind: OutputBias, other: bool) -> OutputBias:
    """Return `same` if an output projection's bias is as that of the other projections, so that equals compare equal."""
    return "same" if kind == ("yes" if other else "no") else kind


def has_bias(kind: str, other: bool) -> bool:
    """Tell whether an output projection has a bias."""
    return other if kind == "same" else kind == "yes"


def has_shared_bias(config: ModelConfig) -> bool:
    """Tell whether the layers of a stack share one learned relative position bias."""
    return (config.positions == "relative" or config.relative_bias) and not config.relative_bias_per_layer


def theta_of(config: ModelConfig, layer: int) -> float:
    """Return the rotary base of a layer; 0: no rotation."""
    return config.rope_thetas[layer % len(config.rope_thetas)] if config.rope_thetas else config.rope_theta


def rope_of(config: ModelConfig, layer: int) -> tuple[float, bool]:
    """Return the rotary base of a layer, and whether its frequencies are scaled."""
    everywhere = config.rope_scaling_layers == "all"
    return theta_of(config, layer), config.rope_scaling != "none" and (everywhere or not window_of(config, layer))


def scaling_counts(config: ModelConfig) -> tuple[int, ...]:
    """Return how many numbers the scaling of rotary frequencies may have."""
    counts = {"none": (0,), "linear": (1,), "llama3": (4,), "yarn": (5, 6)}
    return counts.get(config.rope_scaling, (2 + (config.rotary_dim or config.head_dim),))


def has_classifier_bias(config: ModelConfig) -> bool:
    """Tell whether the outputs of a classification head have a bias."""
    return config.pooled_activation != "none" or config.head != "text"


def has_transform(config: ModelConfig) -> bool:
    """Tell whether there is a transform before the head; a classifier of whole texts has its own dense layer instead."""
    return config.head_transform and not (config.n_labels and config.head == "text")


def contradictions(config: ModelConfig, full: ModelConfig) -> list[str]:
    """Return a message for every invalid or inconsistent setting."""
    sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions")
    values = {name: getattr(full, name) for name in sizes}
    checks = [(value < 1, f"`model.{name}` is {value}, but must be at least 1") for name, value in values.items()]
    checks += [
        (
            not config.head_dim and config.n_heads > 0 and config.d_model % config.n_heads != 0,
            f"`model.d_model` {config.d_model} is not divisible by `model.n_heads` {config.n_heads}",
        ),
        (
            full.n_kv_heads > 0 and full.n_heads % full.n_kv_heads != 0,
            f"`model.n_heads` {full.n_heads} is not divisible by `model.n_kv_heads` {full.n_kv_heads}",
        ),
        (
            full.positions == "rope" and full.head_dim % 2 != 0,
            f"`model.head_dim` {full.head_dim} is odd, but rotary positions need an even one",
        ),
        (
            full.positions in ("relative", "disentangled") and full.n_relative_buckets < 4,
            f"`model.n_relative_buckets` {full.n_relative_buckets} is too small: relative positions need at least 4",
        ),
        (
            full.positions == "relative" and full.max_relative_distance <= full.n_relative_buckets // 2,
            f"`model.max_relative_distance` {full.max_relative_distance} must exceed half of the relative buckets",
        ),
        (
            full.positions == "disentangled" and full.max_relative_distance <= full.n_relative_buckets // 4 + 1,
            f"`model.max_relative_distance` {full.max_relative_distance} must exceed a quarter of the relative buckets, plus 1",
        ),
        (
            full.positions == "disentangled" and full.family != "encoder",
            f"`model.positions` disentangled needs `model.family` encoder, not {full.family}",
        ),
        (
            full.positions == "disentangled" and full.qk_norm,
            "`model.qk_norm` cannot be combined with `model.positions` disentangled",
        ),
        (
            not 0 <= full.rotary_dim <= full.head_dim or full.rotary_dim % 2 != 0,
            f"`model.rotary_dim` {full.rotary_dim} is not an even number from 0 to `model.head_dim` {full.head_dim}",
        ),
        (
            len(full.rope_scaling_values) not in scaling_counts(full),
            f"`model.rope_scaling` {full.rope_scaling} does not have {len(full.rope_scaling_values)} values",
        ),
        (
            full.parallel != "none" and (full.norm_position != "pre" or full.family == "encoder_decoder"),
            f"`model.parallel` {full.parallel} needs a decoder or encoder with `model.norm_position` pre",
        ),
        (
            full.norm_position == "both" and full.family == "encoder_decoder",
            "`model.norm_position` both needs a decoder or encoder",
        ),
        (
            full.share_layers and full.family != "encoder",
            f"`model.share_layers` needs `model.family` encoder, not {full.family}",
        ),
        (
            bool(full.d_embedding) and full.family == "encoder_decoder",
            "`model.d_embedding` needs a decoder or encoder",
        ),
        (
            full.query_layer and full.family != "decoder",
            f"`model.query_layer` needs `model.family` decoder, not {full.family}",
        ),
        (
            bool(full.source_vocab_size) and (full.family != "encoder_decoder" or full.n_labels > 0),
            "`model.source_vocab_size` needs `model.family` encoder_decoder with a head over the vocabulary",
        ),
        (
            any(window < 0 for window in full.attention_windows),
            f"`model.attention_windows` {full.attention_windows} has a negative width",
        ),
        (
            bool(full.labels) and len(full.labels) != full.n_labels,
            f"`model.labels` has {len(full.labels)} names for `model.n_labels` {full.n_labels}",
        ),
        (
            full.head != "text" and (full.family != "encoder" or not full.n_labels),
            f"`model.head` {full.head} needs `model.family` encoder and `model.n_labels`",
        ),
        (
            full.head != "text" and full.pooled_activation != "none",
            f"`model.head` {full.head} has no `model.pooled_activation`",
        ),
        (
            full.head == "span" and full.n_labels != 2,
            f"`model.head` span has 2 outputs, but `model.n_labels` is {full.n_labels}",
        ),
        (
            full.positions == "sinusoidal" and full.max_positions > LARGEST_TABLE,
            f"`model.max_positions` is {full.max_positions}, but sinusoidal positions have at most {LARGEST_TABLE}",
        ),
        (not 0 <= full.dropout < 1, f"`model.dropout` {full.dropout} is not in [0, 1)"),
    ]
    if full.n_experts:
        n_active = full.n_active_experts
        checks.append(
            (
                not 1 <= n_active <= full.n_experts,
                f"`model.n_active_experts` is {n_active}, not 1 to {full.n_experts}",
            )
        )
    for name in ("source_vocab_size", "n_experts", "d_embedding", "attention_softcap", "logits_softcap"):
        checks.append((getattr(full, name) < 0, f"`model.{name}` is {getattr(full, name)}, but must not be negative"))
    for name in ("n_decoder_layers", "position_offset", "n_token_types", "init_std", "n_labels"):
        checks.append((getattr(full, name) < 0, f"`model.{name}` is {getattr(full, name)}, but must not be negative"))
    for name in ("norm_eps", "rope_theta"):
        checks.append((not getattr(full, name) > 0, f"`model.{name}` is {getattr(full, name)}, but must be positive"))
    return [sentence for wrong, sentence in checks if wrong]


def kv_width(config: ModelConfig) -> tuple[int, int]:
    """Return the number of key/value heads and the head width."""
    heads = config.n_kv_heads or config.n_heads
    return heads, config.head_dim or config.d_model // config.n_heads


def cached_layers(config: ModelConfig) -> int:
    """Return the number of layers with a KV cache."""
    n_layers = config.n_layers
    if config.family == "encoder_decoder":
        n_layers = config.n_decoder_layers or config.n_layers
    return n_layers + int(config.query_layer)


def window_of(config: ModelConfig, layer: int) -> int:
    """Return the attention window of a layer in tokens; 0 is full attention."""
    return config.attention_windows[layer % len(config.attention_windows)] if config.attention_windows else 0
