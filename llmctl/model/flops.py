"""FLOPs of a training step, from sizes alone."""

from dataclasses import dataclass

from llmctl.config import ModelConfig
from llmctl.model.shapes import complete, window_of


@dataclass(frozen=True)
class Shape:
    """Multiplications per token in the parts of a model, and the widths they come from."""

    attention: int
    feed_forward: int
    head: int
    width: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Shape":
        """Count the matrices of one layer and the head."""
        D, N, K, H = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        head = config.vocab_size * D + (D * D if config.head_transform else 0)
        return cls(2 * D * N * H + 2 * D * K * H, (3 if config.gated else 2) * D * config.d_ff, head, N * H)


@dataclass(frozen=True)
class Rows:
    """The rows of an optimizer step.

    source: tokens per row that the only stack, or the encoder, reads; target: those of the decoder beside an encoder,
    else 0. label_frac: share of the positions that are predicted. packed: documents of a row are kept apart by masks.
    """

    batch_size: int
    source: int
    target: int = 0
    label_frac: float = 1.0
    packed: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens per row, those of both sides."""
        return self.source + self.target


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs of a forward and backward pass per token of rows of `seq_len` tokens, all of them predicted.

    An encoder-decoder is counted with as many target as source tokens, per token of either.
    """
    target = seq_len if config.family == "encoder_decoder" else 0
    return row_flops(config, seq_len, target) / (seq_len + target)


def row_flops(config: ModelConfig, source: int, target: int = 0, label_frac: float = 1.0) -> float:
    """Return the FLOPs of a forward and backward pass over one row.

    Six per weight and token (two forward, four backward) plus the attention scores: 12 x heads' width per layer and
    pair of query and key that may look at each other, so half of all pairs where causal, a band where banded. The
    head works on predicted positions only.
    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B.
    """
    config = complete(config)
    shape = Shape.of(config)
    block = shape.attention + shape.feed_forward

    def scores(tokens: int, n_layers: int, *, causal: bool) -> float:
        pairs = sum(keys_seen(tokens, window_of(config, layer), causal=causal) for layer in range(n_layers))
        return 12.0 * shape.width * tokens * pairs

    if config.family != "encoder_decoder":
        n_layers = config.n_layers + int(config.query_layer)
        stack = 6.0 * n_layers * block * source + scores(source, n_layers, causal=config.family == "decoder")
        return stack + 6 * shape.head * source * label_frac
    # Queries and outputs of cross-attention are made from the target, keys and values from the source.
    crossing = 6 * config.d_model * shape.width * 2 * target + 12 * shape.width * source * target
    crossing += 6 * (shape.attention - 2 * config.d_model * shape.width) * source
    encoder = 6.0 * config.n_layers * block * source + scores(source, config.n_layers, causal=False)
    decoder = 6.0 * config.n_decoder_layers * block * target + scores(target, config.n_decoder_layers, causal=True)
    return encoder + decoder + config.n_decoder_layers * crossing + 6 * shape.head * target * label_frac


def keys_seen(tokens: int, window: int, *, causal: bool) -> float:
    """Return how many keys a query sees, averaged over a row; a window of 0 is the whole row."""
    reach = min(window or tokens, tokens)
    behind = reach - reach * (reach - 1) / (2 * tokens)
    return behind if causal else 2 * behind - 1
