"""A job on a model that comes out of another: it learns from the other, is held against it, or both."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmctl.artifacts.load import Loaded, fitting_tokenizer, load_model, without_weights
from llmctl.artifacts.with_adapters import identity_of, read_model
from llmctl.config import TaughtConfig
from llmctl.distilling.objectives import Distillation, LabelDistillation, Matching, StateDistillation
from llmctl.distilling.on_policy import Writer
from llmctl.distilling.teacher import Teacher, check_same_words, load_more, tokenizer_sha256
from llmctl.distilling.teacher_texts import write_texts
from llmctl.distributed.runtime import Runtime
from llmctl.errors import ArtifactError
from llmctl.jobs.generation_scores import make_sampler, make_score
from llmctl.jobs.job import Job
from llmctl.model.flops import Rows
from llmctl.model.transformer import LanguageModel
from llmctl.preparing.corpus import keep_corpus, open_corpus
from llmctl.runs.progress import Say
from llmctl.training.batch import BatchSource, to_device
from llmctl.training.held_out import measure
from llmctl.training.loop import Training
from llmctl.training.objectives import Objective, label_prediction, token_bytes_of
from llmctl.training.samples import Sampler
from llmctl.training.task_data import (
    check_task,
    check_task_corpus,
    metric_of,
    prepare_task,
    task_batches,
    task_rows,
    text_config,
)

if TYPE_CHECKING:
    from llmctl.runs.comparison import Report


class Taught(Job):
    """What jobs with a teacher share: the data, the teachers, the objectives over them, and figures side by side."""

    config: TaughtConfig
    reader: ClassVar[str] = "the student learns from"
    cut: dict[str, Any]

    def __init__(self, config: TaughtConfig) -> None:
        super().__init__(config)
        self.report: Report | None = None
        self.cut = {}

    @property
    def given(self) -> Path | None:
        """The model that learns, where it is there already."""
        return None

    @property
    def label(self) -> str:
        """The teacher's name."""
        return Path(self.config.model).name.removesuffix(".safetensors")

    @cached_property
    def teacher(self) -> Loaded:
        """The teacher, in float32 on the CPU."""
        return load_model(Path(self.config.model), device="cpu", dtype="float32")

    @cached_property
    def base(self) -> Loaded:
        """What the data is encoded for, without weights: the student where its tokenizer is another, else the teacher.

        Raises: UsageError for one without a tokenizer, or a task that it does not have.
        """
        given = self.given
        path = Path(self.config.model) if self.config.loss.name != "seq" or given is None else given
        artifact = read_model(path)
        loaded = Loaded(without_weights(artifact.config), fitting_tokenizer(artifact), artifact)
        check_task(self.config, loaded)
        return loaded

    def prepare(self, folder: Path, say: Say) -> None:
        """Read, split and encode the text; let the teacher write it again where its texts are learned."""
        given = self.given
        if given is not None and self.config.loss.name != "seq":
            check_same_words(self.config.model, str(given))
        if not self.config.data.paths:
            say(f"no --data: {self.reader} the embedded default corpus, which is small and of one kind")
        config = self.config
        if config.loss.name == "seq":
            config = write_texts(config, self.teacher, folder / "written", say)
        corpus = prepare_task(config, self.base, folder, say)
        sha256 = identity_of(read_model(Path(self.config.model)))
        corpus.provenance["teacher"] = {"path": self.config.model, "sha256": sha256}
        keep_corpus(corpus, folder)

    def load(self, folder: Path, say: Say) -> None:
        """Open the text.

        Raises: ArtifactError if the teacher is not the one that the run was begun with.
        """
        self.corpus = open_corpus(folder)
        begun_with = self.corpus.provenance["teacher"]["sha256"]
        if identity_of(read_model(Path(self.config.model))) != begun_with:
            raise ArtifactError(
                f"`{self.config.model}` is not the teacher that this run was begun with ({begun_with[:12]})",
                "put it back, or start a new run",
            )
        self.metric = metric_of(self.config, self.corpus, say)
        check_task_corpus(self.config, self.base, self.corpus)

    @cached_property
    def shares_words(self) -> bool:
        """Whether teacher and student mean the same by a token, so that one can be measured on the other's rows."""
        return tokenizer_sha256(read_model(Path(self.config.model))) == self.corpus.tokenizer.sha256

    @cached_property
    def teachers(self) -> list[Teacher]:
        """All teachers, where they compute."""
        return [Teacher(self.teacher.model), *load_more(self.teacher, self.config.teacher.more, self.config.model)]

    def batches(self, model: LanguageModel, n_rows: int) -> list[dict[str, torch.Tensor]]:
        """Return training batches on which a model's parts are measured."""
        source = task_batches(self.config, self.base, self.corpus, model.config, shuffle=True)
        rows = min(n_rows, source.n_rows)
        size = min(8, rows)
        cpu = torch.device("cpu")
        return [to_device(source.batch(range(first, min(first + size, rows))), cpu) for first in range(0, rows, size)]

    def make_batches(self, *, shuffle: bool) -> BatchSource:
        """Return the batches of the task."""
        return task_batches(self.config, self.base, self.corpus, self.model.config, shuffle=shuffle)

    def rows(self) -> Rows:
        """Return the rows of a step, as full as they can be."""
        return task_rows(self.config, self.base, self.model.config)

    def move_teachers(self) -> None:
        """Have the teachers where training is, as it computes or in fewer bits."""
        for teacher in self.teachers:
            teacher.to(self.runtime.device, self.config.teacher.dtype, self.runtime.dtype)

    def objective_of(self, model: LanguageModel, *, is_plain: bool, measures: bool = False) -> Objective:
        """Return the objective over a model: the data's alone, or the teacher's."""
        loss, train = self.config.loss, self.config.train
        if model.config.n_labels:
            told = replace(loss, weight=0.0) if is_plain else loss
            return LabelDistillation(model, self.teachers, told, train.label_smoothing)
        if loss.name == "none":
            return StateDistillation(model, self.teachers, self.matching())
        if is_plain and not measures:
            return label_prediction(model, self.corpus, train)
        if measures:
            loss = replace(loss, name="fkl", temperature=1.0, weight=1.0)
        return Distillation(
            model,
            self.teachers,
            loss,
            token_bytes_of(self.corpus, model.config),
            matching=Matching() if measures else self.matching(),
            chunk_tokens=train.loss_chunk_tokens,
            vocab_size=min(model.config.vocab_size, *(teacher.model.config.vocab_size for teacher in self.teachers)),
            writer=Writer(loss.on_policy, loss.on_policy_tokens) if loss.on_policy and not measures else None,
        )

    def matching(self) -> Matching:
        """Return what is matched besides predictions."""
        loss = self.config.loss
        channels = self.cut.get("channels")
        is_masked = self.config.task == "text" and text_config(self.config, self.base).objective == "mlm"
        return Matching(
            kind=loss.match,
            weight=loss.match_weight,
            layer=loss.match_layer,
            relation_heads=loss.relation_heads,
            labels_frac=self.config.data.mask_frac if is_masked else 1.0,
            channels=None if channels is None else torch.tensor(channels),
        )

    def make_sampler(self, folder: Path) -> Sampler | None:
        """Return what answers a few held-out examples."""
        del folder
        return None if self.model.config.n_labels else make_sampler(self, self.base.artifact)

    def make_score(self, runtime: Runtime) -> Callable[[int | None], dict[str, float]] | None:
        """Return what lets the model write and compares, for tasks that are about texts."""
        return make_score(self, self.base.artifact, runtime)

    def identity(self) -> dict[str, str]:
        """Return what all processes must have in common."""
        return super().identity() | {"teacher": self.corpus.provenance["teacher"]["sha256"]}

    def files(self) -> dict[str, bytes]:
        """Return what lay beside the teacher."""
        return {**self.base.artifact.files, **super().files()}

    def provenance(self) -> dict[str, Any]:
        """Return the teacher, the task's template, and what the teacher's own objective was."""
        template = self.corpus.provenance.get("task", {}).get("template")
        objective = self.teacher.artifact.provenance.get("objective")
        told = {"teacher": self.corpus.provenance["teacher"]["sha256"]} | (
            {"objective": objective} if objective else {}
        )
        return told | ({"template": template} if template else {})

    def side_by_side(
        self, models: dict[str, LanguageModel], training: Training, *, exact: bool = False
    ) -> dict[str, dict[str, float]]:
        """Return the figures of models, and how far each is from the teacher, on the same held-out rows.

        exact: without rounding what goes through them to bfloat16 where training does.
        """
        runtime, source = training.runtime, self.make_batches(shuffle=False)
        is_narrow = runtime.dtype == torch.bfloat16 and not exact

        def figures(model: LanguageModel) -> dict[str, float]:
            objective = self.objective_of(model, is_plain=False, measures=self.config.loss.name != "none")
            with torch.autocast(runtime.device.type, torch.bfloat16, enabled=is_narrow):
                return measure(
                    objective, objective, source, self.config.train, runtime, None, lambda: None, sharded=False
                )

        return {name: figures(model) for name, model in models.items()}

    def missed(self) -> str:
        """Return which gate was missed, or nothing."""
        return self.report.missed if self.report else ""
