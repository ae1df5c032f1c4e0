"""What a distillation trains, one after the other: baselines from scratch, intermediate students, the student.

Each is pruned from the one before or starts from fresh weights. What is pruned, and what has been trained, is kept in
`parts/`, so that a resumed run continues with the same models.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmctl.artifacts.load import load_model
from llmctl.config import DistillConfig, ModelConfig
from llmctl.distilling.baselines import SCRATCH, baseline_config, baseline_names, row_costs
from llmctl.distilling.build_objective import build_objective
from llmctl.distilling.cut_student import MeanLoss, cut_student
from llmctl.distilling.settings import base_shape, student_model, student_shape
from llmctl.distilling.student_shape import shape_between
from llmctl.distilling.student_tokenizer import own_tokenizer, transplanted
from llmctl.distilling.teacher import Teachers
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.parameters import count
from llmctl.model.transformer import LanguageModel, initialize, load_tensors, with_tied
from llmctl.runs.progress import Say
from llmctl.training.inputs import Fitted
from llmctl.training.task_data import TaskData

STAGE = "stage-"


@dataclass(frozen=True)
class Student:
    """A model that is trained in one part of a run.

    cut: how it was pruned. channels: the teacher's hidden channels that it kept; None is all of them.
    """

    name: str
    model: LanguageModel
    config: DistillConfig
    cut: dict[str, Any]
    channels: Sequence[int] | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether it learns from the data alone, from fresh weights."""
        return self.name.startswith(SCRATCH)


class StudentPlan:
    """The parts of a run by name, the run's own student last and without a name."""

    def __init__(self, config: DistillConfig, data: TaskData, teachers: Teachers, folder: Path) -> None:
        self.config, self.data, self.teachers, self.folder = config, data, teachers, folder
        self.existing = student_model(config)
        self.shape = student_shape(config)
        self.stages = [f"{STAGE}{number + 1}" for number in range(config.stages - 1)]
        self.baselines = baseline_names(config)
        self.names = [*self.baselines, *self.stages, ""]

    def is_done(self, name: str) -> bool:
        """Tell whether a part has been trained."""
        return (self.folder / name / "model.safetensors").exists()

    def cut(self, name: str, say: Say) -> None:
        """Prune the model of a part from the one before, unless an earlier start of the run did."""
        path = self.cut_file(name)
        if path is None or path.exists():
            return
        source, shape, student = self.source(name), self.part_shape(name), self.config.student
        say(f"pruning from {count(source.config):,} to {count(shape):,} parameters")
        # Rounded up: any budget of tokens takes at least one row, and 0 skips the refit.
        refit_rows = -(-student.refit_tokens // self.config.train.seq_len)
        cut = cut_student(
            source,
            shape,
            self.data.some_batches(source.config, student.calibration_rows),
            self.mean_loss(self.channels_of(self.previous(name))),
            pick=student.pick,
            say=say,
            refit_batches=self.data.some_batches(source.config, refit_rows) if refit_rows else [],
        )
        files, provenance = self.data.files(), {"cut": cut.report}
        write_artifact(path, cut.config, cut.state, files=files, provenance=provenance, force=True)

    def load(self, name: str) -> Student:
        """Return the model of a part before its training: pruned, existing, or with fresh weights."""
        path, cut = self.cut_file(name), {}
        if path is not None:
            artifact = read_artifact(path)
            model = LanguageModel(artifact.config)
            load_tensors(model, artifact.state(torch.float32))
            cut = artifact.provenance["cut"]
        elif self.existing is not None and not name:
            model = load_model(self.existing, device="cpu", dtype="float32").model
        else:
            model = LanguageModel(self.shape)
            initialize(model, self.config.train.seed)
        model.train()
        config = self.config
        if name in self.baselines:
            config = baseline_config(config, name, self.measured, lambda: self.cost_ratio)
        return Student(name, model, config, cut, self.channels_of(name) if cut else None)

    def keep(self, student: Student, fitted: Fitted, objective: str) -> None:
        """Write a trained part with its metrics, and remove its checkpoints."""
        provenance = {"objective": objective, "held_out": fitted.after, "steps": fitted.kept_step}
        shape, folder = student.model.config, self.folder / student.name
        state = {name: tensor.float().cpu() for name, tensor in with_tied(shape, fitted.weights).items()}
        write_artifact(folder, shape, state, files=self.data.files(), provenance=provenance, force=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now are they not needed any more

    def cut_file(self, name: str) -> Path | None:
        """Return where the pruned model of a part lies; None for a part that is not pruned."""
        if name in self.baselines or self.existing or self.config.student.init == "random":
            return None
        return self.folder / f"{name or 'student'}-cut.safetensors"

    def previous(self, name: str) -> str | None:
        """Return the stage that a part is pruned from; None for the teacher."""
        index = self.stages.index(name) if name else len(self.stages)
        return self.stages[index - 1] if index else None

    def source(self, name: str) -> LanguageModel:
        """Return what a part is pruned from: the teacher, or the student of the stage before."""
        previous = self.previous(name)
        if previous is None:
            teacher, own = self.teachers.original(), own_tokenizer(self.config)
            if own is None or teacher.tokenizer is None or own.sha256 == teacher.tokenizer.sha256:
                return teacher.model
            return transplanted(teacher.model, teacher.tokenizer, own, base_shape(self.config))
        return load_model(self.folder / previous, device="cpu", dtype="float32").model

    def channels_of(self, name: str | None) -> Sequence[int] | None:
        """Return the teacher's hidden channels that a pruned part has kept, over all stages; None is all of them."""
        path = None if name is None else self.cut_file(name)
        if name is None or path is None:
            return None
        return compose(self.channels_of(self.previous(name)), read_artifact(path).provenance["cut"].get("channels"))

    def part_shape(self, name: str) -> ModelConfig:
        """Return the shape that a part trains."""
        if name not in self.stages:
            return self.shape
        share = int(name.removeprefix(STAGE)) / self.config.stages
        return shape_between(base_shape(self.config), self.shape, share)

    def mean_loss(self, source_channels: Sequence[int] | None) -> MeanLoss:
        """Return what measures a model on the calibration rows: the data's loss, or the distance of hidden states.

        source_channels: the teacher's hidden channels that the model which is pruned has.
        """
        by_states = self.config.loss.name == "none"
        teachers = self.teachers.on_cpu()

        def measure(model: LanguageModel, channels: Sequence[int] | None) -> float:
            kept = compose(source_channels, channels)
            objective = build_objective(self.config, self.data, teachers, model, channels=kept, is_plain=not by_states)
            objective.eval()
            total = labels = 0.0
            with torch.no_grad():
                for batch in self.data.some_batches(model.config, self.config.student.calibration_rows):
                    loss = objective(batch)
                    total, labels = total + float(loss.sum), labels + float(loss.count)
            return total / max(labels, 1.0)

        return measure

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """The held-out metrics of the parts that are done, by name."""
        done = [name for name in self.names if name and self.is_done(name)]
        return {name: read_artifact(self.folder / name / "model.safetensors").provenance["held_out"] for name in done}

    @cached_property
    def costs(self) -> tuple[float, float]:
        """The FLOPs of a row: the student's forward and backward pass, and the teachers' forward passes."""
        return row_costs(self.config, self.data, self.shape)

    @property
    def cost_ratio(self) -> float:
        """The FLOPs of a step of the student with its teachers, over those of its own work."""
        own, teachers = self.costs
        return (own + teachers) / own


def compose(outer: Sequence[int] | None, inner: Sequence[int] | None) -> Sequence[int] | None:
    """Return the channels that remain when `inner` are kept of those in `outer`; None is all of them."""
    if outer is None or inner is None:
        return inner if outer is None else outer
    return [outer[index] for index in inner]
