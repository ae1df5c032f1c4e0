"""`llmctl compress`: a model and a size -> a plan across vocabulary, shape and bits -> a trained and quantized file of that size."""

import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.artifacts.hub import label
from llmctl.artifacts.load import Loaded
from llmctl.artifacts.with_adapters import identity_of
from llmctl.compressing import report as reports
from llmctl.compressing.samples import data_of, make_data
from llmctl.compressing.search import Search, best_trial
from llmctl.compressing.settings import check, settle, teaching
from llmctl.config import CompressConfig, TaskConfig
from llmctl.distilling import teacher_data
from llmctl.distilling.teacher import Teachers
from llmctl.errors import InterruptedRunError, StoppedError
from llmctl.files import write_bytes, write_json
from llmctl.jobs.compress_stages import Costs, Work, heal, quantized
from llmctl.jobs.job import Job
from llmctl.jobs.session import Session
from llmctl.preparing.corpus import Corpus
from llmctl.runs.progress import Say
from llmctl.training.task_data import TaskData, open_task_model, prepare_task

STAGES = 3

PLAN = "plan.json"
"""The plan that a run carries out, in its parts."""


def compress(session: Session, config: CompressConfig) -> None:
    """Find a plan, train the pruned model, quantize it within the size, measure the file and write it."""
    try:
        carry_out(session, config)
    except (InterruptedRunError, StoppedError, KeyboardInterrupt) as error:
        if session.runtime.is_main and (line := reports.best_so_far(session.folder / "parts")):
            session.say(line)
        if isinstance(error, KeyboardInterrupt):  # the others say it themselves
            session.say(f"resume with: llmctl compress --resume {shlex.quote(str(session.folder))}")
        raise


def carry_out(session: Session, config: CompressConfig) -> None:
    """Compress; what is done is kept, so that a resumed run does not do it again."""
    parts = session.folder / "parts"
    session.lead(partial(make_data, config, parts / "text", session.say))
    config = replace(config, data=data_of(config, parts / "text"))
    base = open_task_model(config, Path(config.model))
    corpus = session.prepare(partial(prepare, config, base, config.model, session.say))
    teacher_data.check_teacher(teaching(config, Path(config.model)), corpus)
    TaskData.open(teaching(config, Path(config.model)), base, corpus, session.say)  # refuses text that is too short
    plan: dict[str, Any] = session.lead(partial(find_plan, session, config, corpus, parts))
    teacher = parts / plan["teacher"] if plan["teacher"] else Path(config.model)
    plan |= {"teacher": str(teacher), "cut": str(parts / plan["cut"]) if plan["cut"] else ""}
    data, teachers = open_data(session, config, teacher, corpus)
    session.say(
        f"stage 2 of {STAGES}: training the pruned model" if plan["cut"] else f"stage 2 of {STAGES}: nothing is pruned"
    )
    work = Work(session, config, plan, data, teachers, Costs(Search(config, corpus, parts, session.say), plan))
    source = heal(work)
    session.say(f"stage 3 of {STAGES}: quantizing")
    session.finish(quantized(work, source))
    session.lead(partial(tidy, parts))


def prepare(config: TaskConfig, base: Loaded, model: str, say: Say, folder: Path) -> Corpus:
    """Read, split and encode the data for a model."""
    corpus = prepare_task(config, base, folder, say)
    corpus.provenance["teacher"] = {"path": model, "sha256": identity_of(base.artifact)}
    return corpus


def find_plan(session: Session, config: CompressConfig, corpus: Corpus, parts: Path) -> dict[str, Any]:
    """Return the plan that is carried out, unless an earlier start of the run found it."""
    path = parts / PLAN
    if path.exists():
        found: dict[str, Any] = reports.read_json(path)
        return found
    session.say(f"stage 1 of {STAGES}: measuring and trying plans")
    search = Search(config, corpus, parts, session.say)
    search.expect_all()
    measured = search.measure()
    plans = search.plans(measured)
    for line in reports.frontier(plans, search.shape):
        session.say(line)
    drawn = reports.frontier_svg(search.frontier(measured), search.rooms.size)
    write_bytes(session.folder / "frontier.svg", drawn.encode())
    tried = search.trials(measured)
    best, number = best_trial(parts, tried)
    record = {
        "plan": best.plan.to_dict(),
        "cost": best.cost,
        "cut": search.cut_path(number).name if best.plan.changes else "",
        "teacher": own.name if (own := search.model_with(best.plan.vocabulary)).parent == parts else "",
        "overhead": 0 if search.rooms.is_gguf else search.rooms.overhead(search.shape_of(best.plan)),
        "labels": measured.labels,
        "loss": measured.loss,
        "frontier": [plan.to_dict() for plan in plans[: reports.MOST_PLANS]],
        "trials": [one.to_dict() for one in tried],
    }
    write_json(path, record)
    return record


def open_data(session: Session, config: CompressConfig, teacher: Path, corpus: Corpus) -> tuple[TaskData, Teachers]:
    """Return the data encoded for the plan's vocabulary, and the model with it as the teacher."""
    settings = teaching(config, teacher)
    base = open_task_model(settings, teacher)
    if str(teacher) != config.model:
        corpus = session.prepare(partial(prepare, settings, base, str(teacher), session.say), "data-trimmed")
    return TaskData.open(settings, base, corpus, session.say), Teachers(settings)


def tidy(parts: Path) -> None:
    """Remove models and samples that a finished run does not need."""
    for path in parts.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix in (".safetensors", ".gguf"):
            path.unlink(missing_ok=True)


JOB = Job(
    command="compress",
    config_class=CompressConfig,
    settle=settle,
    check=check,
    objective=lambda config: f"compress-{config.size}",
    label=lambda config: label(config.model),
    run=compress,
    suffix=lambda config: ".gguf" if config.format == "gguf" else ".safetensors",
)
