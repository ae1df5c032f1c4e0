"""Check the settings of generation; imports no torch, so that a wrong value is refused at once."""

import math

from llmctl.config import GenerateConfig
from llmctl.errors import UsageError

LARGEST_BATCH = 65536
"""A sanity limit: a larger batch size is a typing error that would exhaust the memory."""

KV_CACHES = ("float", "int8")
"""The names in model/cache.py."""


def check(config: GenerateConfig) -> None:
    """Refuse settings outside their range.

    Raises: UsageError listing all of them.
    """
    checks = [
        (config.max_tokens < 1, f"`--max-tokens` is {config.max_tokens}, it must be at least 1"),
        (not 0 <= config.temperature < math.inf, f"`--temperature` is {config.temperature}, it must be 0 or more"),
        (config.top_k < 0, f"`--top-k` is {config.top_k}, it must not be negative"),
        (not 0 < config.top_p <= 1, f"`--top-p` is {config.top_p}, it must be in (0, 1]"),
        (not 0 <= config.min_p <= 1, f"`--min-p` is {config.min_p}, it must be in [0, 1]"),
        (
            not 0 < config.repetition_penalty < math.inf,
            f"`--repetition-penalty` is {config.repetition_penalty}, it must be more than 0",
        ),
        (not math.isfinite(config.length_penalty), f"`--length-penalty` is {config.length_penalty}, not a number"),
        (config.beams < 1, f"`--beams` is {config.beams}, it must be at least 1"),
        (
            not 1 <= config.batch_size <= LARGEST_BATCH,
            f"`--batch-size` is {config.batch_size}, it must be from 1 to {LARGEST_BATCH}",
        ),
        (config.kv not in KV_CACHES, f"`--kv` is {config.kv}, it must be one of {', '.join(KV_CACHES)}"),
    ]
    # Beam search is deterministic: sampling settings would be silently ignored.
    sampling_options = {
        "--top-k": config.top_k != 0,
        "--top-p": config.top_p != 1,
        "--min-p": config.min_p != 0,
        "--repetition-penalty": config.repetition_penalty != 1,
    }
    checks += [
        (config.beams > 1 and used, f"`{name}` has no effect with `--beams {config.beams}`")
        for name, used in sampling_options.items()
    ]
    problems = [sentence for wrong, sentence in checks if wrong]
    if problems:
        raise UsageError("; ".join(problems), "`llmctl generate --help` lists the options and their defaults")
