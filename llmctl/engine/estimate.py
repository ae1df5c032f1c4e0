"""What a training run will take, before it is begun: parameters, memory by part, FLOPs, time.

Works from sizes alone: allocates no model, reads no data, and knows nothing of recipes or commands.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmctl.config import ModelConfig
from llmctl.model.presets import Parameters, count_parameters
from llmctl.model.shapes import complete, window_of

FLOAT_BYTES = 4
DEVICES = (1, 8, 64, 1024)
GPU_FLOPS = {"H100 SXM": 989e12, "A100": 312e12}
"""Published dense bfloat16 rates, in FLOP/s: NVIDIA's data sheets."""
ASSUMED_UTILISATION = 0.4
"""Share of a GPU's published rate that a training run is assumed to reach; large published runs lie at 0.3 to 0.55."""


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


def activation_bytes(config: ModelConfig, rows: Rows, n_rows: int, product_bytes: int) -> int:
    """Return what a forward pass over `n_rows` rows keeps for the backward pass, below the head.

    Counted from the operations of our block, as torch keeps their tensors on a CPU (see `Kept`).
    Source: the method of Korthikanti et al. 2022, arXiv:2205.05198, section 4.1.
    """
    config = complete(config)
    kept = Kept(config, product_bytes, rows.packed)
    if config.family != "encoder_decoder":
        per_token = (config.n_layers + int(config.query_layer)) * kept.block(rows.source) + kept.around()
        # The query layer multiplies embeddings of positions beside the states.
        per_token += config.query_layer * config.d_model * product_bytes
        return n_rows * rows.source * per_token
    encoder = config.n_layers * kept.block(rows.source) + kept.around()
    encoder += FLOAT_BYTES * config.d_model  # the memory itself
    encoder += config.n_decoder_layers * kept.remembered()
    decoder = config.n_decoder_layers * (kept.block(rows.target) + kept.crossing(rows.source)) + kept.around()
    return n_rows * (rows.source * encoder + rows.target * decoder)


@dataclass(frozen=True)
class Kept:
    """Bytes per token that the parts of a block keep for the backward pass.

    `product_bytes` is the width of a number in matrix products; the residual stream and the norms are float32. Where
    the two differ, every product keeps a converted copy of its input; where they do not, products share it.
    """

    config: ModelConfig
    product_bytes: int
    packed: bool

    def norm(self, n_products: int) -> int:
        """Count a norm's input, and the inputs of products."""
        D = self.config.d_model
        own = FLOAT_BYTES * D
        if self.product_bytes == FLOAT_BYTES:
            return own + FLOAT_BYTES * D * min(n_products, 1)
        return own + self.product_bytes * D * n_products

    def attention(self, keys: int) -> int:
        """Count queries, keys, values and output; no scores, unless a learned bias on them wants a gradient."""
        config = self.config
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        normed = FLOAT_BYTES * (q + kv) if config.qk_norm else 0
        joined = self.product_bytes * q
        if config.positions == "relative":
            # The fused kernel has no gradient of the bias; the plain one keeps all in float32, and scores.
            return FLOAT_BYTES * (3 * q + config.n_heads * keys) + joined + normed
        own = self.product_bytes * (2 * q + 2 * kv) + FLOAT_BYTES * config.n_heads
        return own + (normed + joined if config.qk_norm else 0) + self.mask(keys)

    def mask(self, keys: int) -> int:
        """Count a mask, which every layer turns into numbers of its own."""
        return self.product_bytes * keys if self.packed else 0

    def feed_forward(self) -> int:
        """Count the factors; ReLU's gradient needs its output only, which the next product keeps anyway."""
        n_factors = (4 if self.config.gated else 2) - (self.config.activation == "relu")
        return self.product_bytes * self.config.d_ff * n_factors

    def dropped(self) -> int:
        """Count a dropout's mask."""
        return self.product_bytes * self.config.d_model if self.config.dropout else 0

    def block(self, keys: int) -> int:
        """Count one layer, cross-attention left out."""
        norms = self.norm(3) + self.norm(2 if self.config.gated else 1)
        return norms + self.attention(keys) + self.feed_forward() + 2 * self.dropped()

    def crossing(self, keys: int) -> int:
        """Count a layer's cross-attention, per token of the target."""
        q = self.config.n_heads * self.config.head_dim
        normed = FLOAT_BYTES * q + self.product_bytes * q if self.config.qk_norm else 0
        own = self.product_bytes * 2 * q + FLOAT_BYTES * self.config.n_heads + normed
        return self.norm(1) + own + self.mask(keys) + self.dropped()

    def remembered(self) -> int:
        """Count a layer's cross-attention, per token of the source: keys, values, and the copies they are made of."""
        kv = self.config.n_kv_heads * self.config.head_dim
        copies = 0 if self.product_bytes == FLOAT_BYTES else 2 * self.config.d_model
        return self.product_bytes * (2 * kv + copies) + (FLOAT_BYTES * kv if self.config.qk_norm else 0)

    def around(self) -> int:
        """Count what stands before the first and after the last layer of a stack."""
        n_norms = self.config.embedding_norm + (self.config.norm_position == "pre")
        dropped = FLOAT_BYTES * self.config.d_model if self.config.dropout else 0
        return n_norms * self.norm(0) + dropped


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part.

    copies: weights in the precision of the products; on several devices those gathered for two neighbouring blocks
    and the head. logits: those of one chunk, the gradient of the hidden states, and the head's own gradient.
    accumulates: gradients stay from one micro-batch to the next.
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
        """The most that is held at once: gradients replace activations, except where they are there from before."""
        forward = self.activations + self.logits
        held = self.weights + self.optimizer + self.copies
        return held + (forward + self.gradients if self.accumulates else max(forward, self.gradients))


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
) -> Memory:
    """Return the memory of a step on one of `n_devices`; `sharded` if they share weights and state evenly (fsdp).

    Those are float32; adamw keeps two numbers per weight, muon one for the hidden matrices. Activations are those of
    one micro-batch of the device's rows; with `recompute` the inputs of the blocks, and one block's. `n_chunks` is
    the number of gradients that are summed as a tree (deterministic), of which a logarithm is held at once.
    """
    config = complete(config)
    parameters = count_parameters(config)
    n_muon = parameters.matrices if optimizer == "muon" else 0
    own_rows = -(-rows.batch_size // n_devices)
    n_rows = min(micro_batch_size or own_rows, own_rows)
    if n_chunks:
        n_rows = min(n_rows, -(-rows.batch_size // n_chunks))
    n_labels = max(1, round(n_rows * (rows.target or rows.source) * rows.label_frac))
    # The logits, which become the softmax in place; in lower precision also as they come and as they go on.
    logit_bytes = FLOAT_BYTES + (0 if product_bytes == FLOAT_BYTES else 2 * product_bytes)
    chunk = logit_bytes * min(chunk_tokens, n_labels) * config.vocab_size
    hidden = product_bytes * n_labels * config.d_model
    copies = 0 if product_bytes == FLOAT_BYTES else product_bytes * parameters.matrices
    if n_devices > 1 and sharded:
        # Beside the gathered weights: a block's whole gradients, and the buffer in which they are exchanged.
        copies = product_bytes * (2 * block_matrices(config) + parameters.head)
        copies += 2 * FLOAT_BYTES * block_matrices(config)
    n_shares = n_devices if sharded else 1
    # Subtrees that wait for their sibling while the last micro-batch runs.
    n_gradients = max(1, (n_chunks // n_devices).bit_length() - 1)
    activations = activation_bytes(config, rows, n_rows, product_bytes)
    if recompute:
        sides = ((config.n_layers, rows.source), (config.n_decoder_layers, rows.target))
        n_blocks = sum(n_layers for n_layers, tokens in sides if tokens)
        inputs = FLOAT_BYTES * config.d_model * n_rows * sum(n_layers * tokens for n_layers, tokens in sides)
        # Gradients of a block's two widest tensors stand beside its activations, where else they take the place of others'.
        passing = 2 * FLOAT_BYTES * config.d_ff * n_rows * max(rows.source, rows.target)
        activations = inputs + activations // max(1, n_blocks) + passing
    return Memory(
        weights=-(-FLOAT_BYTES * parameters.total // n_shares),
        gradients=-(-FLOAT_BYTES * parameters.total * n_gradients // n_shares),
        optimizer=-(-FLOAT_BYTES * (2 * parameters.total - n_muon) // n_shares),
        copies=copies,
        activations=activations,
        logits=chunk + hidden + FLOAT_BYTES * parameters.head,
        accumulates=n_rows < own_rows,
    )


def block_matrices(config: ModelConfig) -> int:
    """Return the weights in the matrices of the largest block."""
    shape = Shape.of(config)
    return shape.attention * (2 if config.family == "encoder_decoder" else 1) + shape.feed_forward


@dataclass(frozen=True)
class Estimate:
    """The answer of a dry run."""

    name: str
    config: ModelConfig
    parameters: Parameters
    rows: Rows
    steps: int
    dtype: str
    memory: dict[int, Memory]
    rates: dict[str, float]
    layout: str = "everything sharded evenly"
    fitting_rows: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, those of both sides of an encoder-decoder."""
        return self.steps * self.rows.batch_size * self.rows.n_tokens

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return self.tokens * self.flops_per_token

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a forward and backward pass per token of either side."""
        rows = self.rows
        return row_flops(self.config, rows.source, rows.target, rows.label_frac) / rows.n_tokens

    def seconds(self) -> dict[str, float]:
        """Return the time of the run on one device of each kind."""
        return {name: self.flops / rate for name, rate in self.rates.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers: bytes, FLOPs, seconds."""
        return {
            "model": self.name,
            "family": self.config.family,
            "parameters": self.parameters.total,
            "non_embedding_parameters": self.parameters.non_embedding,
            "batch_size": self.rows.batch_size,
            "source_tokens_per_row": self.rows.source,
            "target_tokens_per_row": self.rows.target,
            "steps": self.steps,
            "tokens": self.tokens,
            "flops_per_token": self.flops_per_token,
            "flops": self.flops,
            "dtype": self.dtype,
            "layout": self.layout,
            "fitting_rows": self.fitting_rows,
            "memory_bytes": {str(n): {**part.parts, "peak": part.peak} for n, part in self.memory.items()},
            "assumed_gpu_utilisation": ASSUMED_UTILISATION,
            "seconds_on_one_device": self.seconds(),
        }

    def render(self) -> str:
        """Return the estimate as a table for people."""
        config, rows = self.config, self.rows
        depth = f"{config.n_layers + int(config.query_layer)} layers"
        row = f"{rows.source:,} tokens"
        if config.family == "encoder_decoder":
            depth = f"{config.n_layers} + {config.n_decoder_layers} layers"
            row = f"{rows.source:,} + {rows.target:,} tokens"
        lines = [
            f"model        {self.name}: {config.family.replace('_', '-')}, {depth}, width {config.d_model:,}, {config.n_heads} heads",
            f"parameters   {self.parameters.total:,} ({self.parameters.non_embedding:,} without embeddings)",
            f"tokens       {self.tokens:,} in {self.steps:,} step{'s' * (self.steps != 1)} of {rows.batch_size:,} x {row}",
            f"FLOPs        {self.flops_per_token:.3g} per token, {self.flops:.3g} in all",
            "",
            f"memory per device, {self.layout}, products in {self.dtype}:",
            *self._memory_table(),
            *(
                [f"micro-batches of {self.fitting_rows} rows fit this machine's free memory"]
                if self.fitting_rows
                else []
            ),
            "",
            "time on one device:",
            *(f"  {name:<45}{duration(seconds):>16}" for name, seconds in self.seconds().items()),
        ]
        return "\n".join(lines)

    def _memory_table(self) -> list[str]:
        header = ("devices", "weights", "gradients", "optimizer", "copies", "activations", "logits", "peak")
        table: list[tuple[str, ...]] = [header]
        for n, part in self.memory.items():
            table.append((f"{n:,}", *(size(value) for value in (*part.parts.values(), part.peak))))
        widths = [len(header[0]), *(max(len(name) + 1, 9) for name in header[1:])]
        return ["".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in table]


def estimate(
    name: str,
    config: ModelConfig,
    rows: Rows,
    *,
    steps: int,
    micro_batch_size: int,
    chunk_tokens: int,
    optimizer: str,
    dtype: str,
    cpu_flops: float,
    n_devices: Sequence[int] = DEVICES,
    layout: str = "everything sharded evenly",
    fitting_rows: int = 0,
    **options: Any,
) -> Estimate:
    """Estimate a run; `cpu_flops` is this machine's measured rate of products in `dtype`, in FLOP/s.

    `options` are those of `memory` that say how devices share the work.
    """
    config = complete(config)
    rates = {"this CPU, products alone at their measured rate": cpu_flops}
    for gpu, rate in GPU_FLOPS.items():
        rates[f"{gpu}, assumed {ASSUMED_UTILISATION:.0%} of {rate / 1e12:.0f} TFLOP/s"] = rate * ASSUMED_UTILISATION
    parts = {
        n: memory(
            config,
            rows,
            micro_batch_size=micro_batch_size,
            chunk_tokens=chunk_tokens,
            optimizer=optimizer,
            product_bytes=2 if dtype == "bfloat16" else FLOAT_BYTES,
            n_devices=n,
            **options,
        )
        for n in n_devices
    }
    return Estimate(
        name,
        config,
        count_parameters(config),
        rows,
        steps,
        dtype,
        parts,
        rates,
        layout=layout,
        fitting_rows=fitting_rows,
    )


def size(n_bytes: float) -> str:
    """Return bytes as a person reads them."""
    value = float(n_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.0f} TB" if value >= 999.5 else f"{value:.3g} TB"


def duration(seconds: float) -> str:
    """Return seconds as a person reads them."""
    for unit, length in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} seconds"
