"""What one evaluation of one model gives; knows no task and no model."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """Figures of one model on one task, the rows and tokens behind them, and what was not as it should be.

    n_tokens: positions that went through the model, or new ones where it wrote; n_empty: rows without an input;
    n_cut: rows that were longer than the model reads; example: the first answer beside what was wanted, for people.
    """

    figures: dict[str, float]
    n_rows: int
    n_tokens: int
    n_empty: int = 0
    n_cut: int = 0
    example: dict[str, str] = field(default_factory=dict)
