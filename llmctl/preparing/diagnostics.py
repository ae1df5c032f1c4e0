"""The data doctor: what is odd about examples, counted before the first step, so that nothing is lost in silence."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmctl.errors import UsageError

RARE_SHARE = 0.1
"""A label with less than this share of the most frequent one's examples is worth a word."""


@dataclass
class Findings:
    """Counts over the examples of a run, the places of the first of each kind, and how the labels are spread."""

    n_rows: int = 0
    n_held_out: int = 0
    n_tokens: int = 0
    n_trained_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, where: str) -> None:
        """Count a finding of KINDS."""
        assert kind in KINDS, kind
        self.counts[kind] += 1
        self.places.setdefault(kind, where)

    def problems(self) -> list[str]:
        """Return what is wrong with the data, a line each."""
        lines = [
            f"{KINDS[kind].format(n=f'{self.counts[kind]:,}')} (the first: {self.places[kind]})"
            for kind in KINDS
            if self.counts[kind]
        ]
        return [*lines, *self._rare()]

    def _rare(self) -> Iterator[str]:
        most = max(self.labels.values(), default=0)
        rare = [f"`{label}` {n:,}" for label, n in self.labels.items() if n < RARE_SHARE * most]
        if rare:
            shown = ", ".join(rare[:5]) + (", ..." if len(rare) > 5 else "")
            yield f"labels with less than a tenth of the examples of the most frequent one ({most:,}): {shown}"

    def lines(self) -> list[str]:
        """Return the report: how much there is, how the labels are spread, and what is wrong."""
        trained = f", {self.n_trained_tokens:,} of them trained" if self.n_trained_tokens else ""
        n_train = self.n_rows - self.n_held_out
        lines = [f"{n_train:,} examples to train on, {self.n_held_out:,} held out; {self.n_tokens:,} tokens{trained}"]
        if 0 < len(self.labels) <= 20:
            spread = ", ".join(f"{label} {n / self.labels.total():.1%}" for label, n in self.labels.most_common())
            lines.append(f"labels: {spread}")
        return lines + [f"data: {problem}" for problem in self.problems()]

    def refuse(self) -> None:
        """Refuse data with findings (`--strict`).

        Raises: UsageError with all of them.
        """
        problems = self.problems()
        if problems:
            raise UsageError("; ".join(problems), "mend the data, or leave --strict away")

    def to_dict(self) -> dict[str, object]:
        """Return the counts as JSON knows them."""
        return {
            "rows": self.n_rows,
            "held_out": self.n_held_out,
            "tokens": self.n_tokens,
            "trained_tokens": self.n_trained_tokens,
            **{kind: self.counts[kind] for kind in KINDS},
            "labels": dict(self.labels),
        }


KINDS = {
    "empty": "{n} examples have no text and are left out",
    "cut": "{n} examples are longer than train.seq_len and are cut",
    "dropped": "{n} examples are longer than train.seq_len and are left out",
    "untrained": "{n} examples have no token that is trained and are left out",
    "duplicated": "{n} examples stand there more than once",
    "contradicted": "{n} examples have the text of another one and another label or answer",
    "leaked": "{n} held-out examples are also trained on",
    "endless": "{n} answers do not end with the token that ends a turn",
    "ended_twice": "{n} answers end with the token that ends a turn twice",
}
"""What a finding is called and how it is said, the worst first."""
