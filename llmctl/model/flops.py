"""FLOPs of a training step, computed from the config."""

from dataclasses import dataclass

from llmctl.config import ModelConfig
from llmctl.model.shapes import complete, window_of


@dataclass(frozen=True)
class Shape:
    """Weights (multiplications per token) of one layer's parts and of the head, and the width of all query heads.

    Of a mixture of experts, `feed_forward` counts those that transform a token, and the router.
    """

    attention: int
    feed_forward: int
    head: int
    width: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Shape":
        """Count the matrices of one layer and the head of a complete config."""
        D, N, K, H = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        E = config.d_embedding or D
        head = config.vocab_size * E + (D * E if config.head_transform else 0)
        feed_forward = (
            (3 if config.gated else 2) * D * config.d_ff * (config.n_active_experts if config.n_experts else 1)
        )
        return cls(2 * D * N * H + 2 * D * K * H, feed_forward + D * config.n_experts, head, N * H)


@dataclass(frozen=True)
class Rows:
    """The rows of an optimizer step.

    source: tokens per row of the encoder, or of the only stack; target: of the decoder next to an encoder, else 0.
    label_frac: fraction of positions with a label. packed: documents of a row are isolated by masks.
    """

    batch_size: int
    source: int
    target: int = 0
    label_frac: float = 1.0
    packed: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens per row, source and target."""
        return self.source + self.target


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the training FLOPs (forward and backward) per token of rows of `seq_len` tokens, all with labels.

    An encoder-decoder is counted with as many target as source tokens, per token of either.
    """
    target = seq_len if config.family == "encoder_decoder" else 0
    return row_flops(config, seq_len, target) / (seq_len + target)


def row_flops(config: ModelConfig, source: int, target: int = 0, label_frac: float = 1.0) -> float:
    """Return the FLOPs of a forward and backward pass over one row.

    Six per weight and token (two forward, four backward) plus attention: 12 x width of the heads per layer and unmasked
    query-key pair, so half of all pairs if causal, fewer with a window. The head is applied to positions with labels.
    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B.
    """
    config = complete(config)
    shape = Shape.of(config)
    block = shape.attention + shape.feed_forward

    def scores(tokens: int, n_layers: int, *, causal: bool) -> float:
        pairs = sum(keys_seen(tokens, window_of(config, layer), causal=causal) for layer in range(n_layers))
        # Disentangled: every query and every key with every distance that occurs.
        distances = min(2 * tokens - 1, config.n_relative_buckets) if config.positions == "disentangled" else 0
        return 12.0 * shape.width * tokens * (pairs + n_layers * distances)

    if config.family != "encoder_decoder":
        n_layers = config.n_layers + int(config.query_layer)
        stack = 6.0 * n_layers * block * source + scores(source, n_layers, causal=config.family == "decoder")
        return stack + 6 * shape.head * source * label_frac
    # Cross-attention: query and output projections per target token, key and value projections per source token.
    crossing = 6 * config.d_model * shape.width * 2 * target + 12 * shape.width * source * target
    crossing += 6 * (shape.attention - 2 * config.d_model * shape.width) * source
    encoder = 6.0 * config.n_layers * block * source + scores(source, config.n_layers, causal=False)
    decoder = 6.0 * config.n_decoder_layers * block * target + scores(target, config.n_decoder_layers, causal=True)
    return encoder + decoder + config.n_decoder_layers * crossing + 6 * shape.head * target * label_frac


def keys_seen(tokens: int, window: int, *, causal: bool) -> float:
    """Return the mean number of keys a query attends to; a window of 0 is the whole row."""
    reach = min(window or tokens, tokens)
    behind = reach - reach * (reach - 1) / (2 * tokens)
    return behind if causal else 2 * behind - 1
