"""Predicted memory of a training step by part, computed from the config; `benchmarks/memory.py` checks it."""

from dataclasses import asdict, dataclass

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.model.flops import Rows, Shape
from llmctl.model.parameters import count_parameters
from llmctl.model.shapes import complete, has_shared_bias
from llmctl.model.supports import AROUND_MATRICES, BLOCK, BLOCK_CHOICES, EXPERTS, describe, unsupported
from llmctl.tables.optimizers import OPTIMIZERS

FLOAT_BYTES = 4
NAMED = (
    BLOCK
    | AROUND_MATRICES
    | EXPERTS
    | {"norm_weight", "first_norm", "relative_bias", "d_embedding", "source_vocab_size", "parallel", "alibi_scale"}
)
CHOICES = BLOCK_CHOICES | {
    "norm_position": ("pre", "post", "output", "both"),
    "positions": (*BLOCK_CHOICES["positions"], "alibi", "disentangled"),
    "activation": (*BLOCK_CHOICES["activation"], "relu2"),
}


def activation_bytes(config: ModelConfig, rows: Rows, n_rows: int, product_bytes: int) -> int:
    """Return the size of the activations that a forward pass over `n_rows` rows saves, without the head.

    Counted from the operations of our block, as torch saves their tensors on a CPU (see `Kept`).
    Source: the method of Korthikanti et al. 2022, arXiv:2205.05198, section 4.1.
    Raises: UsageError for a model with a switch that is not counted here.
    """
    config = complete(config)
    names = unsupported(config, NAMED, CHOICES)
    if names:
        raise UsageError(
            f"the memory of a step cannot be computed for models with {describe(config, names)}",
            "set `train.micro_batch_size` yourself, and leave out --dry-run",
        )
    kept = Kept(config, product_bytes, rows.packed)
    if config.family != "encoder_decoder":
        per_token = (config.n_layers + int(config.query_layer)) * kept.block(rows.source) + kept.around()
        # The query layer also multiplies position embeddings.
        per_token += config.query_layer * config.d_model * product_bytes
        return n_rows * rows.source * per_token + config.n_layers * kept.distances(rows.source)
    encoder = config.n_layers * kept.block(rows.source) + kept.around()
    encoder += FLOAT_BYTES * config.d_model  # the encoder's output, saved for cross-attention
    encoder += config.n_decoder_layers * kept.remembered()
    decoder = config.n_decoder_layers * (kept.block(rows.target) + kept.crossing(rows.source)) + kept.around()
    return n_rows * (rows.source * encoder + rows.target * decoder)


@dataclass(frozen=True)
class Kept:
    """Bytes per token, where nothing else is said, that the parts of a block save for the backward pass.

    `product_bytes` is the size of an element in matrix products; the residual stream and the norms are float32. If they
    differ, every product saves a converted copy of its input; otherwise products share it.
    """

    config: ModelConfig
    product_bytes: int
    packed: bool

    def norm(self, n_products: int) -> int:
        """Count a norm's input, and the inputs of the `n_products` products that follow it."""
        D = self.config.d_model
        own = FLOAT_BYTES * D
        if self.product_bytes == FLOAT_BYTES:
            return own + FLOAT_BYTES * D * min(n_products, 1)
        return own + self.product_bytes * D * n_products

    def attention(self, keys: int) -> int:
        """Count queries, keys, values and output; scores only if they have a learned bias that needs a gradient."""
        config = self.config
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        normed = FLOAT_BYTES * (q + kv) if config.qk_norm else 0
        joined = self.product_bytes * q
        if config.attention_softcap:
            # Scores, their tanh and softmax, in the precision of the products and in float32.
            return (
                self.product_bytes * (3 * q + 2 * config.n_heads * keys) + FLOAT_BYTES * config.n_heads * keys + joined
            )
        if config.positions == "disentangled":
            # As with a learned bias; also what is projected with the distances, and the mask of the added scores.
            scores = FLOAT_BYTES * (3 * q + config.n_heads * keys) + (keys if self.packed else 0)
            return scores + joined + self.product_bytes * (config.d_model + 2 * q)
        if has_shared_bias(config):
            # The fused kernel has no gradient for the bias; the plain one saves everything in float32, and scores.
            return FLOAT_BYTES * (3 * q + config.n_heads * keys) + joined + normed
        own = self.product_bytes * (2 * q + 2 * kv) + FLOAT_BYTES * config.n_heads
        return own + (normed + joined if config.qk_norm else 0) + self.mask(keys)

    def distances(self, keys: int) -> int:
        """Count a layer's states of distances, their queries and keys: once, not per token."""
        config = self.config
        n_distances = min(2 * keys - 1, config.n_relative_buckets) if config.positions == "disentangled" else 0
        return self.product_bytes * n_distances * (config.d_model + 2 * config.n_heads * config.head_dim)

    def mask(self, keys: int) -> int:
        """Count a mask, which every layer converts to its own additive copy."""
        return self.product_bytes * keys if self.packed else 0

    def feed_forward(self) -> int:
        """Count the intermediate tensors; ReLU's gradient needs only its output, which the next product saves anyway."""
        config = self.config
        n_factors = (4 if config.gated else 2) - (config.activation == "relu")
        one = self.product_bytes * config.d_ff * n_factors
        if not config.n_experts:
            return one
        # Each active expert copies the token, and its output is kept for the gradient of the probability.
        routing = FLOAT_BYTES * (2 * config.n_experts + 2 * config.d_model * config.n_active_experts)
        return one * config.n_active_experts + routing

    def dropped(self) -> int:
        """Count a dropout's mask."""
        return self.product_bytes * self.config.d_model if self.config.dropout else 0

    def block(self, keys: int) -> int:
        """Count one layer without cross-attention."""
        norms = self.norm(3) + self.norm(2 if self.config.gated else 1)
        norms += 2 * self.norm(0) if self.config.norm_position == "both" else 0
        return norms + self.attention(keys) + self.feed_forward() + 2 * self.dropped()

    def crossing(self, keys: int) -> int:
        """Count a layer's cross-attention per target token."""
        q = self.config.n_heads * self.config.head_dim
        normed = FLOAT_BYTES * q + self.product_bytes * q if self.config.qk_norm else 0
        own = self.product_bytes * 2 * q + FLOAT_BYTES * self.config.n_heads + normed
        return self.norm(1) + own + self.mask(keys) + self.dropped()

    def remembered(self) -> int:
        """Count a layer's cross-attention per source token: keys, values, and converted copies of their input."""
        kv = self.config.n_kv_heads * self.config.head_dim
        copies = 0 if self.product_bytes == FLOAT_BYTES else 2 * self.config.d_model
        return self.product_bytes * (2 * kv + copies) + (FLOAT_BYTES * kv if self.config.qk_norm else 0)

    def around(self) -> int:
        """Count the operations before the first and after the last layer of a stack."""
        n_norms = self.config.embedding_norm + (self.config.norm_position != "post")
        dropped = FLOAT_BYTES * self.config.d_model if self.config.dropout else 0
        return n_norms * self.norm(0) + dropped


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part.

    copies: weights in the precision of the products; if sharded, those gathered for two adjacent blocks and the head.
    logits: those of one chunk, the gradient of the hidden states, and the head's own gradient. accumulates: gradients
    are kept from one micro-batch to the next.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    logits: int
    accumulates: bool

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        return {name: value for name, value in asdict(self).items() if name != "accumulates"}

    @property
    def peak(self) -> int:
        """The peak: gradients replace activations as these are freed, unless they are kept from earlier micro-batches."""
        forward = self.activations + self.logits
        permanent = self.weights + self.optimizer + self.copies
        return permanent + (forward + self.gradients if self.accumulates else max(forward, self.gradients))


def memory(
    config: ModelConfig,
    rows: Rows,
    *,
    micro_batch_size: int,
    chunk_tokens: int,
    optimizer: str,
    product_bytes: int,
    n_devices: int,
    sharded: bool = True,
    n_chunks: int = 0,
    recompute: bool = False,
    averages: bool = False,
) -> Memory:
    """Return the memory of a step on one of `n_devices`; `sharded`: weights and optimizer state are split evenly (fsdp).

    These are float32; `optimizer` is a name in tables/optimizers.py. Activations are those of one micro-batch of the
    device's rows; with `recompute`, the inputs of all blocks and one block's activations. `n_chunks` is the number of
    gradients summed in a tree (deterministic), of which log2 exist at a time. averages: a moving average of the weights is kept.
    """
    config = complete(config)
    parameters = count_parameters(config)
    row = OPTIMIZERS[optimizer]
    n_own = parameters.matrices if row.matrices_only else parameters.total
    n_state = row.floats_per_weight * n_own + OPTIMIZERS["adamw"].floats_per_weight * (parameters.total - n_own)
    n_state += parameters.total if averages else 0
    own_rows = -(-rows.batch_size // n_devices)
    n_rows = min(micro_batch_size or own_rows, own_rows)
    if n_chunks:
        n_rows = min(n_rows, -(-rows.batch_size // n_chunks))
    n_labels = max(1, round(n_rows * (rows.target or rows.source) * rows.label_frac))
    # float32 logits, turned into the softmax in place; below float32, also the products' output and the gradient's copy.
    logit_bytes = FLOAT_BYTES + (0 if product_bytes == FLOAT_BYTES else 2 * product_bytes)
    logit_bytes += FLOAT_BYTES if config.logits_softcap else 0  # the cap's derivative
    chunk = logit_bytes * min(chunk_tokens, n_labels) * config.vocab_size
    hidden = product_bytes * n_labels * config.d_model
    copies = 0 if product_bytes == FLOAT_BYTES else product_bytes * parameters.matrices
    if n_devices > 1 and sharded:
        # In addition to the gathered weights: a block's full gradients, and the buffer of their reduction.
        copies = product_bytes * (2 * block_matrices(config) + parameters.head)
        copies += 2 * FLOAT_BYTES * block_matrices(config)
    n_shares = n_devices if sharded else 1
    # Subtrees that wait for their sibling while the last micro-batch is computed.
    n_gradients = max(1, (n_chunks // n_devices).bit_length() - 1)
    activations = activation_bytes(config, rows, n_rows, product_bytes)
    if recompute:
        sides = ((config.n_layers, rows.source), (config.n_decoder_layers, rows.target))
        n_blocks = sum(n_layers for n_layers, tokens in sides if tokens)
        inputs = FLOAT_BYTES * config.d_model * n_rows * sum(n_layers * tokens for n_layers, tokens in sides)
        # Gradients of a block's two widest tensors add to its activations; without recompute they replace freed ones.
        passing = 2 * FLOAT_BYTES * config.d_ff * n_rows * max(rows.source, rows.target)
        activations = inputs + activations // max(1, n_blocks) + passing
    return Memory(
        weights=-(-FLOAT_BYTES * parameters.total // n_shares),
        gradients=-(-FLOAT_BYTES * parameters.total * n_gradients // n_shares),
        optimizer=-(-FLOAT_BYTES * n_state // n_shares),
        copies=copies,
        activations=activations,
        logits=chunk + hidden + FLOAT_BYTES * parameters.head,
        accumulates=n_rows < own_rows,
    )


def block_matrices(config: ModelConfig) -> int:
    """Return the number of matrix weights in the largest block."""
    shape = Shape.of(config)
    n_more = max(0, config.n_experts - config.n_active_experts) if config.n_experts else 0
    idle = n_more * (3 if config.gated else 2) * config.d_model * config.d_ff
    return shape.attention * (2 if config.family == "encoder_decoder" else 1) + shape.feed_forward + idle
