"""How much worse than another a model may be: `0.01` in units of a figure, or `1%` of the other's."""

import re
from dataclasses import dataclass

from llmctl.errors import UsageError
from llmctl.metrics.figures import is_higher_better

DROP = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(%?)", re.ASCII)


@dataclass(frozen=True)
class Gate:
    """The largest drop: in units of the figure, or as a share of the base's."""

    amount: float
    is_relative: bool
    text: str

    def holds(self, metric: str, base: float, other: float) -> bool:
        """Tell whether a figure is close enough to the base's, or better; one that is not a number is not."""
        sign = 1.0 if is_higher_better(metric) else -1.0
        return sign * (base - other) <= (abs(base) * self.amount if self.is_relative else self.amount)


def parse_gate(text: str) -> Gate:
    """Read `0.01` or `1%`.

    Raises: UsageError for anything else.
    """
    found = DROP.fullmatch(text.strip())
    if not found:
        raise UsageError(f"`--max-drop {text}` is not an amount", "0.01 in units of the figure, or 1% of the first's")
    return Gate(float(found[1]) / (100 if found[2] else 1), bool(found[2]), text.strip())
