"""`llmctl finetune`: an existing model, examples of a task, and all weights or an adapter to train."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llmctl.artifacts.adapters import save_adapter
from llmctl.artifacts.find import usage
from llmctl.artifacts.heads import with_head
from llmctl.artifacts.hub import label, named
from llmctl.artifacts.load import Loaded, load_model
from llmctl.artifacts.with_adapters import identity_of
from llmctl.config import FinetuneConfig, QuantizeConfig, WeightsConfig
from llmctl.data.batches import AnswerBatches
from llmctl.distilling.soft_answers import SoftAnswers, has_targets, soft_prediction
from llmctl.errors import ArtifactError
from llmctl.formats.artifact_write import write_artifact
from llmctl.jobs.finish import Product, whole_model
from llmctl.jobs.job import Job
from llmctl.jobs.session import Part, Session, identity
from llmctl.machine import give_back_memory
from llmctl.model.lora import add_adapters, merge_adapters
from llmctl.model.quantized import quantize, schemes_of
from llmctl.model.transformer import LanguageModel, with_tied
from llmctl.preparing.corpus import Corpus
from llmctl.preparing.examples import chat_of
from llmctl.quant.schemes import Scheme
from llmctl.quantizing.fake_quant import learned_state, rounding
from llmctl.quantizing.qlora_base import BASE, BITS, write_packed_base
from llmctl.quantizing.settings import plan_of
from llmctl.tables.preferences import PREFERENCES
from llmctl.tables.tasks import TASKS
from llmctl.training.batch import BatchSource
from llmctl.training.finetune_settings import QUANTIZES, check, settle
from llmctl.training.objectives import Classification, Objective, label_prediction
from llmctl.training.preference_objective import PreferencePrediction, preference_loss
from llmctl.training.preference_reference import read_reference, write_reference
from llmctl.training.task_data import TaskData, check_task, labels_of_corpus, open_task_model, prepare_task


def finetune(session: Session, config: FinetuneConfig) -> None:
    """Encode the examples, give the model what the task and the method need, train, and write model or adapter."""
    # The first process may quantize the base here (qlora); all then open the same files.
    corpus = session.prepare(partial(prepare, session, config))
    base = open_base(session, config, corpus)
    data = TaskData.open(config, base, corpus, session.say)
    tuned = Tuned(config, data, session)
    model = tuned.model
    if tuned.needs_reference:
        # Under an adapter the reference is the model without it.
        folder = session.folder / "data"
        objective = tuned.preference_prediction()
        session.lead(partial(write_reference, objective, data, folder, session.runtime, session.say))
        tuned.data = data = replace(data, reference=read_reference(folder))
    part = Part(
        model=model,
        objective=tuned.objective,
        batches=tuned.batches,
        rows=data.rows(model.config),
        config=config,
        identity=identity(corpus, model=corpus.provenance["base"]["sha256"]),
        metric=data.metric,
        sample=data.sampler(model),
        score=data.score(model, session.runtime),
    )
    fitted = session.fit(part)
    template = corpus.provenance.get("task", {}).get("template")
    session.finish(
        Product(
            model,
            corpus,
            fitted,
            data.metric,
            write=partial(tuned.write, fitted.weights),
            provenance={"template": template} if template else {},
            facts=tuned.facts,
            note=tuned.note,
            closing=tuned.closing,
        )
    )


def prepare(session: Session, config: FinetuneConfig, folder: Path) -> Corpus:
    """Encode the examples; quantize the base if the method asks for it and it is not quantized yet."""
    base = open_task_model(config, Path(config.model))
    corpus = prepare_task(config, base, folder, session.say, show_example=session.show_example)
    made: dict[str, Any] = {}
    if config.method in QUANTIZES and not base.artifact.schemes:
        made = write_packed_base(
            load_model(Path(config.model), device="cpu", dtype="float32"), packed_base(session, config)
        )
        give_back_memory()
    corpus.provenance["base"] = {
        "path": config.model,
        "sha256": base_sha256(session, config, base, made),
        **made,
    }
    return corpus


def base_sha256(session: Session, config: FinetuneConfig, base: Loaded, made: Mapping[str, Any]) -> str:
    """Return the hash of the weights that the run starts from."""
    if made:
        base = open_task_model(config, packed_base(session, config))
    return identity_of(base.artifact)


def packed_base(session: Session, config: FinetuneConfig) -> Path:
    """Return where a base is that the run quantized: next to the adapter, or with what is removed at the end."""
    return (session.folder / "data" if config.merge else session.folder) / BASE


def is_packed_here(corpus: Corpus) -> bool:
    """Tell whether the base is one that this run has quantized."""
    # The second spelling is that of runs begun with 0.1.0.
    return not {"quantized_from", "quantised_from"}.isdisjoint(corpus.provenance["base"])


def open_base(session: Session, config: FinetuneConfig, corpus: Corpus) -> Loaded:
    """Load the model that is trained, or that stays under the adapter, in float32 on the CPU.

    Raises: ArtifactError if the model is not the one that the run was begun with.
    """
    path = packed_base(session, config) if is_packed_here(corpus) else Path(config.model)
    packed = config.method != "full"  # under an adapter a quantized base stays quantized
    base = load_model(path, device="cpu", dtype="float32", packed=packed)
    check_task(config, base)
    begun_with = corpus.provenance["base"]["sha256"]
    if identity_of(base.artifact) != begun_with:
        raise ArtifactError(
            f"`{base.artifact.path}` is not the model that this run was started with ({begun_with[:12]})",
            "restore it, or start a new run",
        )
    return base


def qat_schemes(config: FinetuneConfig, model: LanguageModel) -> dict[str, Scheme]:
    """Return the scheme of every module for quantization-aware training; none without `qat`."""
    if not config.qat:
        return {}
    return plan_of(model.config, QuantizeConfig(weights=WeightsConfig(scheme=config.qat)))


class Tuned:
    """The model as it is trained: with a classification head, fake quantization or an adapter where they are asked for."""

    def __init__(self, config: FinetuneConfig, data: TaskData, session: Session) -> None:
        self.config, self.data, self.corpus = config, data, data.corpus
        self.is_chat = TASKS[config.task].is_chat
        self.model = data.base.model
        if config.task == "classify":
            labels = labels_of_corpus(self.corpus)
            n_outputs = len(labels.names) or self.corpus.arrays["values"].shape[1]
            self.model = with_head(data.base, labels, n_outputs, pooling=config.pooling, seed=config.train.seed)
        self.schemes = qat_schemes(config, self.model)
        if config.qat:
            self.model = rounding(self.model, self.schemes)
            session.say(f"quantization-aware training: {len(self.schemes)} layers in {config.qat}")
        self.model.train()
        self.base_schemes = schemes_of(self.model)
        if config.method != "full":
            self._say_adapter(len(self.adapt(self.model)), session)

    def _say_adapter(self, n_layers: int, session: Session) -> None:
        """Report how much is trained."""
        n_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        share = n_trained / self.model.n_parameters
        quantized = f" quantized to {BITS} bits" if is_packed_here(self.corpus) else ""
        session.say(
            f"{self.config.method} of rank {self.config.adapter.rank} on {n_layers} layers{quantized}: "
            f"{n_trained:,} parameters trained, {share:.2%} of all"
        )

    def adapt(self, model: LanguageModel) -> list[str]:
        """Add the run's adapters to a model, and return the layers that have one."""
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

    def batches(self, *, shuffle: bool) -> BatchSource:
        """Return the batches; those of training with the probabilities of a server, where the data has some."""
        source = self.data.batches(self.model.config, shuffle=shuffle)
        if shuffle and has_targets(self.corpus) and isinstance(source, AnswerBatches):
            return SoftAnswers(source, self.corpus)
        return source

    def objective(self) -> Objective:
        """Return classification, a loss on preferences, divergence from given probabilities, or label prediction."""
        if self.config.task == "classify":
            return Classification(self.model, self.config.train.label_smoothing)
        if self.config.task == "prefer":
            return self.preference_prediction()
        if has_targets(self.corpus):
            return soft_prediction(self.model, self.corpus, self.config.train)
        return label_prediction(self.model, self.corpus, self.config.train)

    def preference_prediction(self) -> PreferencePrediction:
        """Return the loss on preferences."""
        options = self.config.preference
        return PreferencePrediction(
            self.model, preference_loss(options), options.sft_weight, self.config.train.loss_chunk_tokens
        )

    @property
    def needs_reference(self) -> bool:
        """Whether log probabilities are needed of the model before training, which has no adapters to switch off."""
        config = self.config
        return (
            config.task == "prefer" and config.method == "full" and PREFERENCES[config.preference.loss].needs_reference
        )

    def files(self) -> dict[str, bytes]:
        """Return what lies next to the model: the base's files, and the template of the conversations."""
        files = self.data.files()
        return files | chat_of(self.data.base).files() if self.is_chat else files

    def write(self, weights: Mapping[str, Tensor], folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write the quantized model, the whole model, or the adapter."""
        files, shape = self.files(), self.model.config
        if self.config.qat:
            state = learned_state({name: tensor.cpu() for name, tensor in weights.items()}, self.schemes)
            provenance = {**provenance, "weights": self.config.qat}
            write_artifact(folder, shape, state, files=files, provenance=provenance, schemes=self.schemes, force=True)
        elif self.config.method == "full":
            whole_model(self.model, weights, files)(folder, provenance)
        elif self.config.merge:
            model = self.trained_model(weights)
            merge_adapters(model)
            state = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
            write_artifact(folder, shape, state, files=files, provenance=provenance, force=True)
        else:
            base = self.data.base.artifact
            save_adapter(self.trained_model(weights), folder, base=base, provenance=provenance, files=files, force=True)

    def trained_model(self, weights: Mapping[str, Tensor]) -> LanguageModel:
        """Return the trained model with its adapter, gathered from all processes."""
        model = LanguageModel(self.model.config)
        quantize(model, self.base_schemes)
        self.adapt(model)
        model.load_state_dict(with_tied(self.model.config, weights))
        return model

    def facts(self) -> dict[str, Any]:
        """Return the method, the base, and what was found in the data."""
        return {
            "method": self.config.method,
            "base": named(self.config.model),
            "n_trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "findings": self.corpus.provenance.get("findings", {}),
        }

    def note(self, summary: Mapping[str, Any]) -> str:
        """Return which base the adapter belongs to, if the run quantized it."""
        if not is_packed_here(self.corpus):
            return ""
        if self.config.merge:
            return (
                f"The adapter is merged into the weights quantized to {BITS} bits and dequantized, not into those of "
                f"`{summary['base']}`."
            )
        return f"The adapter belongs to the base in `{BASE}`, `{summary['base']}` quantized to {BITS} bits, and to no other."

    def closing(self, summary: Mapping[str, Any]) -> str:
        """Return the task's metric before and after, and a command that uses the model."""
        name = summary["metric"]
        before, after = (
            "-" if summary[when][name] is None else f"{summary[when][name]:.4g}" for when in ("before", "after")
        )
        return (
            f"{summary['n_trained']:,} of {summary['n_parameters']:,} parameters trained, {summary['steps']:,} steps in "
            f"{summary['seconds']:.0f} s: {name} {before} -> {after} on held-out examples\n"
            f"next: {usage(self.model.config, summary['model'], is_chat=self.is_chat)}"
        )


JOB = Job(
    command="finetune",
    config_class=FinetuneConfig,
    settle=settle,
    check=check,
    objective=lambda config: config.task,
    label=lambda config: f"{config.task}-{label(config.model)}",
    run=finetune,
)
