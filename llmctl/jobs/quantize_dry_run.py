"""`llmctl quantize --dry-run`: what a quantization would need; reads and encodes the data as a run would, and no weights."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from llmctl.artifacts.with_adapters import read_model
from llmctl.config import MIXED, QuantizeConfig
from llmctl.converting.export_gguf import planned_bytes, prepare
from llmctl.distilling import teacher_data
from llmctl.distilling.teacher import Teachers
from llmctl.jobs.process_memory import process_bytes
from llmctl.jobs.quantize import check
from llmctl.losses.logits import is_native
from llmctl.quantizing.bit_allocation import parse_size
from llmctl.quantizing.estimate import Estimate, Rates, estimate, probe, rate
from llmctl.quantizing.settings import find_plan, settle
from llmctl.training.task_data import TaskData, open_task_model


def dry_run(config: QuantizeConfig, started: float) -> Estimate:
    """Return the estimate of a quantization; `started`: when the command was, on the clock of time.monotonic().

    Raises: UsageError for settings or data that cannot be used.
    """
    config = settle(config)
    check(config)
    weights, train = config.weights, config.train
    base = open_task_model(config, Path(config.model))
    shape = base.model.config
    with tempfile.TemporaryDirectory() as folder:
        corpus = teacher_data.prepare_taught(config, base, Teachers(config), Path(folder), lambda _: None)
        data = TaskData.open(config, base, corpus, lambda _: None)
        n_rows = data.batches(shape, shuffle=True).n_rows
        held_out = data.batches(shape, shuffle=False).n_rows * train.seq_len
    start_seconds = time.monotonic() - started
    method = "guided" if weights.method == "learned" else weights.method
    plan = find_plan(shape, config)
    narrow = is_native(torch.bfloat16)
    rates = Rates(
        float32=rate(torch.float32),
        passes=rate(torch.bfloat16 if narrow else torch.float32),
        probe_seconds=probe(method, next(iter(plan.values()))),
        pass_bytes=2 if narrow else 4,
    )
    found = estimate(
        shape,
        plan,
        weights,
        data.rows(shape),
        n_calibration_rows=min(weights.calibration_rows, n_rows),
        report_tokens=min(weights.report_tokens or held_out, held_out),
        rates=rates,
        process_bytes=process_bytes(),
        start_seconds=start_seconds,
    )
    return replace(found, file_bytes=gguf_bytes(config), is_mixed=weights.gguf == MIXED) if weights.gguf else found


def gguf_bytes(config: QuantizeConfig) -> int:
    """Return the size of the GGUF file; of mixed types, that which it is at most."""
    if config.weights.gguf == MIXED:
        return parse_size(config.weights.target_size)
    return planned_bytes(prepare(read_model(Path(config.model)), Path(config.model)), config.weights.gguf)
