"""What a run writes down while it trains: metrics.jsonl, samples.jsonl, trackers, and events that are also said."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmctl.runs.metrics_file import MetricsFile
from llmctl.runs.progress import Progress


class Tracker(Protocol):
    """Where figures go besides metrics.jsonl."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Send the figures of a step."""

    def finish(self) -> None:
        """Send what is left."""


@dataclass
class Journal:
    """The files and trackers of a run; only the first process writes."""

    folder: Path
    progress: Progress
    trackers: Mapping[str, Tracker] = field(default_factory=dict)
    is_open: bool = True
    started: float = field(default_factory=time.monotonic)

    @property
    def metrics(self) -> MetricsFile:
        """The figures."""
        return MetricsFile(self.folder / "metrics.jsonl")

    @property
    def samples(self) -> MetricsFile:
        """What the model wrote."""
        return MetricsFile(self.folder / "samples.jsonl")

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return time.monotonic() - self.started

    def cut_after(self, step: int, checked_step: int) -> None:
        """Drop the lines of steps and evaluations that are taken again."""
        if self.is_open:
            self.metrics.cut_after(step, checked_step)
            self.samples.cut_after(checked_step, checked_step)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write a line of metrics, and send its figures to the trackers."""
        if not self.is_open:
            return
        problem = self.metrics.append({"kind": kind, "seconds": self.seconds, **record})
        if problem:
            self.progress.say(f"a line of metrics is lost: {problem}")
        prefix = "" if kind == "train" else f"{kind}/"
        figures = {prefix + name: value for name, value in record.items() if isinstance(value, float)}
        for tracker in self.trackers.values() if kind != "event" else ():
            tracker.log(figures, int(record["step"]))

    def event(self, kind: str, step: int, text: str) -> None:
        """Say and write down something out of the ordinary that happened in a step."""
        self.progress.say(text)
        self.log("event", {"step": step, "event": kind, "text": text})

    def show(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Write down what the model wrote, and say the first of it."""
        self.samples.append({"step": step, "samples": list(samples)})
        for sample in samples[:1]:
            self.progress.say(f"  {sample['prompt']}|{sample['text']}".replace("\n", " "))

    def tracker_ids(self) -> dict[str, str]:
        """Return what the trackers' services call this run."""
        return {name: str(getattr(getattr(t, "tracker", None), "id", "")) for name, t in self.trackers.items()}

    def close(self) -> None:
        """Send what is left."""
        for tracker in self.trackers.values():
            tracker.finish()
