"""Write down what a teacher says of a corpus, once, for any number of students."""

import shutil
from pathlib import Path

import torch

from llmctl.config import DistillConfig
from llmctl.engine.corpus import CORPUS
from llmctl.engine.distill import Distilling
from llmctl.engine.distill_settings import settle
from llmctl.engine.job import Say
from llmctl.engine.machine import choose_dtype
from llmctl.engine.models import choose_device
from llmctl.engine.teacher import Teacher
from llmctl.engine.teacher_cache import InOrder, Spec, build_cache
from llmctl.errors import UsageError
from llmctl.formats.signals import SignalStore

DATA = "data"


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
    if not (data / CORPUS).is_file():
        job.prepare(data, say)
    job.load(data, say)
    device = torch.device(choose_device(config.train.device))
    dtype = choose_dtype(config.train.dtype, on_cpu=device.type == "cpu")
    spec = Spec(config.teacher.kind, config.teacher.draws, config.teacher.top_k, config.train.seed)
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
    shutil.rmtree(data, ignore_errors=True)
    return store
