"""What a training run will take, before it is begun: parameters, memory by part, FLOPs, time. Allocates no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.config import ModelConfig, TrainConfig
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


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs of a forward and backward pass per token.

    Six per weight (two forward, four backward) plus the attention scores: 12 x heads' width x keys seen per layer,
    half of them where causal, at most the window where banded. An encoder-decoder is counted with as many target as
    source tokens, per token of either.
    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B.
    """
    config = complete(config)
    shape = Shape.of(config)
    layer = 6 * (shape.attention + shape.feed_forward)

    def scores(layer_number: int, *, causal: bool) -> float:
        seen = seq_len * (0.5 if causal else 1.0)
        return 12.0 * shape.width * min(float(window_of(config, layer_number) or seq_len), seen)

    if config.family != "encoder_decoder":
        causal = config.family == "decoder"
        n_layers = config.n_layers + int(config.query_layer)
        return n_layers * layer + sum(scores(n, causal=causal) for n in range(n_layers)) + 6 * shape.head
    encoder = config.n_layers * layer + sum(scores(n, causal=False) for n in range(config.n_layers))
    decoder = float(config.n_decoder_layers * (layer + 6 * shape.attention))
    decoder += sum(scores(n, causal=True) + scores(n, causal=False) for n in range(config.n_decoder_layers))
    return (encoder + decoder + 6 * shape.head) / 2


def activation_elements(config: ModelConfig) -> int:
    """Return the numbers kept for the backward pass per token, all layers together.

    Counted from the operations of our block: the norms keep their input and give the projections theirs, attention
    keeps queries, keys, values and its output (twice: before and after the heads are joined) but no scores, and the
    feed-forward keeps every factor. An encoder-decoder's token is one source and one target token together.
    Source: the method of Korthikanti et al. 2022, arXiv:2205.05198, section 4.1.
    """
    config = complete(config)
    D, F = config.d_model, config.d_ff
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    normed = (q + kv) * (1 if config.qk_norm else 0)
    attention = 2 * D + 3 * q + 2 * kv + normed
    feed_forward = 2 * D + (4 if config.gated else 2) * F
    dropped = 2 * D if config.dropout else 0
    layer = attention + feed_forward + dropped
    if config.family == "encoder_decoder":
        cross = 2 * D + 3 * q + 2 * kv + (D if config.dropout else 0)
        return config.n_layers * layer + config.n_decoder_layers * (layer + cross) + 3 * D
    return (config.n_layers + int(config.query_layer)) * layer + 2 * D


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def memory(config: ModelConfig, train: TrainConfig, parameters: Parameters, optimizer: str, n_devices: int) -> Memory:
    """Return the memory of a step on one of `n_devices` that share weights, gradients and optimizer state evenly.

    Weights, gradients and optimizer state are float32 (adamw keeps two numbers per weight, muon one for the hidden
    matrices); activations are those of one micro-batch per device, in the precision of the products.
    """
    config = complete(config)
    n_matrices = parameters.matrices if optimizer == "muon" else 0
    states = 2 * (parameters.total - n_matrices) + n_matrices
    rows = max(1, -(-(train.micro_batch_size or train.batch_size) // n_devices))
    tokens = rows * train.seq_len
    activation_bytes = 2 if train.dtype == "bfloat16" else FLOAT_BYTES
    # The chunk's logits, the copy that becomes their gradient, and the head's own gradient while it is summed.
    chunk = min(train.loss_chunk_tokens, tokens)
    logits = FLOAT_BYTES * (2 * chunk * config.vocab_size + parameters.head)
    return Memory(
        FLOAT_BYTES * parameters.total // n_devices,
        FLOAT_BYTES * parameters.total // n_devices,
        FLOAT_BYTES * states // n_devices,
        tokens * activation_elements(config) * activation_bytes,
        logits,
    )


@dataclass(frozen=True)
class Estimate:
    """The answer of a dry run."""

    name: str
    config: ModelConfig
    parameters: Parameters
    tokens: int
    flops_per_token: float
    memory: dict[int, Memory]
    rates: dict[str, float]

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return self.tokens * self.flops_per_token

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
            "tokens": self.tokens,
            "flops_per_token": self.flops_per_token,
            "flops": self.flops,
            "memory_bytes": {
                str(n): {
                    "weights": part.weights,
                    "gradients": part.gradients,
                    "optimizer": part.optimizer,
                    "activations": part.activations,
                    "logits": part.logits,
                    "total": part.total,
                }
                for n, part in self.memory.items()
            },
            "assumed_gpu_utilisation": ASSUMED_UTILISATION,
            "seconds_on_one_device": self.seconds(),
        }

    def render(self) -> str:
        """Return the estimate as a table for people."""
        config = self.config
        depth = f"{config.n_layers} layers"
        if config.family == "encoder_decoder":
            depth = f"{config.n_layers} + {config.n_decoder_layers} layers"
        heads = f"{config.n_heads} heads"
        lines = [
            f"model        {self.name}: {config.family.replace('_', '-')}, {depth}, width {config.d_model:,}, {heads}",
            f"parameters   {self.parameters.total:,} ({self.parameters.non_embedding:,} without embeddings)",
            f"tokens       {self.tokens:,}",
            f"FLOPs        {self.flops_per_token:.3g} per token, {self.flops:.3g} in all",
            "",
            f"{'memory per device':<19}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'logits':>9}{'total':>10}",
        ]
        for n, part in self.memory.items():
            cells = (part.weights, part.gradients, part.optimizer, part.activations, part.logits, part.total)
            widths = (10, 11, 11, 13, 9, 10)
            row = "".join(f"{size(cell):>{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(f"{f'{n:,} device' + ('s' if n > 1 else ''):<19}{row}")
        lines += ["", "time on one device:"]
        lines += [f"  {name:<34}{duration(seconds):>16}" for name, seconds in self.seconds().items()]
        return "\n".join(lines)


def estimate(
    name: str,
    config: ModelConfig,
    train: TrainConfig,
    *,
    tokens: int,
    optimizer: str,
    cpu_flops: float,
    n_devices: Sequence[int] = DEVICES,
) -> Estimate:
    """Estimate a run of `tokens` tokens; `cpu_flops` is this machine's measured rate of products, in FLOP/s."""
    config = complete(config)
    parameters = count_parameters(config)
    rates = {"this machine's measured products": cpu_flops}
    for gpu, rate in GPU_FLOPS.items():
        rates[f"{gpu}, assumed {ASSUMED_UTILISATION:.0%} of peak"] = rate * ASSUMED_UTILISATION
    return Estimate(
        name,
        config,
        parameters,
        tokens,
        flops_per_token(config, train.seq_len),
        {n: memory(config, train, parameters, optimizer, n) for n in n_devices},
        rates,
    )


def size(n_bytes: float) -> str:
    """Return bytes as a person reads them."""
    n_bytes = float(n_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.0f} TB" if n_bytes >= 1000 else f"{n_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """Return seconds as a person reads them."""
    for unit, length in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
