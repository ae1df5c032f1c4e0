"""JSON Lines files of a run (metrics.jsonl, samples.jsonl), truncated to the checkpoint's step on resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.files import parse_json, write_text
from llmctl.metrics.figures import rounded


class MetricsFile:
    """A JSON Lines file; every record is flushed when appended, so a killed run keeps its records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> str:
        """Append a record; return the reason if that failed, else an empty string: logging must not stop training."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded(record), ensure_ascii=False) + "\n")
        except OSError as error:
            return str(error)
        return ""

    def cut_after(self, step: int, checked_step: int) -> None:
        """Drop the records of steps and evaluations that a resumed run repeats, including the final evaluation."""

        def stays(line: Mapping[str, Any]) -> bool:
            at = line.get("step")
            if not isinstance(at, (int, float)):
                return False
            if line.get("kind") != "eval":
                return at <= step
            return at <= checked_step and not (line.get("full") and at)

        if self.path.exists():
            kept = [line for line in self.read() if isinstance(line, dict) and stays(line)]
            write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def read(self) -> list[dict[str, Any]]:
        """Return all complete records."""
        # A killed run may leave part of a UTF-8 sequence; that line is incomplete too and is skipped below.
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        records = []
        for line in text.split("\n"):
            try:
                records.append(parse_json(line))
            except ValueError:  # an incomplete last line of a killed run, or the empty one at the end
                continue
        return records
