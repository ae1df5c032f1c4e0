"""The time that is left of a compression: parts that are planned, and how long parts of the same kind took."""

import time
from collections.abc import Callable

from llmctl.runs.progress import Say, clock

WEIGHTS = {"pruned model": 1.0, "trial": 4.0, "quantizing": 6.0}
"""How long a part takes relative to measuring a pruned model, until one of its kind was timed (SmolLM2-135M, 2 cores)."""


class Timeline:
    """Adds the time that is left to lines that say that a part is done.

    trained_seconds: the budget of the training, None if it is not one of time.
    """

    def __init__(self, say: Say, trained_seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.say, self.trained_seconds, self._now = say, trained_seconds, now
        self._planned: dict[str, int] = {}
        self._spent: dict[str, list[float]] = {}
        self._begun = now()

    def plan(self, kind: str, number: int) -> None:
        """Plan parts of a kind, in addition to those that are."""
        self._planned[kind] = self._planned.get(kind, 0) + number

    def begin(self) -> None:
        """Begin a part: what came before is none."""
        self._begun = self._now()

    def done(self, kind: str, text: str) -> None:
        """Say that a part is done, and begin the next one."""
        now = self._now()
        self._spent.setdefault(kind, []).append(now - self._begun)
        self._begun = now
        self.say(f"{text}  ({self.left()})" if self.left() else text)

    def seconds(self, kind: str) -> float:
        """Return how long a part of a kind takes: as those before it, or by the others."""
        if kind in self._spent:
            return sum(self._spent[kind]) / len(self._spent[kind])
        total = sum(sum(spent) for spent in self._spent.values())
        weights = sum(WEIGHTS[name] * len(spent) for name, spent in self._spent.items())
        return WEIGHTS[kind] * total / weights if weights else 0.0

    def left(self) -> str:
        """Return the time that is left in words, empty before a part is done."""
        if not self._spent:
            return ""
        open_parts = {kind: number - len(self._spent.get(kind, [])) for kind, number in self._planned.items()}
        seconds = sum(self.seconds(kind) * max(0, number) for kind, number in open_parts.items())
        if self.trained_seconds is None:
            return f"{clock(seconds)} left, and the training"
        return f"{clock(seconds + self.trained_seconds)} left"
