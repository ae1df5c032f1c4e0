"""`llmctl quantize`: a model, the same quantized, and what that costs and gains, measured on this machine."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.artifacts.find import usage
from llmctl.artifacts.hub import label, named
from llmctl.artifacts.load import is_bare
from llmctl.artifacts.with_adapters import read_model
from llmctl.benchmarking.compiled_step_check import prepare_library
from llmctl.config import QuantizeConfig
from llmctl.converting.export_gguf import prepare
from llmctl.converting.export_gguf import report as report_gguf
from llmctl.distilling import teacher_data
from llmctl.distilling.build_objective import build_objective
from llmctl.distilling.measure_models import measure_models, measuring_objective
from llmctl.distilling.teacher import Teachers
from llmctl.files import write_json
from llmctl.jobs.finish import Product
from llmctl.jobs.job import Job
from llmctl.jobs.session import Part, Session, identity
from llmctl.machine import give_back_memory
from llmctl.model.transformer import LanguageModel
from llmctl.quantizing.bit_allocation import check_budget
from llmctl.quantizing.codes import Codes, find_budget
from llmctl.quantizing.gguf_codes import GgufCodes
from llmctl.quantizing.report import make_report, render
from llmctl.quantizing.settings import check_quantize, find_plan, settle
from llmctl.runs.comparison import Report
from llmctl.training.batch import to_device
from llmctl.training.inputs import Fitted
from llmctl.training.objectives import Objective
from llmctl.training.task_data import TaskData, open_task_model


def quantize(session: Session, config: QuantizeConfig) -> None:
    """Encode the calibration data, choose codes, train them if asked, measure before and after, write the model."""
    original = Teachers(config)
    base = open_task_model(config, Path(config.model))
    corpus = session.prepare(lambda folder: teacher_data.prepare_taught(config, base, original, folder, session.say))
    teacher_data.check_teacher(config, corpus)
    data = TaskData.open(config, base, corpus, session.say)
    kind = GgufCodes if config.weights.gguf else Codes
    codes = kind(config, data, original.artifact, original.own, session.folder / "parts")
    session.lead(partial(codes.choose, session.say))
    give_back_memory()
    model = codes.learner() if codes.learns else codes.load(codes.chosen, session.runtime.device)
    fitted = session.fit(part_of(session, codes, original, model))
    report, model = compare(session, codes, original, model, fitted)
    session.finish(
        Product(
            model,
            corpus,
            fitted,
            data.metric,
            write=codes.write,
            provenance=provenance(config, original, data),
            facts=lambda: {"source": named(config.model), "report": report.record},
            note=partial(note, config),
            closing=partial(closing, session, codes, model, original, report),
            missed=report.missed,
            file=codes.file,
        )
    )


def part_of(session: Session, codes: Codes, original: Teachers, model: LanguageModel) -> Part:
    """Return how codes are trained on the outputs of the original model; or how it is measured, if they are not."""
    config, data = codes.config, codes.data

    def objective() -> Objective:
        original.move(session.runtime.device, session.runtime.dtype)
        model.to(session.runtime.device)
        if config.weights.report_tokens and not codes.learns:
            for teacher in original.computing:
                teacher.remember()
        make = build_objective if codes.learns else measuring_objective
        return make(config, data, original, model)

    return Part(
        model=model,
        objective=objective,
        batches=partial(data.batches, model.config),
        rows=data.rows(model.config),
        config=config,
        identity=identity(data.corpus, teacher=data.corpus.provenance["teacher"]["sha256"]),
        metric=data.metric,
        sample=data.sampler(model),
        score=data.score(model, session.runtime),
        keeps_start=codes.learns,
        trains=codes.learns,
        max_tokens=config.weights.report_tokens,
    )


def compare(
    session: Session, codes: Codes, original: Teachers, model: LanguageModel, fitted: Fitted
) -> tuple[Report, LanguageModel]:
    """Measure the model before and after on the same held-out rows and this machine; return it as it is used."""
    config, data, runtime = codes.config, codes.data, session.runtime
    before = original.computing[0].model
    models = {"before": before}
    # With trained codes the model is loaded anew, packed, as its users will run it.
    if codes.learns:
        session.lead(partial(codes.keep_learned, fitted))
        for name, file in (("chosen", codes.chosen), ("after", codes.learned)):
            models[name] = model = codes.load(file, runtime.device)
    # The metrics are to show the codes, not the rounding of what is multiplied by them.
    train = session.config.train
    max_tokens = fitted.state.eval_rows * train.seq_len or None
    measured = measure_models(
        models, model.config, config, data, original, train, runtime, max_tokens=max_tokens, exact=codes.learns
    )
    if runtime.is_main and not config.weights.gguf:
        prepare_library(session.say)
    score = data.score(before, runtime)
    if score is not None:
        measured["before"] |= score(max_tokens)
    held_out = data.batches(model.config, shuffle=False)
    facts = codes.facts()
    report = make_report(
        {"before": before, "after": model},
        {**measured, "after": fitted.after | measured.get("after", {})},
        batch=to_device(held_out.batch(range(1)), runtime.device),
        source=original.artifact,
        result_bytes=facts.n_bytes,
        result_layer_bits=facts.layer_bits,
        lost=facts.lost,
        settings=config,
        metric=data.metric,
        device=runtime.device,
        is_ours=not config.weights.gguf,
    )
    report.record.update(facts.more)
    if config.weights.gguf:
        report.record["gguf"]["path"] = str(session.run.record.get("out") or session.folder / codes.file)
    if runtime.is_main:
        write_json(session.folder / "report.json", report.record)
    return report, model


def provenance(config: QuantizeConfig, original: Teachers, data: TaskData) -> dict[str, Any]:
    """Return what the model was made from, and for what, for the model file."""
    objective = original.artifact.provenance.get("objective")
    made = {"quantized_from": data.corpus.provenance["teacher"]["sha256"], "weights": config.weights.scheme}
    return made | {"method": config.weights.method} | ({"objective": objective} if objective else {})


def note(config: QuantizeConfig, summary: Mapping[str, Any]) -> str:
    """Return bits, scheme and method for the model card."""
    bits, weights = summary["report"]["bits_per_weight"], config.weights
    return f"Weights in {bits:.2f} bits ({weights.gguf or weights.scheme}, {weights.method}); the whole report is in `report.json`."


def closing(
    session: Session, codes: Codes, model: LanguageModel, original: Teachers, report: Report, summary: Mapping[str, Any]
) -> str:
    """Return the report as a table, and a command that uses the model."""
    lines = [*render(report.record), f"report: {session.folder / 'report.json'}"]
    if codes.config.weights.gguf:
        return "\n".join([*lines, *report_gguf(report.record["gguf"])])
    use = usage(model.config, summary["model"], is_bare=is_bare(original.artifact))
    return "\n".join([*lines, f"next: {use}"])


def check(config: QuantizeConfig) -> None:
    """Refuse settings that contradict each other, a size that cannot be reached, and a model that GGUF cannot represent.

    Raises: UsageError, ArtifactError.
    """
    check_quantize(config)
    weights, source = config.weights, read_model(Path(config.model))
    if weights.gguf:
        prepare(source, Path(config.model))
    if weights.target_bpw or weights.target_size:
        check_budget(*find_budget(source, find_plan(source.config, config), config))


JOB = Job(
    command="quantize",
    config_class=QuantizeConfig,
    settle=settle,
    check=check,
    objective=lambda config: f"quantize-{config.weights.gguf or config.weights.scheme}",
    label=lambda config: label(config.model),
    run=quantize,
    suffix=lambda config: ".gguf" if config.weights.gguf else ".safetensors",
)
