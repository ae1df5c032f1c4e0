"""The model to pretrain: a preset with overrides, initialized for a tokenizer, or an existing model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmctl.artifacts import hub
from llmctl.artifacts.find import kind_of
from llmctl.artifacts.load import load_model
from llmctl.config import PretrainConfig
from llmctl.errors import UsageError
from llmctl.model.presets import ALIASES, PRESETS, get_preset
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.base import Tokenizer
from llmctl.training.settings import check_family, model_config


def load_base(config: PretrainConfig) -> Any:
    """Load the model if `model.preset` is a path, else return None."""
    name = config.model.preset
    if name == "auto" or name.lower() in PRESETS or name.lower() in ALIASES:
        return None
    if not Path(name).exists():
        get_preset(name)  # raises, suggesting the closest name
    base = load_model(Path(name), device="cpu", dtype="float32")
    if base.model.config.n_labels:
        raise UsageError(
            f"`{name}` is {kind_of(base.model.config)}, `--objective {config.objective}` needs a language modeling head",
            "name the model it was made from"
            if base.model.config.head != "text"
            else "`llmctl finetune MODEL DATA --task classify` trains it further; or name the model it was made from",
        )
    check_family(config, base.model.config.family, name)
    if base.tokenizer is None:
        raise UsageError(f"`{name}` has no tokenizer, so its training cannot continue", "give it one with --tokenizer")
    return base


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Build and initialize the model with the tokenizer's vocabulary and ids, and a context of at least `train.seq_len`."""
    shape = model_config(config)
    check_family(config, shape.family, config.model.preset)
    if shape.n_experts:
        raise UsageError(
            f"`model.n_experts` is {shape.n_experts}: a mixture of experts that starts from random weights needs a loss "
            "that balances its experts, which llmctl does not have",
            "`--model FOLDER` continues training a published one",
        )
    source_size = tokenizer.vocab_size if tokenizer.has_target_vocabulary else 0
    tokenizer = tokenizer.for_output(shape.family)
    wanted = config.model.overrides.get("vocab_size", 0)
    if wanted and wanted < tokenizer.vocab_size:
        raise UsageError(
            f"`model.vocab_size` {wanted} is smaller than the tokenizer's {tokenizer.vocab_size}",
            "omit model.vocab_size, or lower tokenizer.vocab_size",
        )
    context = shape.max_positions
    if "max_positions" not in config.model.overrides:
        context = max(context, config.train.seq_len)
    if context < config.train.seq_len:
        raise UsageError(
            f"`train.seq_len` {config.train.seq_len} is longer than `model.max_positions` {context}",
            f"--set model.max_positions={config.train.seq_len}",
        )
    bos = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    pad = -1 if tokenizer.pad_id is None else tokenizer.pad_id
    shape = replace(
        shape,
        vocab_size=wanted or tokenizer.vocab_size,
        source_vocab_size=source_size if shape.family == "encoder_decoder" else 0,
        max_positions=context,
        pad_id=pad,
        bos_id=bos,
        eos_id=-1 if tokenizer.eos_id is None else tokenizer.eos_id,
        mask_id=-1 if tokenizer.mask_id is None else tokenizer.mask_id,
        decoder_start_id=max(pad, 0) if shape.family == "encoder_decoder" else -1,
    )
    model = LanguageModel(shape)
    initialize(model, config.train.seed)
    return model


def label(config: PretrainConfig) -> str:
    """Return a short name for the run folder."""
    return "tiny" if config.model.preset == "auto" else hub.label(config.model.preset)
