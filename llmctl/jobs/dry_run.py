"""`llmctl pretrain --dry-run`: estimate a run from its config; reads no data.

Only for a budget of minutes a small model is built, to time a step.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmctl.artifacts.with_adapters import read_model
from llmctl.config import ModelConfig, PretrainConfig, TrainConfig
from llmctl.distributed.runtime import Runtime
from llmctl.errors import MemoryLimitError
from llmctl.jobs.estimate import Estimate, estimate
from llmctl.jobs.process_memory import RUN_BYTES, process_bytes
from llmctl.jobs.step_rate import step_rate
from llmctl.machine import available_memory, choose_dtype, name_of, product_rate
from llmctl.model.flops import Rows, row_flops
from llmctl.model.presets import ALIASES, PRESETS, Preset, get_preset
from llmctl.model.training_memory import memory
from llmctl.tables.objectives import OBJECTIVES
from llmctl.tokenizer.train import VOCAB_SIZES
from llmctl.training.batches import rows_of
from llmctl.training.budget import Planner
from llmctl.training.settings import check, model_config


def dry_run(config: PretrainConfig, n_processes: int = 1) -> Estimate:
    """Return the estimate of a run.

    A published preset provides vocabulary, context and number of tokens if the config does not.
    Raises: UsageError for invalid settings.
    """
    check(config)
    name = "tiny" if config.model.preset == "auto" else config.model.preset
    preset, shape = shape_of(config, name)
    shape = replace(shape, vocab_size=shape.vocab_size or config.tokenizer.vocab_size or VOCAB_SIZES[0])
    train = config.train
    if preset is not None and not preset.dims_only and train.seq_len == TrainConfig().seq_len:
        train = replace(train, seq_len=shape.max_positions)
    if "max_positions" not in config.model.overrides:  # training extends the context to seq_len
        shape = replace(shape, max_positions=max(shape.max_positions, train.seq_len))
    config = replace(config, train=train)
    dtype = choose_dtype(train.dtype, on_cpu=True)
    rate = product_rate(dtype)
    rows = rows_of(config, shape)
    sharing = sharing_of(config, n_processes)
    described: dict[str, Any] = {}
    if n_processes > 1:
        described = {"n_devices": (n_processes,), "layout": layout_of(config, n_processes)}
    free = available_memory(torch.device("cpu"), n_processes)
    return estimate(
        name,
        shape,
        rows,
        steps=n_steps(config, preset, shape, rows, lambda: step_rate(config, shape, rate, dtype)),
        micro_batch_size=train.micro_batch_size,
        chunk_tokens=train.loss_chunk_tokens,
        optimizer=config.optim.name,
        dtype=name_of(dtype),
        cpu_flops=rate,
        fitting_rows=most_rows(config, shape, rows, n_processes, dtype.itemsize, free)[0],
        process_bytes=process_bytes() + RUN_BYTES,
        **described,
        **sharing,
    )


def sharing_of(config: Any, n_processes: int) -> dict[str, Any]:
    """Return how devices share the work, and what else is in memory, as arguments of `estimate.memory`."""
    parallel = config.parallel
    return {
        "sharded": n_processes == 1 or parallel.strategy == "fsdp",
        "n_chunks": parallel.gradient_chunks if parallel.deterministic else 0,
        "recompute": parallel.activation_checkpointing,
        "averages": config.train.ema > 0 or config.train.average_frac > 0,
    }


def layout_of(config: PretrainConfig, n_processes: int) -> str:
    """Return a description of the layout."""
    extra = ", deterministic" if config.parallel.deterministic else ""
    recompute = ", activations recomputed" if config.parallel.activation_checkpointing else ""
    return f"{n_processes} processes, {config.parallel.strategy}{extra}{recompute}"


def shape_of(config: PretrainConfig, name: str) -> tuple[Preset | None, ModelConfig]:
    """Return the preset and its shape, or the shape of a model on disk."""
    if Path(name).exists() and name.lower() not in {*PRESETS, *ALIASES}:
        return None, read_model(Path(name)).config
    return get_preset(name), model_config(config)


def n_steps(
    config: PretrainConfig, preset: Preset | None, shape: ModelConfig, rows: Rows, rate: Callable[[], float]
) -> int:
    """Return the steps of the budget, else of the published number of tokens, else the default.

    Minutes are converted by the measured rate of a step, less the share that evaluations may take.
    """
    train = config.train
    limits = [train.steps] if train.steps else []
    if train.tokens and not train.steps:
        limits.append(math.ceil(train.tokens / (train.batch_size * train.seq_len)))
    if train.minutes:
        step_flops = rows.batch_size * row_flops(shape, rows.source, rows.target, rows.label_frac)
        seconds = train.minutes * 60 * (1 - Planner.EVAL_FRAC)
        limits.append(max(1, int(seconds * rate() / step_flops)))
    if not limits and preset is not None and preset.tokens:
        limits.append(math.ceil(preset.tokens / (rows.batch_size * rows.n_tokens)))
    return min(limits, default=OBJECTIVES[config.objective].default_steps)


MEMORY_FRAC = 0.85
"""Fraction of the free memory that a micro-batch may use."""


def most_rows(
    config: Any, shape: ModelConfig, rows: Rows, n_processes: int, product_bytes: int, free_bytes: float
) -> tuple[int, int]:
    """Return the most rows per micro-batch that fit and their bytes; 0 and the bytes of one row if none fits.

    The number divides this process's rows, so that all micro-batches have one size.
    """
    own_rows = max(1, -(-config.train.batch_size // n_processes))
    needed = 0
    for n_rows in sorted((n for n in range(1, own_rows + 1) if own_rows % n == 0), reverse=True):
        needed = memory(
            shape,
            rows,
            micro_batch_size=n_rows,
            chunk_tokens=config.train.loss_chunk_tokens,
            optimizer=config.optim.name,
            product_bytes=product_bytes,
            n_devices=n_processes,
            **sharing_of(config, n_processes),
        ).peak
        if needed <= MEMORY_FRAC * free_bytes:
            return n_rows, needed
    return 0, needed


def fitting_rows(config: Any, shape: ModelConfig, rows: Rows, runtime: Runtime) -> int:
    """Return the most rows per micro-batch that fit into the free memory.

    Raises: MemoryLimitError if not even one row does.
    """
    free = available_memory(runtime.device, runtime.ranks.local_world_size)
    n_rows, needed = most_rows(config, shape, rows, runtime.world_size, runtime.dtype.itemsize, free)
    if n_rows:
        return n_rows
    raise MemoryLimitError(
        f"one row of {config.train.seq_len} tokens needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
        "lower train.seq_len or the model's size, or shard it with --parallel fsdp on more processes",
    )
