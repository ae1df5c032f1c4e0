"""The result of every objective: a sum, never a mean. The loop divides once, by the global count of labels."""

from dataclasses import dataclass

from torch import Tensor

IGNORE = -100
"""The label of positions that do not count, as in torch's cross_entropy."""


@dataclass(frozen=True)
class Loss:
    """A loss summed over labels, the number of labels, and components to report.

    `sum` is differentiable; `count` and `parts` are float64 scalars that add up over micro-batches and ranks. `outputs`
    (B, K) are values per row, for metrics that are not sums; only computed in evaluation.
    """

    sum: Tensor
    count: Tensor
    parts: dict[str, Tensor]
    outputs: Tensor | None = None
