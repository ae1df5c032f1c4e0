"""Language-modeling metrics from sums (bits per byte, perplexity, accuracy), and the names and formats of all metrics.

Knows no models. A metric is always a quotient of two global sums, never an average of averages.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A metric's label, its format, and whether higher is better."""

    label: str
    form: str
    is_higher_better: bool = False


FIGURES: dict[str, Figure] = {
    "bits_per_byte": Figure("bits/byte", ".3f"),
    "loss": Figure("loss", ".3f"),
    "perplexity": Figure("perplexity", ".1f"),
    "accuracy": Figure("accuracy", ".1%", is_higher_better=True),
    "accuracy_norm": Figure("accuracy by length", ".1%", is_higher_better=True),
    "f1": Figure("F1", ".3f", is_higher_better=True),
    "precision": Figure("precision", ".3f", is_higher_better=True),
    "recall": Figure("recall", ".3f", is_higher_better=True),
    "mcc": Figure("MCC", ".3f", is_higher_better=True),
    "pearson": Figure("Pearson", ".4f", is_higher_better=True),
    "spearman": Figure("Spearman", ".4f", is_higher_better=True),
    "bleu": Figure("BLEU", ".2f", is_higher_better=True),
    "chrf": Figure("chrF", ".1f", is_higher_better=True),
    "rouge_l": Figure("ROUGE-L", ".3f", is_higher_better=True),
    "exact_match": Figure("exact match", ".1%", is_higher_better=True),
    "token_f1": Figure("token F1", ".3f", is_higher_better=True),
    "margin": Figure("reward margin", ".3f", is_higher_better=True),
    "reward_chosen": Figure("reward of chosen", ".3f", is_higher_better=True),
    "reward_rejected": Figure("reward of rejected", ".3f"),
    "kl": Figure("KL to teacher", ".4f"),
    "agreement": Figure("top-1 agreement", ".1%", is_higher_better=True),
    "overlap": Figure("sum of min(p, q)", ".3f", is_higher_better=True),
    "calibration_error": Figure("calibration error", ".4f"),
}
"""Held-out metrics by their keys in metrics.jsonl and `--json`; for metrics not listed, lower is better."""


def is_higher_better(name: str) -> bool:
    """Tell whether higher values of a metric are better."""
    return name in FIGURES and FIGURES[name].is_higher_better


TOO_LONG = 1e7
"""From here on a number is written with an exponent: the perplexity of a model that has diverged has 300 digits."""


def shown(value: float | None, form: str, *, absent: str = "-") -> str:
    """Format a number for people: with an exponent if it is huge, `inf` or `nan` as such, `absent` without a value."""
    if value is None:
        return absent
    if abs(value) >= TOO_LONG or not math.isfinite(value):
        return f"{value:.1e}"
    return format(value, form)


def brief(figures: Mapping[str, Any]) -> str:
    """Format the metrics listed in FIGURES on one line, with labels."""
    known = ((FIGURES[name], value) for name, value in figures.items() if name in FIGURES)
    return ", ".join(f"{metric.label} {shown(value, metric.form)}" for metric, value in known)


@dataclass(frozen=True)
class Sums:
    """The sums of a text evaluation: nats, labels, bytes of the labels' text, correct top-1 predictions."""

    nats: float = 0.0
    count: float = 0.0
    n_bytes: float = 0.0
    correct: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.nats + other.nats,
            self.count + other.count,
            self.n_bytes + other.n_bytes,
            self.correct + other.correct,
        )

    def figures(self) -> dict[str, float]:
        """Return loss (nats per label), perplexity, bits per byte, accuracy, and the underlying counts.

        Bits per byte divides the cost of all labels by the bytes of the predicted text: end-of-text and sentinels,
        which have no bytes, increase it.
        """
        loss = self.nats / max(self.count, 1.0)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # exp overflows above 709
            "bits_per_byte": self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan,
            "accuracy": self.correct / max(self.count, 1.0),
            "n_labels": int(self.count),
            "n_bytes": int(self.n_bytes),
        }


def rounded(record: Mapping[str, Any]) -> dict[str, Any]:
    """Round floats to six significant digits and replace non-finite ones by None (JSON has no NaN)."""

    def shorten(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    return {key: shorten(value) for key, value in record.items()}
