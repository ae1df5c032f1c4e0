"""The result of evaluating one model; independent of task and model."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """Metrics of one model on one task, the rows and tokens they cover, and counts of problematic rows.

    n_tokens: processed positions, or new tokens if text is generated; n_empty: rows without an input; n_cut: rows that
    were truncated; example: the first answer and its reference, for display.
    """

    figures: dict[str, float]
    n_rows: int
    n_tokens: int
    n_empty: int = 0
    n_cut: int = 0
    example: dict[str, str] = field(default_factory=dict)
