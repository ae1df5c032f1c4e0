"""What a fine-tuning run is, before anything is built: settings that the model decides, and those that contradict."""

import math
from dataclasses import replace
from pathlib import Path

from llmctl.artifacts.find import refuse_token_head
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import FinetuneConfig, PreferenceConfig
from llmctl.errors import UsageError
from llmctl.model.parameters import count
from llmctl.training.settings import check_shared, lr_for_size

FULL_LR, ADAPTER_FACTOR, REFERENCE_PARAMETERS = 5e-5, 10.0, 110e6
SMALLEST_LR, LARGEST_LR, LARGEST_ADAPTER_LR = 1e-5, 1e-3, 2e-3
DEFAULT_EPOCHS = 3.0
PREFERENCE_FACTOR = 0.1
"""Preferences are learned from differences: at the rates of examples, models drift away from all answers."""

QUANTIZES = ("qlora", "qdora")
"""Methods that quantize the base to four bits first, unless it is quantized."""


def settle(config: FinetuneConfig) -> FinetuneConfig:
    """Give a run the budget, row length and learning rate that its model asks for, so that its recipe states them.

    Learning rates fall with the square root of the model's size, from BERT-base's 5e-5 (Devlin et al. 2019, A.3); adapters
    take ten times as much (Schulman et al. 2025, "LoRA Without Regret").
    Raises: NotFoundError or ArtifactError for a model that does not exist or is damaged; UsageError for one with a head over
        tokens.
    """
    train, optim = config.train, config.optim
    artifact = read_model(Path(config.model))
    shape = artifact.config
    refuse_token_head(shape, config.model, "fine-tuned")
    is_quantized = config.method in QUANTIZES or (artifact.schemes and config.method != "full")
    if config.qat or is_quantized:  # neither has a copy in bfloat16
        train = replace(train, master_weights=False)
    if not (train.steps or train.tokens or train.minutes or train.epochs):
        train = replace(train, epochs=DEFAULT_EPOCHS)
    train = replace(train, seq_len=min(train.seq_len, shape.max_positions))
    if not optim.lr:
        factor, high = (1.0, LARGEST_LR) if config.method == "full" else (ADAPTER_FACTOR, LARGEST_ADAPTER_LR)
        if config.task == "prefer":
            factor *= PREFERENCE_FACTOR
        optim = replace(
            optim,
            lr=lr_for_size(count(shape), factor * FULL_LR, REFERENCE_PARAMETERS, min(1.0, factor) * SMALLEST_LR, high),
        )
    return replace(config, train=train, optim=optim)


def check(config: FinetuneConfig) -> None:
    """Refuse settings that contradict each other.

    Raises: UsageError.
    """
    check_shared(config)
    if not config.data.paths:
        raise UsageError("no data to fine-tune on", "llmctl finetune MODEL DATA --task TASK")
    if config.task == "prefer":
        check_preference(config.preference)
    if config.task != "classify" and config.labels:
        raise UsageError(f"`labels` are for `--task classify`, the task is `{config.task}`", "omit them")
    if config.qat and config.method != "full":
        raise UsageError(f"`--qat` trains all weights, not `--method {config.method}`", "use one of the two")


def check_preference(config: PreferenceConfig) -> None:
    """Refuse impossible parameters of a loss on preferences.

    Raises: UsageError naming key and value.
    """
    for name, low, high in (
        ("beta", 0.0, math.inf),
        ("label_smoothing", 0.0, 0.5),
        ("sft_weight", 0.0, math.inf),
        ("gamma", 0.0, math.inf),
        ("desirable_weight", 0.0, math.inf),
        ("undesirable_weight", 0.0, math.inf),
    ):
        value = getattr(config, name)
        if not low <= value < high:
            below = f" and below {high:g}" if high < math.inf else ""
            raise UsageError(f"`preference.{name}` is {value:g}", f"it must be at least {low:g}{below}")
