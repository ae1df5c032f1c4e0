"""Sums that become figures: bits per byte, perplexity, accuracy; the metrics file; the loss curve as SVG.

Knows nothing of models. A figure is always a quotient of two global sums, never an average of averages.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmctl.files import write_text


class Figure(NamedTuple):
    """What a figure is called, how it is written, and whether more of it is better."""

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
    "mcc": Figure("MCC", ".3f", is_higher_better=True),
    "pearson": Figure("Pearson", ".4f", is_higher_better=True),
    "spearman": Figure("Spearman", ".4f", is_higher_better=True),
    "bleu": Figure("BLEU", ".2f", is_higher_better=True),
    "chrf": Figure("chrF", ".1f", is_higher_better=True),
    "rouge_l": Figure("ROUGE-L", ".3f", is_higher_better=True),
    "exact_match": Figure("exact match", ".1%", is_higher_better=True),
    "token_f1": Figure("token F1", ".3f", is_higher_better=True),
    "kl": Figure("KL to teacher", ".4f"),
    "agreement": Figure("same best token", ".1%", is_higher_better=True),
    "overlap": Figure("sum of min(p, q)", ".3f", is_higher_better=True),
    "calibration_error": Figure("calibration error", ".4f"),
}
"""Held-out figures by the names they have in metrics.jsonl and in `--json`; of others, less is better."""


def is_higher_better(name: str) -> bool:
    """Tell whether more of a figure is better."""
    return name in FIGURES and FIGURES[name].is_higher_better


def brief(figures: Mapping[str, Any]) -> str:
    """Return the figures that have a name, as a person reads them."""
    known = ((FIGURES[name], value) for name, value in figures.items() if name in FIGURES)
    return ", ".join(
        f"{figure.label} {'-' if value is None else format(value, figure.form)}" for figure, value in known
    )


@dataclass(frozen=True)
class Sums:
    """What evaluations of text add up: nats, labels, bytes the labels stand for, labels that were the likeliest."""

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
        """Return loss (nats per label), perplexity, bits per byte, accuracy, and the counts they rest on.

        Bits per byte count the bytes of the predicted text, and the cost of every label: end-of-text and sentinels,
        which stand for no byte, make it larger, never smaller.
        """
        loss = self.nats / max(self.count, 1.0)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan,
            "accuracy": self.correct / max(self.count, 1.0),
            "n_labels": int(self.count),
            "n_bytes": int(self.n_bytes),
        }


class MetricsFile:
    """`metrics.jsonl`: one object per line, appended and flushed, so that a killed run keeps what it wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> str:
        """Add one line; return why it could not be written, or an empty string: training must not end for it."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded(record), ensure_ascii=False) + "\n")
        except OSError as error:
            return str(error)
        return ""

    def cut_after(self, step: int, checked_step: int) -> None:
        """Drop the lines of steps and evaluations that a resumed run will take again, the closing one among them."""

        def stays(line: Mapping[str, Any]) -> bool:
            if line.get("kind") != "eval":
                return line["step"] <= step
            return line["step"] <= checked_step and not (line.get("full") and line["step"])

        if self.path.exists():
            kept = [line for line in self.read() if stays(line)]
            write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        # A killed run may leave half a character; its line is half a line, which is passed over below.
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        records = []
        for line in text.split("\n"):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a killed run
                continue
        return records


def rounded(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with floats of six digits, and null where a number is not finite (JSON has no NaN)."""

    def shorten(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    return {key: shorten(value) for key, value in record.items()}


def sparkline(values: Sequence[float], width: int = 30, *, ascii_only: bool = False) -> str:
    """Return the last `width` values as a line of bars, scaled to their own range."""
    bars = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    recent = [value for value in values[-width:] if math.isfinite(value)]
    if not recent:
        return ""
    low, high = min(recent), max(recent)
    span = (high - low) or 1.0
    return "".join(bars[min(len(bars) - 1, int((value - low) / span * len(bars)))] for value in recent)


def loss_svg(train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> str:
    """Return a picture of the loss over the steps: training as a thin line, held-out as dots joined by a line."""
    points = [*train, *held_out]
    if not points:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="360"/>\n'
    width, height, left, top = 640, 360, 56, 24
    inner_width, inner_height = width - left - 16, height - top - 40
    last_step = max(1, *(step for step, _ in points))
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    span = (high - low) or 1.0

    def place(step: int, loss: float) -> str:
        return f"{left + inner_width * step / last_step:.1f},{top + inner_height * (high - loss) / span:.1f}"

    def path(series: Sequence[tuple[int, float]]) -> str:
        return " ".join(place(step, loss) for step, loss in series)

    ticks = "".join(
        f'<text x="{left - 6}" y="{top + inner_height * share + 4:.1f}" text-anchor="end">{high - span * share:.2f}</text>'
        f'<line x1="{left}" x2="{width - 16}" y1="{top + inner_height * share:.1f}" y2="{top + inner_height * share:.1f}" '
        'stroke="#ddd"/>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    dots = "".join(
        '<circle r="3" fill="#c33" cx="{}" cy="{}"/>'.format(*place(step, loss).split(",")) for step, loss in held_out
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{ticks}'
        f'<polyline fill="none" stroke="#36c" stroke-width="1" points="{path(train)}"/>'
        f'<polyline fill="none" stroke="#c33" stroke-width="1.5" points="{path(held_out)}"/>{dots}'
        f'<text x="{left}" y="{height - 20}">0</text>'
        f'<text x="{width - 16}" y="{height - 20}" text-anchor="end">{last_step} steps</text>'
        f'<text x="{left}" y="14">loss, nats per label: <tspan fill="#36c">training</tspan>, '
        f'<tspan fill="#c33">held out</tspan></text></svg>\n'
    )
