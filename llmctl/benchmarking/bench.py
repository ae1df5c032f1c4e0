"""Benchmark inference on this machine: tokens per second of prefill and decoding, time to first token, memory.

Decoding at batch size 1 is also compared with the measured memory bandwidth: every token reads all weights once, so the
time of reading them is a lower bound (roofline). Rounds of several models alternate, because other processes disturb a
machine for seconds at a time; the best round counts.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmctl.artifacts.hub import shown
from llmctl.artifacts.load import load_model
from llmctl.benchmarking.decoding_loss import StepLoss, read_rows, rows_of, step_loss
from llmctl.errors import LlmctlError, UsageError
from llmctl.inference.session import Session
from llmctl.kernels.decoder import decoding_by, make_decoder
from llmctl.model.cache import CACHES
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel

ROUNDS = 3
READ_BYTES = 1 << 29
"""Size of the block that measures the memory bandwidth: larger than processor caches."""


@dataclass(frozen=True)
class BenchConfig:
    """Prompt length, number of new tokens, and batch sizes to measure."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 4, 16)


@dataclass
class Subject:
    """A model being measured, with its best times so far per batch size."""

    name: str
    model: LanguageModel
    decoder: Decoder | None
    memory_bytes: int
    kv: str = "float"
    loss: StepLoss | None = None
    prefill_seconds: dict[int, float] = field(default_factory=dict)
    step_seconds: dict[int, float] = field(default_factory=dict)
    cold_seconds: float | None = None


def check_kv(kinds: Sequence[str]) -> None:
    """Refuse unknown kinds of KV cache before a model is loaded.

    Raises: UsageError naming the value.
    """
    for kind in kinds:
        if kind not in CACHES:
            raise UsageError(f"`--kv {kind}` is not supported", f"use {', '.join(CACHES)}, comma-separated")


def check(config: BenchConfig, models: Sequence[LanguageModel]) -> None:
    """Refuse sizes out of range.

    Raises: UsageError naming the value.
    """
    for name, value in (("--prompt", config.prompt_tokens), ("--tokens", config.new_tokens)):
        if value < 1:
            raise UsageError(f"`{name}` is {value}, it must be at least 1", f"use `{name} 32`")
    if not config.batches or min(config.batches) < 1:
        raise UsageError(
            f"`--batch` is {','.join(map(str, config.batches))}, sizes must be at least 1", "use `--batch 1,4,16`"
        )
    needed = config.prompt_tokens + config.new_tokens
    for model in models:
        if needed > model.config.max_positions:
            raise UsageError(
                f"`--prompt` and `--tokens` need {needed} positions, a model's context is {model.config.max_positions}",
                "reduce `--prompt` or `--tokens`",
            )


def subject_of(name: str, make: Callable[[], LanguageModel], kv: str = "float") -> Subject:
    """Make a model and prepare it for decoding, measuring the growth of the process; `kv`: kind of cache."""
    before = resident_bytes()
    return ready(name, make(), kv, before)


def load_subject(path: Path, dtype: str, kv: str = "float", data: str = "") -> Subject:
    """Load a model and prepare it for decoding; with `data`, also measure the loss of token-by-token decoding."""
    before = resident_bytes()
    loaded = load_model(path, device="cpu", dtype=dtype, able="generate", packed=True)
    subject = ready(shown(path), loaded.model, kv, before)
    if data:
        ids_BT = rows_of(loaded, data)
        reference = read_rows(load_model(path, device="cpu", dtype="float32").model, ids_BT)
        subject.loss = step_loss(subject.model, ids_BT, reference, subject.decoder, kv)
    return subject


def ready(name: str, model: LanguageModel, kv: str, before_bytes: int) -> Subject:
    """Prepare a model for decoding; `before_bytes`: memory of the process before it was loaded."""
    subject = Subject(name if kv == "float" else f"{name} kv {kv}", model, make_decoder(model), 0, kv)
    with torch.inference_mode():  # some layers repack their weights on first use: count that memory too
        session = begin(subject, BenchConfig(8, 2), 1)
        session.begin()
        session.step(torch.zeros(1, dtype=torch.long))
    subject.memory_bytes = max(0, resident_bytes() - before_bytes)
    return subject


def resident_bytes() -> int:
    """Return the resident memory of the process; 0 if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def begin(subject: Subject, config: BenchConfig, batch: int) -> Session:
    """Return a session of `batch` different prompts of equal length."""
    n_vocabulary = subject.model.config.source_vocab_size or subject.model.config.vocab_size
    prompts = [
        [(7 * row + 3 * position) % n_vocabulary for position in range(config.prompt_tokens)] for row in range(batch)
    ]
    return Session(subject.model, prompts, config.new_tokens, decoder=subject.decoder, kv=subject.kv)


@torch.inference_mode()
def measure(subjects: Sequence[Subject], config: BenchConfig, rounds: int = ROUNDS) -> None:
    """Measure all models in alternating rounds and store their best times."""
    check(config, [subject.model for subject in subjects])
    for batch in config.batches:
        for _ in range(rounds):
            for subject in subjects:
                prefill, step = one_round(subject, config, batch)
                subject.prefill_seconds[batch] = min(prefill, subject.prefill_seconds.get(batch, prefill))
                subject.step_seconds[batch] = min(step, subject.step_seconds.get(batch, step))


def one_round(subject: Subject, config: BenchConfig, batch: int) -> tuple[float, float]:
    """Return the seconds of the prefill up to the first tokens, and of a decoding step."""
    session = begin(subject, config, batch)
    begun = time.perf_counter()
    tokens_B = session.begin().argmax(dim=1)
    first = time.perf_counter()
    for _ in range(config.new_tokens - 1):
        tokens_B = session.step(tokens_B).argmax(dim=1)
        tokens_B.tolist()
    n_steps = max(1, config.new_tokens - 1)
    return first - begun, (time.perf_counter() - first) / n_steps


def read_rate(n_bytes: int = READ_BYTES) -> float:
    """Measure how fast the threads of this process read a block of memory repeatedly, in bytes per second.

    The best of several reductions counts. A block that fits in a processor cache is read from there, as the weights of
    a small model are.
    """
    numbers = torch.ones(max(1, min(n_bytes, READ_BYTES) // 4))
    n_times = min(max(1, READ_BYTES // (8 * numbers.nbytes)), 1000)
    best = 0.0
    for way in (torch.sum, lambda x: torch.dot(x, x), lambda x: x.amax()):
        for _ in range(3):
            begun = time.perf_counter()
            for _ in range(n_times):
                way(numbers)
            best = max(best, n_times * numbers.nbytes / (time.perf_counter() - begun))
    return best


def read_per_token(model: LanguageModel) -> int:
    """Return the bytes of weights that a decoding step reads: all but embedding tables, of which it reads one row."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    stack = model.stacks()[-1]
    tensors = {
        id(tensor): tensor
        for module in (stack, model.lm_head)
        for tensor in (*module.parameters(), *module.buffers())
        if id(tensor) not in tables
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def cold_seconds(path: Path, dtype: str, kv: str = "float") -> float:
    """Return the seconds from the start of a new process to the first token of a short prompt.

    Raises: LlmctlError if the process fails.
    """
    command = [sys.executable, "-m", "llmctl", "generate", "-m", str(path), "--ids", "-q", "-n", "1", "-t", "0"]
    begun = time.perf_counter()
    done = subprocess.run(
        [*command, "--dtype", dtype, "--kv", kv, "--device", "cpu", "1 1"], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise LlmctlError(f"`{path}` failed in a new process: {done.stderr.strip()}", "omit `--cold`")
    return seconds


def report(subjects: Sequence[Subject], config: BenchConfig) -> dict[str, Any]:
    """Return the measurements as one record."""
    return {
        "threads": torch.get_num_threads(),
        "read_bytes_per_second": read_rate(),
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "models": [describe(subject, subjects[0], config) for subject in subjects],
    }


def describe(subject: Subject, first: Subject, config: BenchConfig) -> dict[str, Any]:
    """Return the measurements of one model; ratios are relative to the first model, larger is faster."""
    read_bytes = read_per_token(subject.model)
    steps, loss = subject.step_seconds, subject.loss
    return {
        "name": subject.name,
        "memory_bytes": subject.memory_bytes,
        "read_bytes_per_token": read_bytes,
        "roofline_frac": read_bytes / read_rate(read_bytes) / steps[1] if 1 in steps else None,
        "first_token_seconds": subject.prefill_seconds.get(1),
        "cold_seconds": subject.cold_seconds,
        "decoding": decoding_by(subject.decoder),
        "is_compiled": subject.decoder is not None and subject.decoder.native is not None,
        "loss": None if loss is None else asdict(loss) | {"perplexity_change": loss.perplexity_change},
        "batches": [
            {
                "batch": batch,
                "cache_bytes": begin(subject, config, batch).cache.n_bytes,
                "prefill_tokens_per_second": batch * config.prompt_tokens / subject.prefill_seconds[batch],
                "decode_tokens_per_second": batch / steps[batch],
                "prefill_ratio": first.prefill_seconds[batch] / subject.prefill_seconds[batch],
                "decode_ratio": first.step_seconds[batch] / steps[batch],
            }
            for batch in config.batches
        ],
    }
