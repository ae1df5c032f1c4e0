"""Estimate a training run: parameters, memory by part, FLOPs, time.

Computed from sizes: allocates no model, reads no data, and knows nothing of recipes or commands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.config import ModelConfig
from llmctl.model.flops import Rows, row_flops
from llmctl.model.parameters import Parameters, count_parameters
from llmctl.model.shapes import complete
from llmctl.model.training_memory import FLOAT_BYTES, Memory, memory

DEVICES = (1, 8, 64, 1024)
GPU_FLOPS = {"H100 SXM": 989e12, "A100": 312e12}
"""Published dense bfloat16 rates, in FLOP/s: NVIDIA's data sheets."""
ASSUMED_UTILIZATION = 0.4
"""Assumed fraction of a GPU's peak rate; large published runs reach 0.3 to 0.55."""


@dataclass(frozen=True)
class Estimate:
    """The result of a dry run; process_bytes: what every process holds besides the memory of a step."""

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
    process_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the run, of both sides for an encoder-decoder."""
        return self.steps * self.rows.batch_size * self.rows.n_tokens

    @property
    def flops(self) -> float:
        """FLOPs of the run."""
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
        """Return the estimate for JSON: bytes, FLOPs, seconds."""
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
            "memory_bytes": {
                str(n): {**part.parts, "process": self.process_bytes, "peak": part.peak + self.process_bytes}
                for n, part in self.memory.items()
            },
            "assumed_gpu_utilization": ASSUMED_UTILIZATION,
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
            f"memory per device, {self.layout}, matmuls in {self.dtype}:",
            *self._memory_table(),
            *(
                [f"peak includes {size(self.process_bytes)} of the process: Python, torch, data, freed memory it keeps"]
                if self.process_bytes
                else []
            ),
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

    def _bytes(self, part: Memory) -> tuple[int, ...]:
        return (*part.parts.values(), part.peak + self.process_bytes)

    def _memory_table(self) -> list[str]:
        header = ("devices", "weights", "gradients", "optimizer", "copies", "activations", "logits", "peak")
        table: list[tuple[str, ...]] = [header]
        for n, part in self.memory.items():
            table.append((f"{n:,}", *(size(value) for value in self._bytes(part))))
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
    process_bytes: int = 0,
    **options: Any,
) -> Estimate:
    """Estimate a run; `cpu_flops`: this machine's measured matmul rate in `dtype`, in FLOP/s.

    `options`: arguments of `memory` that describe how devices share the work.
    """
    config = complete(config)
    rates = {"this CPU, matmuls alone at their measured rate": cpu_flops}
    for gpu, rate in GPU_FLOPS.items():
        rates[f"{gpu}, assumed {ASSUMED_UTILIZATION:.0%} of {rate / 1e12:.0f} TFLOP/s"] = rate * ASSUMED_UTILIZATION
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
        process_bytes=process_bytes,
    )


def size(n_bytes: float) -> str:
    """Format bytes."""
    value = float(n_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.0f} TB" if value >= 999.5 else f"{value:.3g} TB"


def duration(seconds: float) -> str:
    """Format seconds."""
    for unit, length in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} seconds"
