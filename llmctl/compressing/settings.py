"""Settings of a compression: those of its stages, what the model decides, and checks before anything is read."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llmctl.artifacts.find import needs_data, refuse_token_head
from llmctl.artifacts.with_adapters import read_model
from llmctl.compressing.report import file_bytes
from llmctl.config import (
    LEVERS,
    CompressConfig,
    DataConfig,
    DistillConfig,
    QuantizeConfig,
    QuantizeOptimConfig,
    QuantizeTrainConfig,
    StudentConfig,
    WeightsConfig,
)
from llmctl.converting.onnx_check import runtime_module
from llmctl.distilling import settings as distilling
from llmctl.errors import UsageError
from llmctl.formats.onnx.encoder import obstacle_in
from llmctl.formats.onnx.graph import onnx_module
from llmctl.quantizing.bit_allocation import parse_size
from llmctl.training.settings import check_shared

DEFAULT_MINUTES = 10.0
"""Training time without a budget."""


def shared_settings(config: CompressConfig, kind: type) -> dict[str, Any]:
    """Return the settings that a config has in common with another kind of config."""
    names = {field.name for field in fields(kind)} & {field.name for field in fields(config)}
    return {name: getattr(config, name) for name in names}


def distill_config(config: CompressConfig, model: Path, data: DataConfig | None = None) -> DistillConfig:
    """Return the settings of a distillation with `model` as its teacher."""
    values = shared_settings(config, DistillConfig) | {"model": str(model), "stages": 1}
    return DistillConfig(**values | ({"data": data} if data else {}))


def quantize_config(config: CompressConfig, model: Path, **weights: Any) -> QuantizeConfig:
    """Return the settings of the quantization of `model`."""
    values = shared_settings(config, QuantizeConfig) | {"model": str(model)}
    optim = {field.name: getattr(config.optim, field.name) for field in fields(QuantizeOptimConfig)}
    train = {field.name: getattr(config.train, field.name) for field in fields(QuantizeTrainConfig)}
    values["optim"] = QuantizeOptimConfig(**optim | {"lr": 0.0, "weight_decay": 0.0})
    values["train"] = QuantizeTrainConfig(**train)
    values["weights"] = replace(config.weights, **weights)
    return QuantizeConfig(**values)


def teaching(config: CompressConfig, teacher: Path) -> DistillConfig:
    """Return the settings with which models are compared with a teacher of their vocabulary."""
    settings = distill_config(config, teacher)
    settled = distilling.settle(replace(settings, student=replace(settings.student, shape="100%")))
    # The best step is the one closest to the teacher, as in the choice of the plan.
    is_text = settled.task == "text" and settled.loss.name != "none"
    metric = settled.train.metric or ("kl" if is_text else "")
    return replace(settled, train=replace(settled.train, metric=metric))


def with_share(train: Any, share: float) -> Any:
    """Return the training loop with a fraction of its budget."""
    return replace(
        train,
        steps=round(train.steps * share),
        tokens=round(train.tokens * share),
        epochs=train.epochs * share,
        minutes=train.minutes * share,
    )


def has_budget(train: Any) -> bool:
    """Tell whether there is anything to train."""
    return bool(train.steps or train.tokens or train.epochs or train.minutes)


def settle(config: CompressConfig) -> CompressConfig:
    """Fill in what the model decides, so that the run's recipe states it.

    Raises: NotFoundError or ArtifactError for a missing or damaged model; UsageError.
    """
    artifact = read_model(Path(config.model))
    refuse_token_head(artifact.config, config.model, "a model to compress")
    train = config.train
    if not has_budget(train) and train.minutes == 0:
        train = replace(train, minutes=DEFAULT_MINUTES)
    settled = teaching(config, Path(config.model))
    train = replace(train, seq_len=settled.train.seq_len)
    # The rest of the loss is what each stage chooses.
    return replace(config, task=settled.task, loss=replace(config.loss, name=settled.loss.name), train=train)


def check(config: CompressConfig) -> None:
    """Refuse settings that contradict each other, before anything is read.

    Raises: UsageError.
    """
    if not config.size:
        raise UsageError("no size is given", "--to 30MB")
    size = parse_size(config.size, "--to")
    artifact = read_model(Path(config.model))
    if config.format == "onnx":
        if obstacle := obstacle_in(artifact.config):
            raise UsageError(f"`{config.model}` {obstacle}, which is not exported as ONNX", "use --for single")
        onnx_module()
        runtime_module()
    wrong = [name for name in config.keep if name not in LEVERS]
    if artifact.schemes:
        raise UsageError(f"`{config.model}` is already quantized", "pass the original model")
    plan = config.plan
    check_shared(
        replace(config, optim=replace(config.optim, lr=config.optim.lr or 1.0)),  # 0: each stage chooses its own
        (bool(wrong), f"`keep` names {', '.join(wrong)}, it can name {', '.join(LEVERS)}"),
        (set(config.keep) >= set(LEVERS), "`keep` names everything, so nothing can be compressed"),
        (plan.trials < 1, f"`plan.trials` is {plan.trials}, it must be at least 1"),
        (plan.measure_tokens < 1, f"`plan.measure_tokens` is {plan.measure_tokens}, it must be at least 1"),
        (plan.calibration_rows < 1, f"`plan.calibration_rows` is {plan.calibration_rows}, it must be at least 1"),
        (plan.written_tokens < 1, f"`plan.written_tokens` is {plan.written_tokens}, it must be at least 1"),
        (not 0 <= plan.train_frac <= 1, f"`plan.train_frac` is {plan.train_frac}, it must be from 0 to 1"),
        (
            config.format == "gguf" and artifact.config.family != "decoder",
            "GGUF files of encoders and encoder-decoders are not written by `compress`: use --for single",
        ),
        *(
            (getattr(config.weights, name) != getattr(WeightsConfig(), name), f"`weights.{name}` is set by the plan")
            for name in ("scheme", "embedding", "gguf", "target_size", "target_bpw")
        ),
        *(
            (getattr(config.student, name) != getattr(StudentConfig(), name), f"`student.{name}` is set by the plan")
            for name in ("shape", "init")
        ),
        (config.loss.name == "seq", "`loss.name` seq is for `llmctl distill`"),
        (bool(config.teacher.cache), "`teacher.cache` is for `llmctl distill`"),
    )
    if not config.data.paths and config.task != "text":
        raise needs_data(Path(config.model), artifact.config, config.task)
    before = file_bytes(artifact)
    if size >= before:
        raise UsageError(f"`--to {config.size}`: the model has only {before / 1e6:,.3f} MB", "name a smaller size")
