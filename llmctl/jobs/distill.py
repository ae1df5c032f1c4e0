"""Distillation as a job: a teacher, a student cut out of it, text, and an honest report at the end.

A run has parts: baselines from fresh weights where they are asked for, the steps in which the student is cut, and last
the student itself. They are trained one after the other by the same loop; what an earlier one made lies in `parts/`.
"""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmctl.artifacts.load import is_bare, load_model
from llmctl.artifacts.with_adapters import identity_of, read_model
from llmctl.config import DistillConfig, ModelConfig
from llmctl.distilling.cut_student import cut_student
from llmctl.distilling.objectives import Distillation
from llmctl.distilling.report import make_report, render
from llmctl.distilling.settings import check_distill, student_model
from llmctl.distilling.student_shape import parse_student, shape_between
from llmctl.distilling.teacher_cache import CachedBatches, check_cache, content_of
from llmctl.files import write_json
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.teacher_signals import SignalStore
from llmctl.jobs.compression import Taught
from llmctl.losses.teachers import DenseTeacher
from llmctl.model.flops import row_flops
from llmctl.model.parameters import count
from llmctl.model.transformer import LanguageModel, initialize, load_tensors
from llmctl.runs.folder import Run
from llmctl.runs.progress import Say
from llmctl.training.batch import BatchSource, to_device
from llmctl.training.loop import Fitted, Training
from llmctl.training.objectives import Objective, token_bytes_of
from llmctl.training.task_data import (
    task_batches,
    task_rows,
)


class Distilling(Taught):
    """Make a student of a teacher."""

    command = "distill"
    config_class = DistillConfig
    config: DistillConfig

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config)
        self.part = ""

    @property
    def objective(self) -> str:
        """The loss and the task."""
        return f"distill-{self.config.loss.name}"

    @property
    def given(self) -> Path | None:
        """The student, where a model is named in place of a shape."""
        return student_model(self.config)

    def check(self) -> None:
        """Refuse settings that exclude each other."""
        check_distill(self.config, self.shape)

    # --- data --------------------------------------------------------------------------------------------------------

    @cached_property
    def shape(self) -> ModelConfig:
        """The student's shape."""
        given = self.given
        if given is not None:
            return read_model(given).config
        return parse_student(self.config.student.shape, read_model(Path(self.config.model)).config)

    # --- signals -----------------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> SignalStore | None:
        """The teacher's signals as they were written down, of these very rows; None without a cache."""
        if not self.config.teacher.cache:
            return None
        store = SignalStore.open(Path(self.config.teacher.cache))
        check_cache(store, self.cache_identity(), self.fixed_batches().n_rows)
        return store

    def fixed_batches(self) -> Any:
        """Return the training batches over rows that stay what they are in every epoch."""
        shape = self.base.model.config
        return task_batches(self.config, self.base, self.corpus, shape, shuffle=True, fixed=True)

    def cache_identity(self) -> dict[str, Any]:
        """Return what signals depend on: teachers, tokenizer, text, and how it is cut into rows."""
        config, corpus = self.config, self.corpus
        more = [identity_of(read_model(Path(name))) for name in config.teacher.more]
        masks = [config.data.mask_frac, config.data.whole_word, config.data.mean_span_tokens, config.train.seed]
        is_masked = config.task == "text" and self.base.model.config.family != "decoder"
        return {
            "teacher": "+".join([corpus.provenance["teacher"]["sha256"], *more]),
            "tokenizer": corpus.tokenizer.sha256,
            "data": content_of(corpus),
            "task": config.task,
            "seq_len": config.train.seq_len,
            "isolate": config.data.isolate,
            "masks": masks if is_masked else None,
        }

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def current(self) -> DistillConfig:
        """The config of the part that is trained: baselines have a learning rate, and steps, of their own."""
        if not self.part.startswith("scratch"):
            return self.config
        train, optim = self.config.train, self.config.optim
        stages = self.config.stages
        factor, share = self.baseline_plan(self.part)
        share *= stages
        steps, tokens = round(train.steps * share), round(train.tokens * share)
        train = replace(train, steps=steps, tokens=tokens, epochs=train.epochs * share)
        optim = replace(optim, lr=optim.lr * factor, muon_lr=optim.muon_lr * factor)
        return replace(self.config, train=train, optim=optim)

    def parts(self) -> Sequence[str]:
        """Return the baselines, the earlier stages, and the student."""
        names = []
        if self.config.baseline.enabled:
            names += [f"scratch-lr-{factor:g}" for factor in self.config.baseline.lr_factors]
            names += ["scratch-compute"] * self.config.baseline.compute
        return [*names, *(f"stage-{number + 1}" for number in range(self.config.stages - 1)), ""]

    def baseline_plan(self, part: str) -> tuple[float, float]:
        """Return a baseline's factor on the learning rate, and its steps as a share of the student's."""
        if part != "scratch-compute":
            return float(part.removeprefix("scratch-lr-")), 1.0
        best = min(self.scratch, key=lambda name: self.scratch[name]["loss"])
        return float(best.removeprefix("scratch-lr-")), self.cost_ratio

    @property
    def scratch(self) -> dict[str, Any]:
        """The figures of the baselines with the student's budget."""
        return {name: found for name, found in self.kept.items() if name.startswith("scratch-lr")}

    @property
    def kept(self) -> dict[str, dict[str, Any]]:
        """The held-out figures of the parts that are over, by name."""
        found = {}
        for name in self.parts():
            path = self.run / "parts" / name / "model.safetensors" if name else None
            if path is not None and path.exists():
                found[name] = read_artifact(path).provenance["held_out"]
        return found

    @cached_property
    def cost_ratio(self) -> float:
        """The FLOPs of a step of the student with its teachers, over those of its own work."""
        own, told = self.costs
        return (own + told) / own

    @property
    def costs(self) -> tuple[float, float]:
        """The FLOPs of a row: the student's forward and backward pass, and the teachers' forward passes."""
        rows = task_rows(self.config, self.base, self.shape)
        own = row_flops(self.shape, rows.source, rows.target, rows.label_frac)
        if self.config.loss.name == "seq":
            return own, 0.0
        if self.config.teacher.cache:
            return own, 0.0
        configs = [read_model(Path(name)).config for name in (self.config.model, *self.config.teacher.more)]
        return own, sum(row_flops(one, rows.source, rows.target, rows.label_frac) for one in configs) / 3

    def has_part(self, part: str, run: Path) -> bool:
        """Tell whether a part is over."""
        return (run / "parts" / part / "model.safetensors").exists()

    def prepare_part(self, part: str, run: Path, say: Say) -> None:
        """Cut the student, or its next stage; what is cut is kept, so that a resumed run goes on with the same."""
        self.run, self.part = run, part
        begins = self.beginning(part)
        if begins is None or begins.exists():
            return
        source = self.source(part)
        shape = self.part_shape(part)
        say(f"cutting {count(shape):,} parameters out of {count(source.config):,}")
        cut = cut_student(
            source,
            shape,
            self.calibration(source),
            self.mean_loss,
            pick=self.config.student.pick,
            say=say,
            refit_batches=self.refit_batches(source),
        )
        provenance = {"cut": cut.report}
        write_artifact(begins, cut.config, cut.state, files=self.files(), provenance=provenance, force=True)

    def beginning(self, part: str) -> Path | None:
        """Return the file of what a part begins with; None where that is fresh weights or a model that is there."""
        if part.startswith("scratch") or self.given or self.config.student.init == "random":
            return None
        return self.run / "parts" / f"{part or 'student'}-cut.safetensors"

    def source(self, part: str) -> LanguageModel:
        """Return what a part is cut out of: the teacher, or what came out of the stage before."""
        stages = [name for name in self.parts() if name.startswith("stage")]
        place = stages.index(part) if part else len(stages)
        if place == 0:
            return self.teacher.model
        return load_model(self.run / "parts" / stages[place - 1], device="cpu", dtype="float32").model

    def part_shape(self, part: str) -> ModelConfig:
        """Return the shape that a part trains."""
        if not part.startswith("stage"):
            return self.shape
        share = int(part.removeprefix("stage-")) / self.config.stages
        return shape_between(self.teacher.model.config, self.shape, share)

    def load_part(self, part: str, run: Path, say: Say) -> None:
        """Build what a part trains."""
        self.run, self.part = run, part
        given, begins = self.given, self.beginning(part)
        if begins is not None:
            artifact = read_artifact(begins)
            self.model = LanguageModel(artifact.config)
            load_tensors(self.model, artifact.state(torch.float32))
            self.cut = artifact.provenance["cut"]
        elif given is not None and not part:
            self.model = load_model(given, device="cpu", dtype="float32").model
            self.cut = {}
        else:
            self.model = LanguageModel(self.shape)
            initialize(self.model, self.config.train.seed)
            self.cut = {}
        self.model.train()
        del say

    def keep_part(self, part: str, run: Path, fitted: Fitted) -> None:
        """Keep what a part made, with its figures."""
        provenance = {"objective": self.objective, "held_out": fitted.after, "steps": fitted.kept_step}
        state = {name: tensor.float().cpu() for name, tensor in self.weights(fitted.weights).items()}
        folder = run / "parts" / part
        write_artifact(folder, self.model.config, state, files=self.files(), provenance=provenance, force=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # after what they were for is there

    def calibration(self, model: LanguageModel) -> list[dict[str, torch.Tensor]]:
        """Return training batches on which a model's parts are ranked."""
        return self.batches(model, self.config.student.calibration_rows)

    def refit_batches(self, model: LanguageModel) -> list[dict[str, torch.Tensor]]:
        """Return training batches on which the student's maps are solved for."""
        n_rows = -(-self.config.student.refit_tokens // self.config.train.seq_len)
        return self.batches(model, n_rows) if n_rows else []

    def mean_loss(self, model: LanguageModel) -> float:
        """Return a model's mean loss on the calibration rows: that of the data, or how far its states are off."""
        if self.config.loss.name == "none":
            for teacher in self.teachers:
                teacher.model.to("cpu", torch.float32)
        objective = self.objective_of(model, is_plain=self.config.loss.name != "none")
        objective.eval()
        nats = labels = 0.0
        with torch.no_grad():
            for batch in self.calibration(model):
                loss = objective(batch)
                nats, labels = nats + float(loss.sum), labels + float(loss.count)
        return nats / max(labels, 1.0)

    # --- training ----------------------------------------------------------------------------------------------------

    def make_objective(self) -> Objective:
        """Return what a part learns: a baseline and a reader of the teacher's texts learn labels, others the teacher."""
        is_plain = self.part.startswith("scratch") or self.config.loss.name == "seq"
        if self.store is None:
            self.move_teachers()
        if self.store is not None and not is_plain:
            self.__dict__.pop("teacher", None)  # from here on it is not needed, and takes memory
            return self.cached_objective(self.store)
        return self.objective_of(self.model, is_plain=is_plain)

    def cached_objective(self, store: SignalStore) -> Objective:
        """Return the objective that learns from signals."""
        head: DenseTeacher | None = None
        if store.kind == "hidden":
            told = {name: tensor.to(self.runtime.device) for name, tensor in store.head().items()}
            head = DenseTeacher(told["weight"].new_zeros(0), told["weight"], told.get("bias"))
        return Distillation(
            self.model,
            (),
            self.config.loss,
            token_bytes_of(self.corpus, self.model.config),
            chunk_tokens=self.config.train.loss_chunk_tokens,
            vocab_size=min(self.model.config.vocab_size, int(store.record["vocab_size"])),
            head=head,
        )

    def make_batches(self, *, shuffle: bool) -> BatchSource:
        """Return the batches of the task, with the teacher's signals where they were written down."""
        if shuffle and self.store is not None and not self.part.startswith("scratch"):
            return CachedBatches(self.fixed_batches(), self.store)
        return super().make_batches(shuffle=shuffle)

    # --- the report --------------------------------------------------------------------------------------------------

    def conclude(self, fitted: Fitted, training: Training) -> None:
        """Measure teacher, student and baselines on the same held-out rows, in all processes together."""
        runtime, source = training.runtime, self.make_batches(shuffle=False)
        self.__dict__.pop("teachers", None)
        self.move_teachers()
        student = LanguageModel(self.model.config)
        load_tensors(student, {name: tensor.float() for name, tensor in self.weights(fitted.weights).items()})
        student.to(runtime.device)

        models = {"teacher": self.teachers[0].model, "student": student}
        measured = self.side_by_side(models, training) if self.shares_words else {}
        own, told = self.costs
        self.report = make_report(
            models,
            measured,
            before=fitted.before,
            after=fitted.after,
            scratch=self.kept,
            batch=to_device(source.batch(range(min(source.n_rows, self.config.train.batch_size))), runtime.device),
            metric=training.metric,
            steps=fitted.state.step,
            rows=self.config.train.batch_size,
            flops=(own, told),
            stages=self.config.stages,
            gate=self.config.max_drop,
            cut={} if not self.cut else {key: value for key, value in self.cut.items() if key != "channels"},
            cost_ratio=self.cost_ratio,
            device=runtime.device,
        )
        if runtime.is_main:
            write_json(self.run / "report.json", self.report.record)

    def facts(self) -> dict[str, Any]:
        """Return what the report says."""
        assert self.report is not None
        return {"teacher": self.config.model, "report": self.report.record}

    def card_note(self, summary: Mapping[str, Any]) -> str:
        """Return what the student keeps of its teacher in a sentence."""
        found = summary["report"]["models"]
        share = found["student"]["n_parameters"] / found["teacher"]["n_parameters"]
        return f"A student with {share:.0%} of the parameters of its teacher; the whole report is in `report.json`."

    def closing(self, summary: Mapping[str, Any], run: Run) -> str:
        """Return the report as a table, and a command to use the student."""
        assert self.report is not None
        model = shlex.quote(summary["model"])
        use = {"encoder": f'llmctl fill -m {model} "a <mask> text"'}.get(self.model.config.family)
        use = use or f'llmctl generate -m {model} "a text"'
        if self.model.config.n_labels:
            use = f'llmctl classify -m {model} "a text"'
        elif is_bare(self.teacher.artifact):
            use = f"llmctl evaluate {model} -d pairs.csv --task similarity"
        return "\n".join([*render(self.report.record), f"report: {run.path / 'report.json'}", f"next: {use}"])
