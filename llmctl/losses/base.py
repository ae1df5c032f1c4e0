"""What every loss returns: a sum, never a mean. The loop divides once, by the global count of labels."""

from dataclasses import dataclass

from torch import Tensor

IGNORE = -100
"""Label of a position that is not predicted, as in torch's cross_entropy."""


@dataclass(frozen=True)
class Loss:
    """What an objective returns: a sum over labels, how many there were, and parts worth reporting.

    `sum` is differentiable; `count` and `parts` are plain float64 scalars that add up over micro-batches and ranks.
    `outputs` (B, K), numbers per row for figures that are no sums, are made in evaluation only.
    """

    sum: Tensor
    count: Tensor
    parts: dict[str, Tensor]
    outputs: Tensor | None = None
