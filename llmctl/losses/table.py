"""The losses by name, each with the place it comes from, so that help and errors can print it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmctl.losses.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class LossRow:
    """A loss with the place it comes from."""

    function: Callable[..., Any]
    source: str


LOSSES: dict[str, LossRow] = {
    "cross_entropy": LossRow(linear_cross_entropy, "negative log-likelihood; chunked after arXiv:2410.10989"),
}
