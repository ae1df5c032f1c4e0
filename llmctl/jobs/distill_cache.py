"""`llmctl distill cache`: write what a teacher predicts for a corpus, once, for any number of students."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from llmctl.artifacts.load import choose_device
from llmctl.config import DistillConfig, TeacherConfig
from llmctl.distilling.settings import check_distill, settle, student_shape
from llmctl.distilling.teacher import Teacher, Teachers
from llmctl.distilling.teacher_cache import InOrder, Spec, build_cache, cache_identity, fixed_batches
from llmctl.distilling.teacher_data import check_teacher, prepare_taught
from llmctl.errors import UsageError
from llmctl.files import json_text, write_text
from llmctl.formats.teacher_signals import SignalStore
from llmctl.machine import choose_dtype, name_of
from llmctl.preparing.corpus import keep_corpus, open_corpus
from llmctl.runs.progress import Say
from llmctl.training.task_data import TaskData, open_task_model

DATA = "data"
SETTINGS = "asked.json"
"""The settings that the text in `data` was encoded with, written after it."""


def make_cache(config: DistillConfig, out: Path, say: Say) -> SignalStore:
    """Write the outputs of a recipe's teacher on its data into a folder, or what is missing there.

    Raises: UsageError for a teacher that predicts no tokens, or for several; whatever the readers raise.
    """
    if "%" in config.student.shape:  # no student is built: any does, also for a teacher that cannot be pruned
        config = replace(config, student=replace(config.student, shape="layers=1"))
    config = settle(config)
    check_distill(config, student_shape(config))
    teachers = Teachers(config)
    refuse_others(config, teachers)
    data = encode(config, teachers, out / DATA, say)
    device = torch.device(choose_device(config.train.device))
    dtype = choose_dtype(config.train.dtype, on_cpu=device.type == "cpu")
    teacher_dtype = name_of(dtype) if config.teacher.dtype == "auto" else config.teacher.dtype
    spec = Spec(config.teacher.kind, config.teacher.draws, config.teacher.top_k, config.train.seed, teacher_dtype)
    try:
        store = build_cache(
            Teacher(teachers.original().model).to(device, config.teacher.dtype, dtype),
            InOrder(fixed_batches(data)),
            out,
            spec,
            cache_identity(config, data),
            vocab_size=data.corpus.tokenizer.for_output(teachers.original().model.config.family).vocab_size,
            device=device,
            say=say,
        )
    except UsageError:  # the folder holds something else: leave nothing in it
        shutil.rmtree(out / DATA, ignore_errors=True)
        raise
    shutil.rmtree(out / DATA, ignore_errors=True)
    return store


def refuse_others(config: DistillConfig, teachers: Teachers) -> None:
    """Refuse a recipe whose teacher outputs cannot be cached.

    Raises: UsageError.
    """
    if config.loss.name in ("none", "seq") or teachers.artifact.config.n_labels:
        raise UsageError(
            f"`{config.model}` with `loss.name` {config.loss.name} has no token predictions to cache",
            "use a teacher with a language modeling head",
        )
    if config.teacher.more:
        raise UsageError(
            f"a cache holds one teacher, `teacher.more` names {len(config.teacher.more)} more", "make a cache of each"
        )


def encode(config: DistillConfig, teachers: Teachers, folder: Path, say: Say) -> TaskData:
    """Return the encoded data; that of an interrupted attempt is used only if it has the same settings."""
    base = open_task_model(config, Path(config.model), config.teacher.backend)
    settings = json_text(asdict(replace(config, teacher=TeacherConfig())))
    noted = folder / SETTINGS
    # Other text would get the teacher outputs of this one.
    if not noted.is_file() or noted.read_text(encoding="utf-8") != settings:
        shutil.rmtree(folder, ignore_errors=True)
        keep_corpus(prepare_taught(config, base, teachers, folder, say), folder)
        write_text(noted, settings)
    corpus = open_corpus(folder)
    check_teacher(config, corpus)
    return TaskData.open(config, base, corpus, say)
