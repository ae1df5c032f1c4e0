"""The stages of a compression after its plan is found: train the pruned model, quantize it, measure and write the file."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmctl.artifacts.find import usage
from llmctl.artifacts.hub import named
from llmctl.artifacts.load import is_bare, load_model
from llmctl.artifacts.with_adapters import identity_of, read_model
from llmctl.benchmarking.compiled_step_check import prepare_library
from llmctl.compressing import report as reports
from llmctl.compressing.room import WHOLE
from llmctl.compressing.search import Search, cost_of
from llmctl.compressing.settings import distill_config, has_budget, quantize_config, teaching, with_share
from llmctl.config import MIXED, CompressConfig, DistillConfig, QuantizeConfig
from llmctl.converting.export_onnx import FILES as ONNX_FILES
from llmctl.converting.export_onnx import FOLDER as ONNX_FOLDER
from llmctl.converting.export_onnx import export_onnx, rounded_for_onnx
from llmctl.distilling import settings as distilling
from llmctl.distilling.build_objective import build_objective
from llmctl.distilling.measure_models import measure_models, measuring_objective
from llmctl.distilling.teacher import Teachers
from llmctl.files import write_json
from llmctl.formats.artifact import WEIGHTS, read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.jobs.finish import Product, Write
from llmctl.jobs.quantize import part_of
from llmctl.jobs.session import Part, Session, identity
from llmctl.machine import give_back_memory
from llmctl.model.transformer import LanguageModel, load_tensors, with_tied
from llmctl.quantizing import settings as quantizing
from llmctl.quantizing.bit_allocation import parse_size
from llmctl.quantizing.codes import Codes
from llmctl.quantizing.gguf_codes import GgufCodes
from llmctl.quantizing.report import speeds
from llmctl.runs.comparison import Report
from llmctl.training.batch import to_device
from llmctl.training.held_out import rows_with
from llmctl.training.inputs import Fitted
from llmctl.training.objectives import Objective
from llmctl.training.task_data import TaskData

LEARNED_BITS = 5.0
"""From this mean of bits per weight on, training scales gains nothing worth its time."""


class Costs:
    """What the stages of a run cost, measured on the sample that the plan was chosen on."""

    def __init__(self, search: Search, plan: Mapping[str, Any]) -> None:
        self.search, self.plan = search, plan

    def of(self, name: str, model: LanguageModel) -> dict[str, float]:
        """Return cost and perplexity of a model, kept under a name so that a resumed run knows them."""
        path = self.search.folder / f"cost-{name}.json"
        if path.exists():
            found: dict[str, float] = reports.read_json(path)
            return found
        ground, measured = self.search.ground_of(self.plan["plan"]["vocabulary"]), self.search.known()
        found = {"cost": cost_of(ground, model, measured)}
        if measured.loss:
            loss, _ = ground.loss(model)
            found["perplexity"] = math.exp(min(loss / max(measured.labels, 1.0), 700.0))
        write_json(path, found)
        return found

    def stages(self) -> list[dict[str, Any]]:
        """Return the stages before the last, with their costs."""
        best, loss = min(self.plan["trials"], key=lambda one: one["cost"]), self.plan["loss"]
        stages: list[dict[str, Any]] = [{"stage": "original", "cost": 0.0}]
        if loss:
            stages[0]["perplexity"] = math.exp(min(loss, 700.0))
        if self.plan["plan"]["vocabulary"] != self.search.shape.vocab_size or self.plan["cut"]:
            stages.append({"stage": "trimmed and pruned", "cost": best["cost_before_bits"]})
        if self.plan["plan"]["table"] != WHOLE:
            stages.append({"stage": "quantized without training", "cost": best["cost"]})
        path = self.search.folder / "cost-healed.json"
        if path.exists():
            stages.append({"stage": "trained, not quantized", **reports.read_json(path)})
        return stages


@dataclass(frozen=True)
class Work:
    """A compression whose plan is found.

    plan: with the paths of the model with the plan's vocabulary (`teacher`) and of the pruned one (`cut`, empty if nothing is
    pruned). data: encoded for that vocabulary.
    """

    session: Session
    config: CompressConfig
    plan: Mapping[str, Any]
    data: TaskData
    teachers: Teachers
    costs: Costs


@dataclass(frozen=True)
class Output:
    """What writes the file, its name, more for the report, and the file whose size is asked for, if it is another one."""

    write: Write
    file: str = WEIGHTS
    more: Mapping[str, Any] = field(default_factory=dict)
    sized: str = ""


def heal(work: Work) -> Path:
    """Train the pruned model of a plan on the outputs of the unpruned one; return where it lies."""
    session, plan, data, teachers = work.session, work.plan, work.data, work.teachers
    if not plan["cut"]:
        return Path(plan["teacher"])
    out = session.folder / "parts" / "healed"
    if session.runtime.first((out / "model.safetensors").exists()):
        return out
    settings = heal_settings(work.config, plan)
    if settings is None:
        return Path(plan["cut"])
    artifact = read_artifact(Path(plan["cut"]))
    model = LanguageModel(artifact.config)
    load_tensors(model, artifact.state(torch.float32))
    model.train()
    channels = artifact.provenance["cut"].get("channels")

    def objective() -> Objective:
        teachers.move(session.runtime.device, session.runtime.dtype)
        return build_objective(settings, data, teachers, model, channels=channels)

    part = Part(
        model=model,
        objective=objective,
        batches=partial(data.batches, model.config),
        rows=data.rows(model.config),
        config=settings,
        identity=identity(data.corpus),
        name="healing",
        metric=data.metric,
        sample=data.sampler(model),
        score=data.score(model, session.runtime),
        has_own_budget=True,
        keeps_start=True,
    )
    fitted = session.fit(part)

    def keep() -> None:
        state = {name: one.float().cpu() for name, one in with_tied(model.config, fitted.weights).items()}
        provenance = {"held_out": fitted.after, "steps": fitted.kept_step}
        trained = LanguageModel(model.config)
        load_tensors(trained, state)
        work.costs.of("healed", trained)
        write_artifact(out, model.config, state, files=data.files(), provenance=provenance, force=True)
        shutil.rmtree(session.folder / "parts" / "healing" / "checkpoints", ignore_errors=True)

    session.lead(keep)
    teachers.free()
    give_back_memory()
    return out


def heal_settings(config: CompressConfig, plan: Mapping[str, Any]) -> DistillConfig | None:
    """Return the settings of the training after pruning; None without a budget for it."""
    share = 1.0 if plan["plan"]["table"] == WHOLE else config.plan.train_frac
    settings = distill_config(config, Path(plan["teacher"]))
    train = with_share(settings.train, share)
    if not has_budget(train):
        return None
    settings = replace(settings, train=train, student=replace(settings.student, shape=plan["cut"]))
    return distilling.settle(settings)


def quantized(work: Work, source: Path) -> Product:
    """Quantize the model of a plan within the size, and return the product with its report."""
    session, config = work.session, work.config
    if work.plan["plan"]["table"] == WHOLE:
        return whole(work, source)
    settings = quantize_settings(config, work.plan, source)
    artifact = read_model(source)
    kind = GgufCodes if config.format == "gguf" else Codes

    def own() -> LanguageModel:
        return load_model(source, device="cpu", dtype="float32").model

    codes = kind(settings, work.data, artifact, own, session.folder / "parts")
    session.lead(partial(codes.choose, session.say))
    give_back_memory()
    model = codes.learner() if codes.learns else codes.load(codes.chosen, session.runtime.device)

    fitted = session.fit(replace(part_of(session, codes, work.teachers, model), has_own_budget=True))
    if codes.learns:
        session.lead(partial(codes.keep_learned, fitted))
    result = codes.load(codes.final, session.runtime.device)
    facts = codes.facts()
    report = compare(work, result)
    more = {"bits_per_weight_layers": facts.layer_bits, **facts.more}
    return product(work, result, fitted, report, Output(codes.write, codes.file, more))


def quantize_settings(config: CompressConfig, plan: Mapping[str, Any], source: Path) -> QuantizeConfig:
    """Return the settings of the quantization: trained scales where the bits are few and there is a budget."""
    is_gguf = config.format == "gguf"
    share = 1.0 - config.plan.train_frac if plan["cut"] else 1.0
    train = with_share(config.train, share)
    learns = has_budget(train) and plan["plan"]["bits"] < LEARNED_BITS
    method = config.weights.method if config.weights.method != "auto" else "learned" if learns else "guided"
    size = parse_size(config.size, "--to") - plan["overhead"]
    settings = quantize_config(
        replace(config, train=train),
        source,
        scheme="int4",
        method=method,
        target_size=str(size),
        embedding="int8" if is_gguf else plan["plan"]["table"],
        gguf=MIXED if is_gguf else "",
    )
    return quantizing.settle(settings)


def whole(work: Work, source: Path) -> Product:
    """Return a product whose weights all have the same bits: 16, or 8 in an ONNX file beside them."""
    session, data, teachers = work.session, work.data, work.teachers
    settings = quantizing.settle(quantize_config(work.config, source, method="guided"))
    model = load_model(source, device="cpu", dtype="float32").model
    is_onnx = work.config.format == "onnx"
    computed = rounded_for_onnx(source) if is_onnx else model

    def objective() -> Objective:
        teachers.move(session.runtime.device, session.runtime.dtype)
        return measuring_objective(settings, data, teachers, computed)

    fitted = session.fit(
        Part(
            model=computed,
            objective=objective,
            batches=partial(data.batches, model.config),
            rows=data.rows(model.config),
            config=settings,
            identity=identity(data.corpus),
            metric=data.metric,
            score=data.score(computed, session.runtime),
            trains=False,
            max_tokens=settings.weights.report_tokens,
        )
    )
    report = compare(work, computed)

    def write(folder: Path, provenance: Mapping[str, Any]) -> None:
        state = {name: tensor.bfloat16() if tensor.dim() > 1 else tensor for name, tensor in model.state_dict().items()}
        if is_onnx:  # first: beside other weights than these it would not be written
            export_onnx(source, folder, int8=True, force=True)
        write_artifact(folder, model.config, state, files=data.files(), provenance=provenance, force=True)

    sized = f"{ONNX_FOLDER}/{ONNX_FILES['int8']}" if is_onnx else ""
    return product(work, model, fitted, report, Output(write, sized=sized))


def compare(work: Work, model: LanguageModel) -> Report:
    """Measure the result and the model with its vocabulary on held-out rows, and the result on the sample as well."""
    session, config, data, teachers, costs = work.session, work.config, work.data, work.teachers, work.costs
    runtime, train = session.runtime, config.train
    max_tokens = None
    if config.weights.report_tokens:
        held_out = data.batches(model.config, shuffle=False)
        max_tokens = rows_with(held_out, config.weights.report_tokens, train.seq_len) * train.seq_len
    settings = teaching(config, Path(costs.plan["teacher"]))
    result = session.lead(lambda: costs.of("result", model))
    teachers.move(runtime.device, runtime.dtype)
    models = {"teacher": teachers.computing[0].model, "after": model}
    measured = measure_models(
        models, model.config, settings, data, teachers, train, runtime, max_tokens=max_tokens, exact=True
    )
    if runtime.is_main and config.format == "single":
        prepare_library(session.say)
        batch = to_device(data.batches(model.config, shuffle=False).batch(range(1)), runtime.device)
        for name, one in models.items():
            measured[name] |= speeds(one, batch)[0]
    stages = [*costs.stages(), {"stage": "result", **result}]
    seconds = time.monotonic() - session.started
    return reports.make_report(config, costs.plan, measured, data.metric, stages=stages, seconds=seconds)


def product(work: Work, model: LanguageModel, fitted: Fitted, report: Report, output: Output) -> Product:
    """Return what the run leaves."""
    session, config = work.session, work.config

    def finished_write(folder: Path, provenance: Mapping[str, Any]) -> None:
        output.write(folder, provenance)
        report.record.update(output.more)
        report.record["bytes"] = (folder / (output.sized or output.file)).stat().st_size
        report.record["bytes_before"] = reports.file_bytes(read_model(Path(config.model)))
        write_json(session.folder / "report.json", report.record)

    def closing(summary: Mapping[str, Any]) -> str:
        artifact = read_model(Path(config.model))
        use = usage(model.config, summary["model"], is_bare=is_bare(artifact))
        lines = [*reports.render(report.record, artifact.config), f"report: {session.folder / 'report.json'}"]
        return "\n".join([*lines, *([] if config.format == "gguf" else [f"next: {use}"])])

    return Product(
        model,
        work.data.corpus,
        fitted,
        work.data.metric,
        write=finished_write,
        provenance={"compressed_from": identity_of(read_model(Path(config.model))), "plan": dict(work.plan["plan"])},
        facts=lambda: {"source": named(config.model), "report": report.record},
        note=reports.note,
        closing=closing,
        missed=report.missed,
        file=output.file,
    )
