"""`llmctl quantize --dry-run`: what a quantization would need; reads and encodes the data as a run would, and no weights."""

import tempfile
import time
from pathlib import Path

import torch

from llmctl.config import QuantizeConfig
from llmctl.distilling import teacher_data
from llmctl.distilling.teacher import Teachers
from llmctl.jobs.process_memory import process_bytes
from llmctl.jobs.quantize import check
from llmctl.losses.logits import is_native
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
    return estimate(
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
