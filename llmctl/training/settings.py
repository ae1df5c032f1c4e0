"""Checks of settings: alone, against the data, and against those of a resumed run.

Knows no model and no device: all of it happens before anything is built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmctl.config import Family, ModelConfig, PretrainConfig, TaskConfig
from llmctl.errors import UsageError
from llmctl.model.presets import get_preset, preset_config
from llmctl.preparing.corpus import Corpus
from llmctl.tables.objectives import OBJECTIVES

CHANGEABLE = {"optim", "train", "parallel", "merge", "max_drop"}
"""Sections of a recipe that a resumed run may change, with --allow-change; every other section makes another run."""

FIXED = {"optim.name", "train.seed", "train.batch_size", "train.seq_len", "train.freeze"}
"""Settings of these sections that what is on disk depends on: another optimizer has another state, frozen weights have none;
the position in the data follows from seed, batch size and row length."""

COUNTS = ("steps", "tokens", "epochs")
"""Budgets of which a run has one; `minutes` may limit it."""


def with_budget(config: PretrainConfig) -> PretrainConfig:
    """Give a run without a budget the default number of steps."""
    train = config.train
    if train.steps or train.tokens or train.minutes or train.epochs:
        return config
    return replace(config, train=replace(train, steps=OBJECTIVES[config.objective].default_steps))


def check(config: PretrainConfig) -> None:
    """Refuse settings that contradict each other, before anything is read.

    Raises: UsageError listing all of them.
    """
    data = config.data
    check_shared(
        config,
        (not 0 < data.mask_frac < 1, f"`data.mask_frac` is {data.mask_frac}, it must be between 0 and 1"),
        (data.mean_span_tokens < 1, f"`data.mean_span_tokens` is {data.mean_span_tokens}, it must be at least 1"),
    )


def check_shared(config: PretrainConfig | TaskConfig, *more: tuple[bool, str]) -> None:
    """Refuse settings that no training command accepts, and `more`: pairs of a condition and its message.

    Raises: UsageError listing all of them.
    """
    train, data, optim = config.train, config.data, config.optim
    fits_micro = train.micro_batch_size <= 0 or train.batch_size % train.micro_batch_size == 0
    checks = [
        (train.batch_size < 1, f"`train.batch_size` is {train.batch_size}, it must be at least 1"),
        (train.seq_len < 2, f"`train.seq_len` is {train.seq_len}, it must be at least 2"),
        *(
            (getattr(train, name) < 0, f"`train.{name}` is {getattr(train, name):g}, a budget must be positive")
            for name in (*COUNTS, "minutes", "limit_minutes")
        ),
        (
            not fits_micro,
            f"`train.batch_size` {train.batch_size} is not divisible by `train.micro_batch_size` {train.micro_batch_size}",
        ),
        (not 0 < data.val_frac < 1, f"`data.val_frac` is {data.val_frac}, it must be between 0 and 1"),
        (train.log_every < 1, f"`train.log_every` is {train.log_every}, it must be at least 1"),
        (train.loss_chunk_tokens < 1, f"`train.loss_chunk_tokens` is {train.loss_chunk_tokens}, it must be at least 1"),
        (not 0 <= train.label_smoothing < 1, f"`train.label_smoothing` is {train.label_smoothing}, not in [0, 1)"),
        (not 0 <= train.ema < 1, f"`train.ema` is {train.ema}, not in [0, 1)"),
        (not 0 <= train.average_frac < 1, f"`train.average_frac` is {train.average_frac}, not in [0, 1)"),
        (train.ema > 0 and train.average_frac > 0, "`train.ema` and `train.average_frac` are two averages: set one"),
        (not 0 < optim.layer_decay <= 1, f"`optim.layer_decay` is {optim.layer_decay}, not in (0, 1]"),
        (optim.lr <= 0, f"`optim.lr` is {optim.lr}, it must be positive"),
    ]
    problems = [sentence for wrong, sentence in [*checks, *more] if wrong]
    if problems:
        raise UsageError("; ".join(problems), "--print-config lists every key with a description")


def check_corpus(config: PretrainConfig, corpus: Corpus) -> None:
    """Refuse text that is too short to train on.

    Raises: UsageError with the numbers.
    """
    n_tokens = int(corpus.documents.lengths[corpus.train].sum())
    if len(corpus.train) == 0 or n_tokens < 2:
        raise UsageError(
            f"the training part of the data has {n_tokens} tokens", "give more text, or a smaller --set data.val_frac"
        )
    needs = OBJECTIVES[config.objective].needs
    if needs == "mask" and corpus.tokenizer.mask_id is None:
        raise UsageError(
            "the tokenizer has no mask token, which `--objective mlm` needs", "omit --tokenizer to train one"
        )
    if needs == "sentinels" and not corpus.tokenizer.sentinel_ids():
        raise UsageError(
            "the tokenizer has no <extra_id_0>, ... tokens, which `--objective span` needs",
            "llmctl tokenize train --set n_sentinels=32 makes one, or omit --tokenizer",
        )


def model_config(config: PretrainConfig) -> ModelConfig:
    """Return the preset in the objective's family with the overrides, before the vocabulary is known."""
    name = "tiny" if config.model.preset == "auto" else config.model.preset
    family = config.model.overrides.get("family", OBJECTIVES[config.objective].families[0])
    shape = preset_config(name, family if get_preset(name).dims_only else None)
    return replace(shape, **config.model.overrides)


def check_family(config: PretrainConfig, family: Family, name: str) -> None:
    """Refuse a model that the objective cannot train.

    Raises: UsageError naming both.
    """
    allowed = OBJECTIVES[config.objective].families
    if family not in allowed:
        fitting = [row for row, entry in OBJECTIVES.items() if family in entry.families]
        raise UsageError(
            f"`{name}` is of family {family}, but `--objective {config.objective}` trains {' or '.join(allowed)}",
            f"--objective {' or '.join(fitting)} trains it",
        )


def with_new_budget(old: Any, new: Any) -> Any:
    """Return the new settings of a resumed run; a budget that was changed replaces the one the run was started with."""
    before, train = old.train, new.train
    given = [name for name in COUNTS if getattr(train, name) and getattr(train, name) != getattr(before, name)]
    if not given:
        return new
    replaced = [name for name in COUNTS if name not in given and getattr(train, name) == getattr(before, name)]
    if not any(getattr(before, name) for name in COUNTS) and train.minutes == before.minutes:
        replaced.append("minutes")
    return replace(new, train=replace(train, **dict.fromkeys(replaced, 0)))


def refuse_changes(path: Path, changes: Mapping[str, tuple[Any, Any]], allowed: Sequence[str]) -> None:
    """Refuse to resume a run with changed settings, unless they are allowed.

    Raises: UsageError with the difference.
    """

    def show(keys: Sequence[str]) -> str:
        return "; ".join(f"`{key}` {changes[key][0]} -> {changes[key][1]}" for key in keys)

    fatal = [key for key in changes if key.split(".")[0] not in CHANGEABLE or key in FIXED]
    if fatal:
        raise UsageError(
            f"these settings differ from those `{path}` was started with and cannot change: {show(fatal)}",
            "start a new run",
        )
    refused = [key for key in changes if key not in allowed]
    if refused:
        flags = " ".join(f"--allow-change {key}" for key in refused)
        raise UsageError(
            f"the recipe differs from that of `{path}`: {show(refused)}", f"{flags} resumes with the change"
        )


def lr_for_size(n_parameters: int, reference_lr: float, at_parameters: float, low: float, high: float) -> float:
    """Return a peak learning rate that falls with the square root of the model's size, within [low, high]."""
    rate = reference_lr * (at_parameters / n_parameters) ** 0.5
    return float(f"{min(max(rate, low), high):.2g}")
