"""Quality gates: how much worse than its reference a model may be, as `0.01` in units of a metric or `1%` of it."""

import re
from dataclasses import dataclass

from llmctl.errors import UsageError
from llmctl.metrics.figures import is_higher_better

DROP = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(%?)", re.ASCII)


@dataclass(frozen=True)
class Gate:
    """The largest allowed drop: in units of the metric, or as a fraction of the base's value."""

    amount: float
    is_relative: bool
    text: str

    def holds(self, metric: str, base: float, other: float) -> bool:
        """Tell whether a metric is within the allowed drop of the base's, or better; nan never is."""
        sign = 1.0 if is_higher_better(metric) else -1.0
        return sign * (base - other) <= (abs(base) * self.amount if self.is_relative else self.amount)


def parse_gate(text: str) -> Gate:
    """Parse `0.01` or `1%`.

    Raises: UsageError for anything else.
    """
    match = DROP.fullmatch(text.strip())
    if not match:
        raise UsageError(
            f"`--max-drop {text}` is not a valid amount", "write 0.01 (in units of the metric) or 1% (relative)"
        )
    return Gate(float(match[1]) / (100 if match[2] else 1), bool(match[2]), text.strip())
