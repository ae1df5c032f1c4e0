"""Values derived from a ModelConfig: defaults for its zeros, consistency checks, layer counts, widths."""

from dataclasses import replace

from llmctl.config import ModelConfig
from llmctl.errors import UsageError


def complete(config: ModelConfig) -> ModelConfig:
    """Replace every 0 that means "derive" by its value, and check that the model can be built.

    Raises: UsageError listing all inconsistencies.
    """
    d_ff = config.d_ff or (64 * max(1, round(8 * config.d_model / 3 / 64)) if config.gated else 4 * config.d_model)
    head_dim = config.head_dim or config.d_model // max(config.n_heads, 1)
    full = replace(
        config,
        n_decoder_layers=(config.n_decoder_layers or config.n_layers) if config.family == "encoder_decoder" else 0,
        n_kv_heads=config.n_kv_heads or config.n_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        embedding_scale=config.embedding_scale or float(max(config.d_model, 1)) ** 0.5,
        attention_scale=config.attention_scale or head_dim**-0.5 if head_dim else 0.0,
    )
    problems = contradictions(config, full)
    if problems:
        raise UsageError("the model cannot be built: " + "; ".join(problems), "`llmctl presets` lists valid shapes")
    return full


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
            full.positions == "relative" and full.n_relative_buckets < 4,
            f"`model.n_relative_buckets` {full.n_relative_buckets} is too small: relative positions need at least 4",
        ),
        (
            full.positions == "relative" and full.max_relative_distance <= full.n_relative_buckets // 2,
            f"`model.max_relative_distance` {full.max_relative_distance} must exceed half of the relative buckets",
        ),
        (
            full.query_layer and full.family != "decoder",
            f"`model.query_layer` needs `model.family` decoder, not {full.family}",
        ),
        (
            any(window < 0 for window in full.attention_windows),
            f"`model.attention_windows` {full.attention_windows} has a negative width",
        ),
        (
            bool(full.labels) and len(full.labels) != full.n_labels,
            f"`model.labels` has {len(full.labels)} names for `model.n_labels` {full.n_labels}",
        ),
        (not 0 <= full.dropout < 1, f"`model.dropout` {full.dropout} is not in [0, 1)"),
    ]
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
