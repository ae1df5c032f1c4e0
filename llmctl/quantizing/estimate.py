"""Estimate a quantization, its memory and its time, from the sizes of the model and rates measured on this machine.

Allocates no model and reads no data.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmctl.config import ModelConfig, WeightsConfig
from llmctl.formats.quantization import is_inside
from llmctl.model.fisher import CHUNK_TOKENS, PART_TOKENS
from llmctl.model.flops import Rows
from llmctl.model.parameters import Shape, parameter_shapes
from llmctl.model.predicted_weights import MOST_FEATURES
from llmctl.model.training_memory import FLOAT_BYTES, activation_bytes
from llmctl.quant.columns import PART_FLOATS
from llmctl.quant.methods import AnyScheme, Moments, method_of
from llmctl.quant.schemes import SCHEMES
from llmctl.quantizing.bit_allocation import schemes_like
from llmctl.quantizing.calibrate import FISHER_ROWS, in_step, input_of
from llmctl.tables.methods import METHODS

UTILIZATION = 0.6
"""The fraction of the rate of a large product that forward and backward passes reach (SmolLM2-135M: 0.60 to 0.65)."""

PROBE_SIZE = 512
"""Size of the matrix whose codes are chosen to measure how long that takes."""

FIXED, PER_OUTPUT, PER_PRODUCT = 0.3, 0.28, 0.42
"""What the time for the codes of an input is made of at the size of the probe: what does not grow, what grows with the outputs,
and what grows with both sizes."""

HEAD_BYTES = 24
"""Bytes per position and token of the vocabulary of one chunk: logits of both models, their softmax, sums and temporaries."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of float32 products and of those of the passes, seconds for the codes of the probe, and bytes of a weight there."""

    float32: float
    passes: float
    probe_seconds: float
    pass_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a quantization needs.

    memory: bytes by part, of which all exist at the peak. seconds: by phase. file_bytes: of a GGUF file; of mixed types at most,
    0 for our own files.
    """

    parameters: int
    calibration_tokens: int
    report_tokens: int
    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    file_bytes: int = 0
    is_mixed: bool = False

    @property
    def peak(self) -> int:
        """The peak memory in bytes."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON: bytes, seconds."""
        return {
            "parameters": self.parameters,
            "calibration_tokens": self.calibration_tokens,
            "report_tokens": self.report_tokens,
            **({("most_file_bytes" if self.is_mixed else "file_bytes"): self.file_bytes} if self.file_bytes else {}),
            "memory_bytes": {**self.memory, "peak": self.peak},
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
        }

    def render(self) -> str:
        """Return the estimate for people."""
        lines = [
            f"parameters   {self.parameters:,}",
            f"tokens       {self.calibration_tokens:,} to calibrate on, {self.report_tokens:,} for the report",
            *(
                [f"file         {'at most ' if self.is_mixed else ''}{self.file_bytes:,} bytes"]
                if self.file_bytes
                else []
            ),
            "",
            "memory:",
            *(f"  {name:<28}{value / 1e6:>10,.0f} MB" for name, value in self.memory.items()),
            f"  {'peak':<28}{self.peak / 1e6:>10,.0f} MB",
            "",
            "time on this machine, undisturbed:",
            *(f"  {name:<28}{value:>10,.0f} s" for name, value in self.seconds.items()),
            f"  {'total':<28}{sum(self.seconds.values()):>10,.0f} s",
        ]
        return "\n".join(lines)


@torch.no_grad()
def probe(method: str, scheme: AnyScheme) -> float:
    """Return the seconds for the codes of a small matrix."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(PROBE_SIZE, PROBE_SIZE, generator=generator)
    moments = Moments.empty(PROBE_SIZE)
    moments.add(torch.randn(2 * PROBE_SIZE, PROBE_SIZE, generator=generator))
    best = math.inf
    for _ in range(3):
        begun = time.process_time()
        method_of(method)(weight_OI, scheme, moments)
        best = min(best, time.process_time() - begun)
    return best


def rate(dtype: torch.dtype) -> float:
    """Measure the rate of a large matrix product in FLOP/s, by the time that threads computed: others may run beside it."""
    a_NI, b_IO = torch.ones(2 * PROBE_SIZE, PROBE_SIZE, dtype=dtype), torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype)
    best = math.inf
    for _ in range(6):
        begun = time.process_time()
        torch.mm(a_NI, b_IO)
        best = min(best, time.process_time() - begun)
    return 4 * PROBE_SIZE**3 / max(best, 1e-6) * torch.get_num_threads()


def code_seconds(n_out: int, n_in: int, rates: Rates) -> float:
    """Return the seconds for the codes of a matrix (O, I)."""
    outputs, inputs = n_out / PROBE_SIZE, n_in / PROBE_SIZE
    return rates.probe_seconds * inputs * (FIXED + PER_OUTPUT * outputs + PER_PRODUCT * outputs * inputs)


def estimate(
    config: ModelConfig,
    plan: Mapping[str, AnyScheme],
    weights: WeightsConfig,
    rows: Rows,
    *,
    n_calibration_rows: int,
    report_tokens: int,
    rates: Rates,
    process_bytes: int,
    start_seconds: float,
) -> Estimate:
    """Estimate a quantization; `rows` are those of a batch, process_bytes and start_seconds what precedes the model."""
    shapes = parameter_shapes(config)
    sizes = {name: math.prod(shapes[f"{name}.weight"]) for name in plan}
    inside = [name for name in plan if is_inside(name)]
    n_block = sum(sizes[name] for name in inside)
    n_head = config.vocab_size * (config.d_embedding or config.d_model)
    parameters = sum(math.prod(shape) for shape in shapes.values()) - (n_head if config.tie_embeddings else 0)
    method = "guided" if weights.method == "learned" else weights.method
    row = METHODS[method]
    sees_data = row.needs_data or any(scheme.activations for scheme in plan.values())
    tokens = n_calibration_rows * rows.n_tokens if sees_data else 0
    passes, products = rates.passes * UTILIZATION, rates.float32
    seconds = {"start, data": start_seconds}
    if weights.target_bpw or weights.target_size:
        n_candidates = len(schemes_like(SCHEMES[weights.scheme], config.d_model))
        seconds["sensitivity of the layers"] = (
            min(tokens, 32 * rows.n_tokens) * ((4 + 2 * n_candidates) * n_block + 4 * n_head) / passes
        )
    if row.weighs:
        few = min(tokens, FISHER_ROWS * rows.n_tokens)
        seconds["Fisher information"] = few * (4 * (n_block + n_head) / passes + 2 * sums(shapes, inside) / products)
    if sees_data:
        # Layers with one input share its moments.
        squares = sum({input_of(name): shapes[f"{name}.weight"][1] ** 2 for name in inside}.values())
        n_passes = 1 if in_step(config, plan, method) else 2
        narrow = products if rates.pass_bytes == FLOAT_BYTES else rates.passes
        seconds["inputs of the layers"] = tokens * (2 * n_passes * n_block / passes + 1.2 * squares / narrow)
    seconds["codes"] = sum(
        code_seconds(n_out, n_in, rates) for n_out, n_in in (shapes[f"{name}.weight"] for name in plan)
    )
    seconds["report"] = report_tokens * (4 * n_block + 8 * n_head) / (products * UTILIZATION)
    memory = {"this process": process_bytes, "weights": FLOAT_BYTES * parameters}
    memory |= largest(config, plan, rows, rates, tokens, weighs=row.weighs)
    return Estimate(parameters, tokens, report_tokens, memory, seconds)


def sums(shapes: Mapping[str, Shape], names: Iterable[str]) -> int:
    """Return the numbers in the normal equations of `model/predicted_weights.py`."""
    widths = {input_of(name): min(shapes[f"{name}.weight"][1], MOST_FEATURES) + 2 for name in names}
    return sum(width * width for width in widths.values())


def largest(
    config: ModelConfig,
    plan: Mapping[str, AnyScheme],
    rows: Rows,
    rates: Rates,
    tokens: int,
    *,
    weighs: bool,
) -> dict[str, int]:
    """Return the bytes of the phase that needs most besides the weights, by its name."""
    shapes = parameter_shapes(config)
    n_weights = sum(math.prod(shapes[f"{name}.weight"]) for name in plan)
    n_head = config.vocab_size * (config.d_embedding or config.d_model)
    widest = max(shapes[f"{name}.weight"][1] for name in plan)
    # What all passes through a block hold before its widest layer: its input, and the sum that it is added to.
    waiting = tokens * (rates.pass_bytes * widest + FLOAT_BYTES * config.d_model)
    found = {
        # The model as it was, beside the packed one.
        "report": n_weights + HEAD_BYTES * 256 * config.vocab_size + FLOAT_BYTES * n_head,
        # Codes are bytes; of the widest layer, moments and their factors in two precisions; states before and after a block.
        "codes": n_weights
        + widest * widest * 32
        + 8 * FLOAT_BYTES * PART_FLOATS
        + 2 * FLOAT_BYTES * tokens * config.d_model
        + waiting
        + 2 * FLOAT_BYTES * n_head,
    }
    if weighs:
        n_rows = max(1, PART_TOKENS // max(1, rows.source))
        converted = 0 if rates.pass_bytes == FLOAT_BYTES else rates.pass_bytes * n_weights
        found["backward pass"] = (
            converted
            + FLOAT_BYTES * sums(shapes, [name for name in plan if is_inside(name)])
            + activation_bytes(config, rows, n_rows, rates.pass_bytes)
            + HEAD_BYTES * CHUNK_TOKENS * config.vocab_size
        )
    name = max(found, key=found.__getitem__)
    return {name: found[name]}
