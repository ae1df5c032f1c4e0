"""`llmctl distill`: a teacher, a student pruned from it, data, and a report at the end."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.artifacts.find import usage
from llmctl.artifacts.hub import label, named
from llmctl.artifacts.load import is_bare
from llmctl.config import DistillConfig
from llmctl.data.batches import AnswerBatches
from llmctl.distilling import teacher_data
from llmctl.distilling.answer_alignment import AnswersInTwo
from llmctl.distilling.build_objective import build_objective, cached_objective
from llmctl.distilling.measure_models import measure_models
from llmctl.distilling.report import make_report, render
from llmctl.distilling.settings import check_distill, has_own_tokenizer, settle, student_model, student_shape
from llmctl.distilling.student_plan import Student, StudentPlan
from llmctl.distilling.student_tokenizer import own_tokenizer, with_tokenizer
from llmctl.distilling.teacher import Teachers, tokenizer_sha256
from llmctl.distilling.teacher_cache import CachedBatches, dense_head, fixed_batches, open_cache
from llmctl.files import write_json
from llmctl.formats.teacher_signals import SignalStore
from llmctl.jobs.finish import Product, whole_model
from llmctl.jobs.job import Job
from llmctl.jobs.session import Part, Session, identity
from llmctl.model.transformer import LanguageModel, load_tensors, with_tied
from llmctl.preparing.corpus import Corpus
from llmctl.runs.comparison import Report
from llmctl.training.batch import BatchSource, to_device
from llmctl.training.inputs import Fitted
from llmctl.training.objectives import Objective
from llmctl.training.task_data import TaskData, check_task, open_task_model


def distill(session: Session, config: DistillConfig) -> None:
    """Encode the data; train baselines, intermediate students and the student; measure them and write the student."""
    teachers = Teachers(config)
    data = open_data(session, config, teachers)
    cache = open_cache(config, data)
    plan = StudentPlan(config, data, teachers, session.folder / "parts")
    # Parts in order: a part may be pruned from the one before, and the baseline with equal compute needs the others'
    # metrics. A resumed run skips what `parts/` already has.
    for name in plan.names:
        if name and session.runtime.first(plan.is_done(name)):
            continue
        session.lead(partial(plan.cut, name, session.say))
        student = plan.load(name)
        fitted = session.fit(part_of(session, plan, student, cache))
        if name:
            session.lead(partial(plan.keep, student, fitted, session.objective))
    report = compare(session, plan, student, fitted)
    session.finish(
        Product(
            student.model,
            data.corpus,
            fitted,
            data.metric,
            write=whole_model(student.model, fitted.weights, data.files()),
            provenance=teacher_data.provenance(teachers, data.corpus),
            facts=lambda: {"teacher": named(config.model), "report": report.record},
            note=note,
            closing=partial(closing, session, student.model, teachers, report),
            missed=report.missed,
        )
    )


def open_data(session: Session, config: DistillConfig, teachers: Teachers) -> TaskData:
    """Return the data, encoded for an existing student if it has its own tokenizer, else for the teacher."""
    base = open_task_model(config, reader_of(config), config.teacher.backend)
    if (own := own_tokenizer(config)) is not None:
        base = with_tokenizer(base.artifact, own)
        check_task(config, base)

    def prepare(folder: Path) -> Corpus:
        return teacher_data.prepare_taught(config, base, teachers, folder, session.say)

    corpus = session.prepare(prepare)
    teacher_data.check_teacher(config, corpus)
    return TaskData.open(config, base, corpus, session.say)


def reader_of(config: DistillConfig) -> Path:
    """Return the model whose tokenizer encodes the data, except for a new student with another one."""
    student = student_model(config)
    return student if student is not None and has_own_tokenizer(config) else Path(config.model)


def part_of(session: Session, plan: StudentPlan, student: Student, cache: SignalStore | None) -> Part:
    """Return how a student trains: on the teachers' outputs, live or cached; a baseline on the data alone."""
    data, teachers, model, config = plan.data, plan.teachers, student.model, plan.config
    is_plain = student.is_baseline or config.loss.name == "seq"

    def objective() -> Objective:
        if cache is None:
            teachers.move(session.runtime.device, session.runtime.dtype)
        elif not is_plain:
            teachers.free()
            head = dense_head(cache, session.runtime.device)
            return cached_objective(config, data, model, int(cache.record["vocab_size"]), head)
        return build_objective(config, data, teachers, model, channels=student.channels, is_plain=is_plain)

    def batches(*, shuffle: bool) -> BatchSource:
        if shuffle and cache is not None and not student.is_baseline:
            return CachedBatches(fixed_batches(data), cache)
        source = data.batches(model.config, shuffle=shuffle)
        if not is_plain and isinstance(source, AnswerBatches) and "other_documents" in data.corpus.others:
            tokens, trained = (data.corpus.others[name] for name in ("other_documents", "other_targets"))
            return AnswersInTwo(source, tokens, trained, teachers.artifact.config.max_positions)
        return source

    return Part(
        model=model,
        objective=objective,
        batches=batches,
        rows=data.rows(model.config),
        config=student.config,
        identity=identity(data.corpus, teacher=data.corpus.provenance["teacher"]["sha256"]),
        name=student.name,
        metric=data.metric,
        sample=data.sampler(model),
        score=data.score(model, session.runtime),
        has_own_budget=len(plan.names) > 1,
        keeps_start=not student.is_baseline,
    )


def compare(session: Session, plan: StudentPlan, student: Student, fitted: Fitted) -> Report:
    """Measure teacher and student on the same held-out rows, in all processes, and write `report.json`."""
    config, data, teachers, runtime = plan.config, plan.data, plan.teachers, session.runtime
    shape = student.model.config
    # A copy of the student in the weights that were kept, outside of any DDP or FSDP wrapper.
    teachers.move(runtime.device, runtime.dtype)
    trained = LanguageModel(shape)
    load_tensors(trained, {name: tensor.float() for name, tensor in with_tied(shape, fitted.weights).items()})
    models = {"teacher": teachers.computing[0].model, "student": trained.to(runtime.device)}
    has_same_tokens = tokenizer_sha256(teachers.artifact) == data.corpus.tokenizer.sha256
    train = session.config.train
    measured = {}
    if has_same_tokens:
        measured = measure_models(
            models,
            shape,
            config,
            data,
            teachers,
            train,
            runtime,
            channels=student.channels,
            max_tokens=fitted.state.eval_rows * train.seq_len or None,
        )
    held_out = data.batches(shape, shuffle=False)
    report = make_report(
        models,
        measured,
        before=fitted.before,
        after=fitted.after,
        scratch=plan.measured,
        batch=to_device(held_out.batch(range(min(held_out.n_rows, train.batch_size))), runtime.device),
        metric=data.metric,
        steps=fitted.state.step,
        rows=train.batch_size,
        flops=plan.costs,
        stages=config.stages,
        gate=config.max_drop,
        cut={key: value for key, value in student.cut.items() if key != "channels"},
        cost_ratio=plan.cost_ratio,
        device=runtime.device,
    )
    if runtime.is_main:
        write_json(session.folder / "report.json", report.record)
    return report


def note(summary: Mapping[str, Any]) -> str:
    """Return the student's size as a share of the teacher's, for the model card."""
    models = summary["report"]["models"]
    share = models["student"]["n_parameters"] / models["teacher"]["n_parameters"]
    return f"A student with {share:.0%} of the parameters of its teacher; the whole report is in `report.json`."


def closing(
    session: Session, model: LanguageModel, teachers: Teachers, report: Report, summary: Mapping[str, Any]
) -> str:
    """Return the report as a table, and a command that uses the student."""
    use = usage(model.config, summary["model"], is_bare=is_bare(teachers.artifact))
    return "\n".join([*render(report.record), f"report: {session.folder / 'report.json'}", f"next: {use}"])


JOB = Job(
    command="distill",
    config_class=DistillConfig,
    settle=settle,
    check=lambda config: check_distill(config, student_shape(config)),
    objective=lambda config: f"distill-{config.loss.name}",
    label=lambda config: label(config.model),
    run=distill,
)
