"""Fine-tuning as a job: a model that is there, examples of a task, and all its weights or an adapter beside them."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llmctl.artifacts.adapters import save_adapter
from llmctl.artifacts.heads import with_head
from llmctl.artifacts.load import Loaded, load_model
from llmctl.artifacts.with_adapters import identity_of, read_model
from llmctl.config import FinetuneConfig, QuantizeConfig, WeightsConfig
from llmctl.distributed.runtime import Runtime
from llmctl.errors import ArtifactError, UsageError
from llmctl.formats.artifact_write import write_artifact
from llmctl.jobs.generation_scores import make_sampler, make_score
from llmctl.jobs.job import Job
from llmctl.machine import give_back_memory
from llmctl.model.flops import Rows
from llmctl.model.lora import add_adapters, merge_adapters
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel
from llmctl.preparing.corpus import keep_corpus, open_corpus
from llmctl.preparing.examples import chat_of
from llmctl.quant.schemes import Scheme
from llmctl.quantizing.fake_quant import learned_state, rounding
from llmctl.quantizing.qlora_base import BASE, BITS, write_packed_base
from llmctl.quantizing.settings import plan_of
from llmctl.runs.folder import Run
from llmctl.runs.progress import Say
from llmctl.training.batch import BatchSource
from llmctl.training.loop import Fitted
from llmctl.training.objectives import Classification, Objective, label_prediction
from llmctl.training.samples import Sampler
from llmctl.training.settings import check_shared
from llmctl.training.task_data import (
    check_task,
    check_task_corpus,
    labels_of_corpus,
    metric_of,
    prepare_task,
    task_batches,
    task_rows,
)

FULL_LR, ADAPTER_FACTOR, REFERENCE_PARAMETERS = 5e-5, 10.0, 110e6
SMALLEST_LR, LARGEST_LR = 1e-5, 1e-3
DEFAULT_EPOCHS = 3.0

QUANTIZES = ("qlora", "qdora")
"""Methods that hold the base in four bits, also where it was not."""


def settle(config: FinetuneConfig) -> FinetuneConfig:
    """Give a run the budget, the rows and the learning rate that its model asks for, so that its recipe says them.

    Learning rates fall with the root of the model's size, from BERT-base's 5e-5 (Devlin et al. 2019, A.3); adapters
    take ten times as much (Schulman et al. 2025, "LoRA Without Regret").
    Raises: NotFoundError or ArtifactError for a model that is not there or damaged.
    """
    train, optim = config.train, config.optim
    artifact = read_model(Path(config.model))
    shape = artifact.config
    in_few_bits = config.method in QUANTIZES or (artifact.schemes and config.method != "full")
    if config.qat or in_few_bits:  # neither has a copy in bfloat16
        train = replace(train, master_weights=False)
    if not (train.steps or train.tokens or train.minutes or train.epochs):
        train = replace(train, epochs=DEFAULT_EPOCHS)
    train = replace(train, seq_len=min(train.seq_len, shape.max_positions))
    if not optim.lr:
        n_parameters = sum(int(np.prod(dims)) for dims in parameter_shapes(shape).values())
        factor = 1.0 if config.method == "full" else ADAPTER_FACTOR
        rate = factor * FULL_LR * (REFERENCE_PARAMETERS / n_parameters) ** 0.5
        rate = min(max(rate, SMALLEST_LR), LARGEST_LR * (1.0 if config.method == "full" else 2.0))
        optim = replace(optim, lr=float(f"{rate:.2g}"))
    return replace(config, train=train, optim=optim)


class Finetuning(Job):
    """Adapt a model to a task."""

    command = "finetune"
    config_class = FinetuneConfig
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, *, shows_example: bool = False) -> None:
        super().__init__(config)
        self.shows_example = shows_example

    @property
    def objective(self) -> str:
        """The task."""
        return self.config.task

    @property
    def label(self) -> str:
        """The task and the model."""
        return f"{self.config.task}-{Path(self.config.model).name.removesuffix('.safetensors')}"

    def check(self) -> None:
        """Refuse settings that exclude each other."""
        check_shared(self.config)
        if not self.config.data.paths:
            raise UsageError("no data to fine-tune on", "llmctl finetune MODEL DATA --task TASK")
        if self.config.task != "classify" and self.config.labels:
            raise UsageError("`labels` are for `--task classify`", "leave them away")
        if self.config.qat and self.config.method != "full":
            raise UsageError(f"`--qat` trains all weights, not `--method {self.config.method}`", "leave one out")

    @cached_property
    def base(self) -> Loaded:
        """The model to adapt, in float32 on the CPU.

        Raises: UsageError for a model that has no tokenizer or cannot be trained on the task.
        """
        return self.open_base(Path(self.config.model))

    def open_base(self, path: Path) -> Loaded:
        """Load what lies under the adapter, or what all weights are trained of."""
        packed = self.config.method != "full"  # an adapter leaves the base in its few bits
        base = load_model(path, device="cpu", dtype="float32", packed=packed)
        check_task(self.config, base)
        return base

    def packed_base(self, folder: Path) -> Path:
        """Return where a base lies that the run has put in few bits: with the adapter, or with what goes at the end."""
        return (folder if self.config.merge else folder.parent) / BASE

    def prepare(self, folder: Path, say: Say) -> None:
        """Read, examine, split and encode the examples; put the base in few bits where the method asks for it."""
        corpus = prepare_task(self.config, self.base, folder, say, shows_example=self.shows_example)
        told = {}
        if self.config.method in QUANTIZES and not self.base.artifact.schemes:
            told = write_packed_base(self.base, self.packed_base(folder))
            del self.base  # all of the full weights goes before the next are there
            give_back_memory()
            self.base = self.open_base(self.packed_base(folder))
        base = {"path": self.config.model, "sha256": identity_of(self.base.artifact)}
        corpus.provenance["base"] = base | told
        keep_corpus(corpus, folder)

    def load(self, folder: Path, say: Say) -> None:
        """Open the examples; give the model its head and its adapter.

        Raises: ArtifactError if the model is not the one that the run was begun with.
        """
        self.corpus = open_corpus(folder)
        if self.is_packed_here:
            self.base = self.open_base(self.packed_base(folder))
        begun_with = self.corpus.provenance["base"]["sha256"]
        if identity_of(self.base.artifact) != begun_with:
            raise ArtifactError(
                f"`{self.base.artifact.path}` is not the model that this run was begun with ({begun_with[:12]})",
                "put it back, or start a new run",
            )
        self.model = self.base.model
        self.metric = metric_of(self.config, self.corpus, say)
        check_task_corpus(self.config, self.base, self.corpus)
        if self.config.task == "classify":
            labels = labels_of_corpus(self.corpus)
            n_outputs = len(labels.names) or self.corpus.arrays["values"].shape[1]
            seed = self.config.train.seed
            self.model = with_head(self.base, labels, n_outputs, pooling=self.config.pooling, seed=seed)
        if self.config.qat:
            self.model = rounding(self.model, self.schemes)
            say(f"training through the rounding of {len(self.schemes)} layers to {self.config.qat}")
        self.model.train()
        self.held = self.model.schemes
        if self.config.method != "full":
            layers = self.adapt(self.model)
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            share = trained / self.model.n_parameters
            held = f" held in {BITS} bits" if self.is_packed_here else ""
            what = f"{self.config.method} of rank {self.config.adapter.rank} on {len(layers)} layers{held}"
            say(f"{what}: {trained:,} parameters trained, {share:.2%} of all")

    @property
    def is_packed_here(self) -> bool:
        """Whether the base is one that this run has put in few bits."""
        return "quantised_from" in self.corpus.provenance["base"]

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every module that is held in few bits; none without `qat`."""
        if not self.config.qat:
            return {}
        return plan_of(self.model.config, QuantizeConfig(weights=WeightsConfig(scheme=self.config.qat)))

    def adapt(self, model: LanguageModel) -> list[str]:
        """Give a model the adapters of this run, and return the layers that have one."""
        adapter = self.config.adapter
        return add_adapters(
            model,
            rank=adapter.rank,
            alpha=adapter.alpha,
            targets=adapter.targets,
            dropout=adapter.dropout,
            dora=self.config.method.endswith("dora"),
            seed=self.config.train.seed,
        )

    def rows(self) -> Rows:
        """Return the rows of a step, as full as they can be."""
        return task_rows(self.config, self.base, self.model.config)

    def make_objective(self) -> Objective:
        """Return classification, or label prediction."""
        if self.config.task == "classify":
            return Classification(self.model, self.config.train.label_smoothing)
        return label_prediction(self.model, self.corpus, self.config.train)

    def make_batches(self, *, shuffle: bool) -> BatchSource:
        """Return the batches of the task."""
        return task_batches(self.config, self.base, self.corpus, self.model.config, shuffle=shuffle)

    def make_sampler(self, folder: Path) -> Sampler | None:
        """Return what answers a few held-out examples."""
        del folder
        return make_sampler(self, self.base.artifact) if self.config.task != "classify" else None

    def make_score(self, runtime: Runtime) -> Callable[[int | None], dict[str, float]] | None:
        """Return what lets the model write and compares, for tasks that are about texts."""
        return make_score(self, self.base.artifact, runtime)

    def identity(self) -> dict[str, str]:
        """Return what all processes must have in common."""
        return super().identity() | {"model": self.corpus.provenance["base"]["sha256"]}

    def files(self) -> dict[str, bytes]:
        """Return what lay beside the base, and the template that conversations were rendered with."""
        files = {**self.base.artifact.files, **super().files()}
        return files | chat_of(self.base).files() if self.config.task == "chat" else files

    def provenance(self) -> dict[str, Any]:
        """Return the template that prompts were filled into, for whoever uses the model."""
        template = self.corpus.provenance.get("task", {}).get("template")
        return {"template": template} if template else {}

    def write(self, folder: Path, fitted: Fitted, provenance: Mapping[str, Any]) -> None:
        """Write the adapter, or the whole model."""
        if self.config.qat:
            state = learned_state({name: tensor.cpu() for name, tensor in fitted.weights.items()}, self.schemes)
            shape = self.model.config
            files, told = self.files(), {**provenance, "weights": self.config.qat}
            write_artifact(folder, shape, state, files=files, provenance=told, schemes=self.schemes, force=True)
            return
        if self.config.method == "full" or self.config.merge:
            super().write(folder, fitted, provenance)
            return
        save_adapter(
            self.trained_model(fitted.weights),
            folder,
            base=self.base.artifact,
            provenance=provenance,
            files=self.files(),
            force=True,
        )

    def trained_model(self, weights: Mapping[str, Tensor]) -> LanguageModel:
        """Return the trained model in one piece, whatever processes it was shared out to."""
        model = LanguageModel(self.model.config)
        if self.config.method != "full":
            model.quantize(self.held)
            self.adapt(model)
        model.load_state_dict(super().weights(weights))
        return model

    def weights(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's state with the adapter in its weights."""
        if self.config.method == "full":
            return super().weights(trained)
        model = self.trained_model(trained)
        merge_adapters(model)
        return model.state_dict()

    def facts(self) -> dict[str, Any]:
        """Return the method, the base, and what was found in the data."""
        facts: dict[str, Any] = {"method": self.config.method, "base": self.config.model}
        facts["n_trained"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return facts | {"findings": self.corpus.provenance.get("findings", {})}

    def card_note(self, summary: Mapping[str, Any]) -> str:
        """Return in a sentence which base the adapter is of, where that is another than the model that was named."""
        if not self.is_packed_here:
            return super().card_note(summary)
        if self.config.merge:
            return f"The adapter is merged into weights in {BITS} bits, multiplied out, not into those of `{summary['base']}`."
        return f"The adapter is of the base in `{BASE}`, `{summary['base']}` in {BITS} bits, and of no other."

    def closing(self, summary: Mapping[str, Any], run: Run) -> str:
        """Return the task's figure before and after, and a command to use the model."""
        del run
        name = summary["metric"]
        before, after = (
            "-" if summary[when][name] is None else f"{summary[when][name]:.4g}" for when in ("before", "after")
        )
        model = shlex.quote(summary["model"])
        use = {
            "classify": f'llmctl classify -m {model} "a text"',
            "chat": f"llmctl chat {model}",
        }.get(self.config.task, f'llmctl generate -m {model} "a text"')
        if self.model.config.family == "encoder" and self.config.task == "text":
            use = f'llmctl fill -m {model} "a <mask> text"'
        return (
            f"{summary['n_trained']:,} of {summary['n_parameters']:,} parameters trained, {summary['steps']:,} steps in "
            f"{summary['seconds']:.0f} s: {name} {before} -> {after} on held-out examples\nnext: {use}"
        )
