"""Settings of a distillation: those that teacher and student decide, and checks before anything is built."""

from dataclasses import replace
from pathlib import Path

from llmctl.artifacts.find import a_model, find_named, needs_data, refuse_data, refuse_token_head
from llmctl.artifacts.load import fitting_tokenizer, is_bare
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import DistillConfig, ModelConfig, TaughtConfig
from llmctl.distilling.student_shape import parse_student
from llmctl.distilling.student_tokenizer import config_with, own_tokenizer
from llmctl.errors import UsageError
from llmctl.formats.artifact import Artifact
from llmctl.formats.transformers_backend import TransformersArtifact
from llmctl.metrics.gate import parse_gate
from llmctl.model.parameters import count
from llmctl.model.prunable import check_supported
from llmctl.model.shapes import complete
from llmctl.training.settings import check_shared, lr_for_size
from llmctl.training.task_choice import choose_task

DEFAULT_STEPS = 400
"""Steps of each part without a budget."""

REFERENCE_LR, REFERENCE_PARAMETERS = 5e-3, 1e6
SMALLEST_LR, LARGEST_LR = 5e-5, 6e-3
"""The peak learning rate falls with the square root of the student's size."""

WARM = 2.0
"""Temperature for peaked distributions: masked tokens and labels (DistilBERT, arXiv:1910.01108)."""

HALF = 0.45
"""A student below this fraction of its teacher is pruned in two stages (Model-Optimizer's guide; NVIDIA 2025)."""


def read_teacher(config: TaughtConfig, name: str = "") -> Artifact:
    """Read the first teacher, or a further one by its name."""
    return read_model(Path(name or config.model), config.teacher.backend)


def student_model(config: DistillConfig) -> Path | None:
    """Return the path of the student if an existing model is named instead of a shape."""
    path = Path(config.student.shape)
    if not path.exists():
        return None
    refuse_data(path)
    return path


def has_own_tokenizer(config: DistillConfig) -> bool:
    """Tell whether the student's tokenizer is not the teacher's."""
    student = student_model(config)
    own = own_tokenizer(config) if student is None else fitting_tokenizer(read_model(student))
    if student is None and own is None:
        return False
    other = fitting_tokenizer(read_teacher(config))
    return (None if own is None else own.sha256) != (None if other is None else other.sha256)


def base_shape(config: DistillConfig) -> ModelConfig:
    """Return the shape that a new student is made from: the teacher's, with the student's vocabulary."""
    artifact, tokenizer = read_teacher(config), own_tokenizer(config)
    return artifact.config if tokenizer is None else config_with(artifact, tokenizer)


def student_shape(config: DistillConfig) -> ModelConfig:
    """Return the shape of the student: that of an existing model, or one derived from the teacher's."""
    existing = student_model(config)
    if existing is not None:
        return read_model(existing).config
    artifact = read_teacher(config)
    if isinstance(artifact, TransformersArtifact) and "%" in config.student.shape:
        raise UsageError(
            f"`--student {config.student.shape}` needs a teacher that can be pruned; {artifact.architecture} only teaches, "
            "through transformers",
            "sizes, such as --student layers=6,dim=512,heads=8,ffn=1408, for a new model, or --student MODEL",
        )
    return parse_student(config.student.shape, base_shape(config))


def settle(config: DistillConfig) -> DistillConfig:
    """Fill in what teacher and student decide, so that the run's recipe states it.

    Raises: NotFoundError or ArtifactError for a missing or damaged teacher; UsageError for an impossible student.
    """
    artifact = read_teacher(config)
    refuse_token_head(artifact.config, config.model, "a teacher")
    for name in config.teacher.more:
        refuse_token_head(read_teacher(config, name).config, name, "a teacher")
    if (existing := student_model(config)) is not None:
        refuse_token_head(read_model(existing).config, config.student.shape, "a student")
    teacher, train, optim, loss, student = artifact.config, config.train, config.optim, config.loss, config.student
    task = choose_task(config, artifact)
    given = student_model(config)
    is_foreign = isinstance(artifact, TransformersArtifact)
    if student.init == "auto":
        student = replace(student, init="random" if is_foreign else "prune")
    if student.init == "prune" and not given:
        if is_foreign:
            raise UsageError(
                f"`{config.model}` ({artifact.architecture}) cannot be pruned: transformers runs it",
                "--init random, or --student MODEL",
            )
        check_supported(teacher, "pruning")
    shape = student_shape(config)
    n_student, n_teacher = count(shape), count(teacher)
    stages = config.stages
    if not stages:
        stages = 2 if n_student < HALF * n_teacher and student.init == "prune" and not given else 1
    name = loss.name
    if name == "auto":
        name = "none" if is_bare(artifact) else "fkl"
    match = loss.match
    if match == "auto":
        is_other = is_foreign or has_own_tokenizer(config)
        has_states = teacher.family == "encoder" and not (teacher.n_labels or config.teacher.cache or is_other)
        match = "relation" if has_states and name != "seq" else "none"
        if name == "none":
            match = "hidden"
    is_warm = (teacher.family == "encoder" or bool(teacher.n_labels)) and not config.teacher.cache
    loss = replace(
        loss,
        name=name,
        match=match,
        temperature=loss.temperature or (WARM if is_warm else 1.0),
        match_layer=loss.match_layer or (teacher.n_decoder_layers or teacher.n_layers),
        relation_heads=loss.relation_heads or relation_heads(complete(teacher), complete(shape)),
    )
    if not (train.steps or train.tokens or train.minutes or train.epochs):
        train = replace(train, steps=DEFAULT_STEPS)
    train = replace(train, seq_len=min(train.seq_len, shape.max_positions, teacher.max_positions))
    if not optim.lr:
        optim = replace(optim, lr=lr_for_size(n_student, REFERENCE_LR, REFERENCE_PARAMETERS, SMALLEST_LR, LARGEST_LR))
    return replace(config, task=task, stages=stages, student=student, loss=loss, train=train, optim=optim)


def splits(n_heads: int, *shapes: ModelConfig) -> bool:
    """Return whether the queries and keys of all shapes divide into this many heads."""
    widths = [heads * shape.head_dim for shape in shapes for heads in (shape.n_heads, shape.n_kv_heads)]
    return n_heads > 0 and not any(width % n_heads for width in widths)


def relation_heads(teacher: ModelConfig, student: ModelConfig) -> int:
    """Return the number of relation heads: the teacher's, or the most that divide both models."""
    return next(heads for heads in range(teacher.n_heads, 0, -1) if splits(heads, teacher, student))


def check_distill(config: DistillConfig, shape: ModelConfig) -> None:
    """Refuse settings that contradict each other or do not fit teacher and student.

    Raises: UsageError listing all of them.
    """
    loss, train = config.loss, config.train
    if config.max_drop:
        parse_gate(config.max_drop)
    artifact = read_teacher(config)
    teacher = artifact.config
    is_foreign = isinstance(artifact, TransformersArtifact)
    has_words = not teacher.n_labels and loss.name not in ("none", "seq")
    budget = train.minutes and not (train.steps or train.tokens or train.epochs)
    if shape.family != teacher.family and loss.name != "seq":
        raise UsageError(
            f"`{config.model}` is {a_model(teacher.family)}, `{config.student.shape}` {a_model(shape.family)}: their "
            "outputs cannot be compared",
            "use a teacher and a student of one family",
        )
    check_shared(
        config,
        (not 0 <= loss.weight <= 1, f"`loss.weight` is {loss.weight}, not in [0, 1]"),
        (loss.temperature <= 0, f"`loss.temperature` is {loss.temperature}, it must be positive"),
        (not 0 < loss.beta < 1, f"`loss.beta` is {loss.beta}, not between 0 and 1"),
        (not 0 < loss.skew < 1, f"`loss.skew` is {loss.skew}, not between 0 and 1"),
        (not 0 < loss.head_mass < 1, f"`loss.head_mass` is {loss.head_mass}, not between 0 and 1"),
        (not 0 <= loss.taid_start < 1, f"`loss.taid_start` is {loss.taid_start}, not in [0, 1)"),
        (not 0 <= loss.on_policy <= 1, f"`loss.on_policy` is {loss.on_policy}, not in [0, 1]"),
        (loss.match_weight < 0, f"`loss.match_weight` is {loss.match_weight}, it is negative"),
        (
            loss.match == "relation" and not splits(loss.relation_heads, complete(teacher), complete(shape)),
            f"`loss.relation_heads` is {loss.relation_heads}, which does not divide the attention of teacher and student",
        ),
        (
            is_foreign and loss.match not in ("none", "hidden"),
            f"`loss.match` {loss.match} needs a teacher that llmctl runs, `{config.model}` is run by transformers",
        ),
        (
            is_foreign and config.teacher.dtype == "int8",
            f"`teacher.dtype` int8 needs a teacher that llmctl runs, `{config.model}` is run by transformers",
        ),
        (
            bool(config.student.tokenizer) and student_model(config) is not None,
            f"`student.tokenizer` is for a new student, `{config.student.shape}` has its own",
        ),
        (config.stages < 0, f"`stages` is {config.stages}, it is negative"),
        (
            config.student.calibration_rows < 1,
            f"`student.calibration_rows` is {config.student.calibration_rows}, it must be at least 1",
        ),
        (
            config.student.refit_tokens < 0,
            f"`student.refit_tokens` is {config.student.refit_tokens}, it must be at least 0",
        ),
        (
            not 0 < loss.match_layer <= (teacher.n_decoder_layers or teacher.n_layers),
            f"`loss.match_layer` is {loss.match_layer}, the teacher has {teacher.n_decoder_layers or teacher.n_layers}",
        ),
        (
            loss.on_policy > 0 and (teacher.family != "decoder" or not has_words),
            "`loss.on_policy` needs a decoder and a divergence",
        ),
        (
            loss.on_policy > 0 and config.parallel.strategy == "fsdp",
            "`loss.on_policy` needs the whole model in every process: not with `parallel.strategy` fsdp",
        ),
        (
            bool(teacher.n_labels) and loss.name != "fkl",
            f"`loss.name` {loss.name} needs token predictions, `{config.model}` predicts {teacher.n_labels} labels: use fkl",
        ),
        (
            bool(teacher.n_labels) and loss.match != "none",
            "`loss.match` needs token predictions, the teacher predicts labels",
        ),
        (is_bare(artifact) and loss.name != "none", f"`{config.model}` predicts no tokens: use `loss.name` none"),
        (loss.name == "none" and loss.match == "none", "`loss.name` and `loss.match` are both none"),
        (
            loss.name == "none" and config.task != "text",
            f"`loss.name` none needs plain text, `--task {config.task}` needs a divergence",
        ),
        (
            loss.name == "seq" and (teacher.family == "encoder" or bool(teacher.n_labels)),
            f"`loss.name` seq needs a teacher that generates text, `{config.model}` does not",
        ),
        (
            bool(config.teacher.cache) and (not has_words or loss.match != "none" or loss.on_policy > 0),
            "`teacher.cache` has predictions of the data's tokens only: use `loss.match` none and no `loss.on_policy`",
        ),
        (
            bool(config.teacher.cache) and loss.temperature != 1.0,
            f"`loss.temperature` is {loss.temperature}, `teacher.cache` needs 1",
        ),
        (
            bool(config.teacher.cache) and loss.name != "fkl",
            f"`loss.name` is {loss.name}, `teacher.cache` needs fkl",
        ),
        (not 1 <= config.teacher.draws <= 255, f"`teacher.draws` is {config.teacher.draws}, not in [1, 255]"),
        (config.teacher.top_k < 1, f"`teacher.top_k` is {config.teacher.top_k}, it must be at least 1"),
        (
            config.baseline.enabled and bool(budget),
            "`baseline` needs a budget in steps, tokens or epochs, so that both get the same steps",
        ),
        (
            config.baseline.enabled and not all(factor > 0 for factor in config.baseline.lr_factors),
            f"`baseline.lr_factors` are {config.baseline.lr_factors}, they must be positive",
        ),
    )
    if loss.name != "seq" and has_own_tokenizer(config):
        check_across(config, teacher)
    if not config.data.paths and config.task != "text":
        raise needs_data(Path(config.model), artifact.config, config.task)
    for name in config.teacher.more:
        find_named(name, "any")


def check_across(config: DistillConfig, teacher: ModelConfig) -> None:
    """Refuse what a teacher with another tokenizer than the student's cannot do.

    Raises: UsageError listing all of it.
    """
    loss = config.loss
    checks = [
        (teacher.family == "encoder", "the masks and states of an encoder are those of its own tokens"),
        (bool(teacher.n_labels), "labels are learned from a teacher with the student's tokenizer only"),
        (loss.match not in ("none", "auto"), f"`loss.match` {loss.match} needs the same tokens"),
        (bool(config.teacher.cache), "`teacher.cache` has predictions of the teacher's tokens"),
        (
            loss.across != "project" and loss.name not in ("auto", "fkl"),
            f"`loss.across` {loss.across} has its own divergence, `loss.name` is {loss.name}",
        ),
    ]
    if problems := [sentence for wrong, sentence in checks if wrong]:
        raise UsageError(
            f"`{config.model}` and `{config.student.shape}` have different tokenizers: " + "; ".join(problems),
            "use models with one tokenizer, or train on texts generated by the teacher: --loss seq",
        )
