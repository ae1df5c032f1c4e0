"""`--dry-run`: the estimate of a pretraining run from its config alone; no data is read, nothing is built."""

from dataclasses import replace

from llmctl.config import PretrainConfig, TrainConfig
from llmctl.engine.estimate import Estimate, estimate
from llmctl.engine.train import DEFAULT_STEPS, check, model_config
from llmctl.model.presets import get_preset


def dry_run(config: PretrainConfig) -> Estimate:
    """Return the estimate of a run.

    A published system brings its own vocabulary, context and number of tokens where the config does not say.
    Raises: UsageError for settings that cannot be.
    """
    import torch

    from llmctl.engine.runtime import choose_dtype, product_rate

    check(config)
    name = "tiny" if config.model.preset == "auto" else config.model.preset
    preset = get_preset(name)
    shape = model_config(config)
    shape = replace(shape, vocab_size=shape.vocab_size or config.tokenizer.vocab_size)
    train = config.train
    if not preset.dims_only and train.seq_len == TrainConfig().seq_len:
        train = replace(train, seq_len=shape.max_positions)
    tokens = train.tokens or train.steps * train.batch_size * train.seq_len or preset.tokens
    tokens = tokens or DEFAULT_STEPS[config.objective] * train.batch_size * train.seq_len
    dtype = choose_dtype(train.dtype, on_cpu=True)
    train = replace(train, dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    rate = product_rate(dtype)
    return estimate(name, shape, train, tokens=tokens, optimizer=config.optim.name, cpu_flops=rate)
