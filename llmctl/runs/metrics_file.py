"""metrics.jsonl: one line per record, cut after a step when a run resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.files import write_text
from llmctl.metrics.figures import rounded


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
