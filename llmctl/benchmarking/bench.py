"""How fast models read and write on this machine: tokens per second, the wait for the first one, memory.

A model's decoding at batch 1 is also held against the memory's measured speed: every token reads every weight once, so that
the time of reading them is a floor that no program on this machine gets under. Rounds of several models alternate, as other
processes disturb a machine for seconds at a time; the best round counts.
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

from llmctl.artifacts.load import load_model
from llmctl.benchmarking.decoding_loss import StepLoss, read_rows, rows_of, step_loss
from llmctl.errors import LlmctlError, UsageError
from llmctl.inference.session import Session
from llmctl.kernels.decoder import make_decoder
from llmctl.model.cache import CACHES
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel

ROUNDS = 3
READ_BYTES = 1 << 29
"""Larger than a processor's caches."""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured: tokens of a prompt, tokens that follow, and rows side by side."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 4, 16)


@dataclass
class Subject:
    """A model under measurement, with the best figures so far by batch."""

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
    """Refuse ways to hold keys and values that are not known, before a model is made.

    Raises: UsageError naming the value.
    """
    for kind in kinds:
        if kind not in CACHES:
            raise UsageError(f"`--kv {kind}` is not known", f"one or more of {', '.join(CACHES)}, with commas")


def check(config: BenchConfig, models: Sequence[LanguageModel]) -> None:
    """Refuse sizes that cannot be measured.

    Raises: UsageError naming the value.
    """
    for name, value in (("--prompt", config.prompt_tokens), ("--tokens", config.new_tokens)):
        if value < 1:
            raise UsageError(f"`{name}` is {value}, it must be at least 1")
    if not config.batches or min(config.batches) < 1:
        raise UsageError(
            f"`--batch` is {','.join(map(str, config.batches))}, it takes numbers from 1", "--batch 1,4,16"
        )
    needed = config.prompt_tokens + config.new_tokens
    for model in models:
        if needed > model.config.max_positions:
            raise UsageError(
                f"{needed} tokens are asked for, a model's context is {model.config.max_positions}",
                "--prompt and --tokens make it shorter",
            )


def subject_of(name: str, make: Callable[[], LanguageModel], kv: str = "float") -> Subject:
    """Make a model and make it ready, noting what the process grows by; `kv`: how keys and values are held."""
    before = resident_bytes()
    return ready(name, make(), kv, before)


def load_subject(path: Path, dtype: str, kv: str = "float", data: str = "") -> Subject:
    """Load a model and make it ready; with `data`, measure what writing a text costs in loss."""
    before = resident_bytes()
    loaded = load_model(path, device="cpu", dtype=dtype, able="generate", packed=True)
    subject = ready(str(path), loaded.model, kv, before)
    if data:
        ids_BT = rows_of(loaded, data)
        read = read_rows(load_model(path, device="cpu", dtype="float32").model, ids_BT)
        subject.loss = step_loss(subject.model, ids_BT, read, subject.decoder, kv)
    return subject


def ready(name: str, model: LanguageModel, kv: str, before_bytes: int) -> Subject:
    """Make a model ready for decoding; `before_bytes`: what the process held without it."""
    subject = Subject(name if kv == "float" else f"{name} kv {kv}", model, make_decoder(model), 0, kv)
    with torch.inference_mode():  # some layers lay their weights out anew when they are first used
        session = begin(subject, BenchConfig(8, 2), 1)
        session.begin()
        session.step(torch.zeros(1, dtype=torch.long))
    subject.memory_bytes = max(0, resident_bytes() - before_bytes)
    return subject


def resident_bytes() -> int:
    """Return what the process holds in memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def begin(subject: Subject, config: BenchConfig, batch: int) -> Session:
    """Return a session of prompts of one length."""
    n_vocabulary = subject.model.config.vocab_size
    prompts = [[(7 * row + 3 * place) % n_vocabulary for place in range(config.prompt_tokens)] for row in range(batch)]
    return Session(subject.model, prompts, config.new_tokens, decoder=subject.decoder, kv=subject.kv)


@torch.inference_mode()
def measure(subjects: Sequence[Subject], config: BenchConfig, rounds: int = ROUNDS) -> None:
    """Fill in the figures of all models, round by round."""
    check(config, [subject.model for subject in subjects])
    for batch in config.batches:
        for _ in range(rounds):
            for subject in subjects:
                prefill, step = one_round(subject, config, batch)
                subject.prefill_seconds[batch] = min(prefill, subject.prefill_seconds.get(batch, prefill))
                subject.step_seconds[batch] = min(step, subject.step_seconds.get(batch, step))


def one_round(subject: Subject, config: BenchConfig, batch: int) -> tuple[float, float]:
    """Return the seconds of reading the prompts to the first tokens, and of a step after that."""
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
    """Return how fast this process's threads read a block of memory again and again, in bytes per second.

    It is the best of some ways to do it. What is small enough for a processor's cache is read from there, as a small model's
    weights are.
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
    """Return the bytes of weights that a token of a row reads: all but tables of which it takes a row."""
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
    """Return the seconds from the start of a fresh process to the first token of a short prompt.

    Raises: LlmctlError if the process fails.
    """
    command = [sys.executable, "-m", "llmctl", "generate", "-m", str(path), "--ids", "-q", "-n", "1", "-t", "0"]
    begun = time.perf_counter()
    done = subprocess.run(
        [*command, "--dtype", dtype, "--kv", kv, "--device", "cpu", "1 1"], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise LlmctlError(f"`{path}` could not be used in a process of its own: {done.stderr.strip()}")
    return seconds


def report(subjects: Sequence[Subject], config: BenchConfig) -> dict[str, Any]:
    """Return the figures as one record."""
    return {
        "threads": torch.get_num_threads(),
        "read_bytes_per_second": read_rate(),
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "models": [describe(subject, subjects[0], config) for subject in subjects],
    }


def describe(subject: Subject, first: Subject, config: BenchConfig) -> dict[str, Any]:
    """Return the figures of one model; ratios are to the first one's, more is faster."""
    read_bytes = read_per_token(subject.model)
    steps, loss = subject.step_seconds, subject.loss
    return {
        "name": subject.name,
        "memory_bytes": subject.memory_bytes,
        "read_bytes_per_token": read_bytes,
        "roofline_frac": read_bytes / read_rate(read_bytes) / steps[1] if 1 in steps else None,
        "first_token_seconds": subject.prefill_seconds.get(1),
        "cold_seconds": subject.cold_seconds,
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
