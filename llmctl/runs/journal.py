"""The log of a training run: metrics.jsonl, samples.jsonl, experiment trackers, and events shown as progress."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmctl.runs.metrics_file import MetricsFile
from llmctl.runs.progress import Progress


class Tracker(Protocol):
    """An experiment tracker that receives metrics in addition to metrics.jsonl."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""

    def finish(self) -> None:
        """Flush what has not been sent."""


REPEATED = re.compile(r"(.{1,60}?)\1{3,}", re.DOTALL)


def without_repeats(text: str) -> str:
    """Return a text in which what is repeated more than three times in a row stands twice, as models write at first."""
    return REPEATED.sub(lambda found: f"{found[1]}{found[1]}…", text)


@dataclass
class Journal:
    """The files and trackers of a run; `is_open` is true only on the rank that writes them."""

    folder: Path
    progress: Progress
    trackers: Mapping[str, Tracker] = field(default_factory=dict)
    is_open: bool = True
    started: float = field(default_factory=time.monotonic)
    shown: str = ""

    @property
    def metrics(self) -> MetricsFile:
        """The file metrics.jsonl."""
        return MetricsFile(self.folder / "metrics.jsonl")

    @property
    def samples(self) -> MetricsFile:
        """The file samples.jsonl: texts that the model generated during training."""
        return MetricsFile(self.folder / "samples.jsonl")

    @property
    def seconds(self) -> float:
        """Seconds of training, including those before an interruption."""
        return time.monotonic() - self.started

    def cut_after(self, step: int, checked_step: int) -> None:
        """Drop the records of steps and evaluations that a resumed run repeats."""
        if self.is_open:
            self.metrics.cut_after(step, checked_step)
            self.samples.cut_after(checked_step, checked_step)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append a metrics record and send its numbers to the trackers."""
        if not self.is_open:
            return
        problem = self.metrics.append({"kind": kind, "seconds": self.seconds, **record})
        if problem:
            self.progress.say(f"a metrics record was lost: {problem}")
        prefix = "" if kind == "train" else f"{kind}/"
        metrics = {prefix + name: value for name, value in record.items() if isinstance(value, float)}
        for tracker in self.trackers.values() if kind != "event" else ():
            tracker.log(metrics, int(record["step"]))

    def event(self, kind: str, step: int, text: str) -> None:
        """Show and record an unusual event of a step."""
        self.progress.say(text)
        self.log("event", {"step": step, "event": kind, "text": text})

    def show(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Record the generated samples and show the first one, unless it is what was shown last."""
        self.samples.append({"step": step, "samples": list(samples)})
        for sample in samples[:1]:
            line = f"  {sample['prompt']}|{without_repeats(sample['text'])}".replace("\n", " ")
            if line != self.shown:
                self.shown = line
                self.progress.say(line)

    def tracker_ids(self) -> dict[str, str]:
        """Return each tracker's own id of this run, empty if it has none."""
        return {name: str(getattr(getattr(t, "tracker", None), "id", "")) for name, t in self.trackers.items()}

    def close(self) -> None:
        """Flush the trackers."""
        for tracker in self.trackers.values():
            tracker.finish()
