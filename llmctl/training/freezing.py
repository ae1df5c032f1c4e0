"""Freeze parameters by the patterns of `train.freeze`."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from llmctl.errors import UsageError
from llmctl.model.transformer import LanguageModel

LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")
"""`layers.2` or `layers.0-3` (inclusive), in every stack."""


def freeze(model: LanguageModel, patterns: Sequence[str]) -> int:
    """Freeze the parameters that match a pattern, and return their number of elements.

    A pattern is `embeddings`, `layers.N`, `layers.M-N`, or a shell pattern of parameter names.
    Raises: UsageError for a pattern without a match, or if nothing is left to train.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        chosen = [name for name in named if fits(name, pattern)]
        if not chosen:
            parts = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in named})
            raise UsageError(
                f"`train.freeze` has `{pattern}`, which matches no parameter",
                f"use embeddings, layers.0-3, or name patterns such as {', '.join(parts[:4])}",
            )
        for name in chosen:
            named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise UsageError(f"`train.freeze` {list(patterns)} leaves nothing to train", "freeze less")
    return sum(parameter.numel() for parameter in named.values() if not parameter.requires_grad)


def fits(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a parameter."""
    if pattern == "embeddings":
        return ".embed_" in name or ".embedding_norm." in name
    layers = LAYERS.fullmatch(pattern)
    if layers:
        found = re.search(r"\.layers\.(\d+)\.", name)
        first, last = int(layers[1]), int(layers[2] or layers[1])
        return found is not None and first <= int(found[1]) <= last
    return fnmatchcase(name, pattern)
