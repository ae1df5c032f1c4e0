"""Data checks: problems of the examples, counted before the first step, so that nothing is dropped silently."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmctl.errors import UsageError

RARE_SHARE = 0.1
"""Report labels with fewer examples than this share of the most frequent label's."""


@dataclass
class Findings:
    """Counts of examples and problems, the location of the first of each kind, and the label distribution."""

    n_rows: int = 0
    n_held_out: int = 0
    n_tokens: int = 0
    n_trained_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, where: str) -> None:
        """Count a problem of one of KINDS."""
        assert kind in KINDS, kind
        self.counts[kind] += 1
        self.places.setdefault(kind, where)

    def problems(self) -> list[str]:
        """Return one line per kind of problem."""
        lines = [
            f"{KINDS[kind].format(n=f'{self.counts[kind]:,}')} (first: {self.places[kind]})"
            for kind in KINDS
            if self.counts[kind]
        ]
        return [*lines, *self._rare()]

    def _rare(self) -> Iterator[str]:
        most = max(self.labels.values(), default=0)
        rare = [f"`{label}` {n:,}" for label, n in self.labels.items() if n < RARE_SHARE * most]
        if rare:
            listed = ", ".join(rare[:5]) + (", ..." if len(rare) > 5 else "")
            yield f"labels with less than a tenth of the examples of the most frequent label ({most:,}): {listed}"

    def lines(self) -> list[str]:
        """Return the report: number of examples, label distribution, and problems."""
        trained = f", {self.n_trained_tokens:,} of them trained" if self.n_trained_tokens else ""
        n_train = self.n_rows - self.n_held_out
        lines = [f"{n_train:,} training examples, {self.n_held_out:,} held out; {self.n_tokens:,} tokens{trained}"]
        if 0 < len(self.labels) <= 20:
            distribution = ", ".join(f"{label} {n / self.labels.total():.1%}" for label, n in self.labels.most_common())
            lines.append(f"labels: {distribution}")
        return lines + [f"data: {problem}" for problem in self.problems()]

    def refuse(self) -> None:
        """Refuse data with problems (`--strict`).

        Raises: UsageError listing all of them.
        """
        problems = self.problems()
        if problems:
            raise UsageError("; ".join(problems), "fix the data, or omit `--strict`")

    def to_dict(self) -> dict[str, object]:
        """Return the counts as a JSON record."""
        return {
            "rows": self.n_rows,
            "held_out": self.n_held_out,
            "tokens": self.n_tokens,
            "trained_tokens": self.n_trained_tokens,
            **{kind: self.counts[kind] for kind in KINDS},
            "labels": dict(self.labels),
        }


KINDS = {
    "empty": "{n} examples have no text and are dropped",
    "cut": "{n} examples are longer than train.seq_len and are truncated",
    "dropped": "{n} examples are longer than train.seq_len and are dropped",
    "untrained": "{n} examples have no trained token and are dropped",
    "equal": "{n} preferences have two equal answers and are dropped",
    "silent": "{n} conversations have an empty answer, which is not trained",
    "unseen": "{n} messages are left out by the chat template",
    "unread": "{n} fields of conversations are left out by the chat template",
    "duplicated": "{n} examples occur more than once",
    "contradicted": "{n} examples have the same text as another one, but a different label or answer",
    "leaked": "{n} held-out examples are also in the training data",
    "endless": "{n} answers do not end with the end-of-turn token",
    "ended_twice": "{n} answers end with two end-of-turn tokens",
}
"""Kinds of problems and their messages, most severe first."""
