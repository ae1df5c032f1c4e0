"""Write down what a teacher says of a corpus, once, for any number of students."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from llmctl.artifacts.load import choose_device
from llmctl.config import DistillConfig, TeacherConfig
from llmctl.distilling.settings import settle
from llmctl.distilling.teacher import Teacher
from llmctl.distilling.teacher_cache import InOrder, Spec, build_cache
from llmctl.errors import UsageError
from llmctl.files import json_text, write_text
from llmctl.formats.teacher_signals import SignalStore
from llmctl.jobs.distill import Distilling
from llmctl.machine import choose_dtype
from llmctl.runs.progress import Say

DATA = "data"
ASKED = "asked.json"
"""The settings that the text in `data` was encoded with, written after it."""


def make_cache(config: DistillConfig, out: Path, say: Say) -> SignalStore:
    """Write the signals of a recipe's teacher and data into a folder, or what is missing there.

    Raises: UsageError for a teacher that predicts no tokens, or for several; whatever the readers raise.
    """
    config = settle(config)
    job = Distilling(config)
    job.check()
    if config.loss.name in ("none", "seq") or job.base.model.config.n_labels:
        raise UsageError(f"`{config.model}` predicts no tokens whose signals could be kept", "a teacher of text")
    if config.teacher.more:
        raise UsageError("signals are kept of one teacher, `teacher.more` names others", "make a cache of each")
    data = out / DATA
    # What an interrupted attempt encoded goes on only as what it is: other text would get the signals of this one.
    asked = json_text(asdict(replace(config, teacher=TeacherConfig())))
    if not (data / ASKED).is_file() or (data / ASKED).read_text(encoding="utf-8") != asked:
        shutil.rmtree(data, ignore_errors=True)
        job.prepare(data, say)
        write_text(data / ASKED, asked)
    job.load(data, say)
    device = torch.device(choose_device(config.train.device))
    dtype = choose_dtype(config.train.dtype, on_cpu=device.type == "cpu")
    computes = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}.get(
        config.teacher.dtype, str(dtype).removeprefix("torch.")
    )
    spec = Spec(config.teacher.kind, config.teacher.draws, config.teacher.top_k, config.train.seed, computes)
    try:
        store = build_cache(
            Teacher(job.teacher.model).to(device, config.teacher.dtype, dtype),
            InOrder(job.fixed_batches()),
            out,
            spec,
            job.cache_identity(),
            vocab_size=job.corpus.tokenizer.vocab_size,
            device=device,
            say=say,
        )
    except UsageError:  # the folder is not ours to leave anything in
        shutil.rmtree(data, ignore_errors=True)
        raise
    shutil.rmtree(data, ignore_errors=True)
    return store
