"""The losses by name, each with its source, which help and errors print."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmctl.losses.cross_entropy import linear_cross_entropy
from llmctl.losses.divergences import DIVERGENCES
from llmctl.losses.linear_divergence import linear_divergence
from llmctl.losses.matching import hidden_match, relation_match


@dataclass(frozen=True)
class LossRow:
    """A loss with its source."""

    function: Callable[..., Any]
    source: str


LOSSES: dict[str, LossRow] = {
    "cross_entropy": LossRow(linear_cross_entropy, "negative log-likelihood; chunked after arXiv:2410.10989"),
    **{name: LossRow(linear_divergence, f"{row.summary}; {row.source}") for name, row in DIVERGENCES.items()},
    "hidden": LossRow(hidden_match, "cosine of the last hidden states; DistilBERT, Sanh et al. 2019, arXiv:1910.01108"),
    "relation": LossRow(relation_match, "attention relations; MiniLMv2, Wang et al. 2020, arXiv:2012.15828"),
}
