"""Run folders: `runs/NNNN-command-name/` with a lock, a status that can be trusted, and `runs/latest`.

Knows where runs live and in what state they are, nothing of what they train.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from llmctl.engine.models import runs_folder
from llmctl.errors import BusyError, NotFoundError
from llmctl.files import write_json, writing


@dataclass
class Run:
    """An open run folder; the lock is held until `close` or the process's end."""

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    lock: TextIO | None = None

    def update(self, **entries: Any) -> None:
        """Merge entries into `run.json`, atomically; only the holder of the lock writes."""
        self.record.update(entries)
        if self.lock is not None:
            write_json(self.path / "run.json", self.record)

    def finish(self, **entries: Any) -> None:
        """Mark the run as finished and let `runs/latest` follow it."""
        self.update(status="finished", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entries)
        if self.lock is not None and self.path.parent.resolve() == runs_folder().resolve():
            point_latest(self.path)

    def close(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def create_run(command: str, name: str, *, out: Path | None = None) -> Run:
    """Make a new run folder, numbered after the highest one there is; `out` names it outright.

    Raises: OutputError where it cannot be written.
    """
    folder = runs_folder() if out is None else out.parent
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if out is not None:
            out.mkdir(exist_ok=True)
            return open_run(out, command=command)
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{command}-{name}").strip("-")
        number = 1 + max((int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]-*")), default=0)
        while True:
            try:
                path = folder / f"{number:04d}-{label}"
                # Two names must not share a number, so the number itself is claimed by the exclusive mkdir.
                if any(folder.glob(f"{number:04d}-*")):
                    raise FileExistsError
                path.mkdir()
                return open_run(path, command=command)
            except FileExistsError:
                number += 1


def open_run(path: Path, *, command: str | None = None) -> Run:
    """Lock a run folder and read its record.

    Raises: BusyError if another process holds it.
    """
    lock = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise BusyError(
            f"run `{path}` is in use by another process", "wait for it, or start a run of its own"
        ) from None
    run = Run(path, read_record(path), lock)
    if command is not None:
        run.update(status="running", command=command, created=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    return run


def read_record(path: Path) -> dict[str, Any]:
    """Return a run's `run.json`, or nothing where there is none that can be read."""
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def find_run(name: str) -> Path:
    """Return the folder that `--resume NAME` means: a path, a run's number or prefix, or `latest` (newest unfinished).

    Raises: NotFoundError if nothing fits.
    """
    folder = runs_folder()
    if name != "latest":
        matches = [path for path in (Path(name), folder / name) if (path / "recipe.yaml").is_file()]
        matches += sorted(path for path in folder.glob(f"{name}*") if (path / "recipe.yaml").is_file())
        if matches:
            return matches[0]
        raise NotFoundError(f"there is no run `{name}` in `{folder}`", "--resume takes a run's folder, or latest")
    unfinished = [path for path in sorted(folder.glob("[0-9]*-*"), reverse=True) if is_unfinished(read_record(path))]
    if not unfinished:
        raise NotFoundError(f"there is no unfinished run in `{folder}`", "name the run: --resume runs/NNNN-...")
    return unfinished[0]


def is_unfinished(record: Mapping[str, Any]) -> bool:
    """Tell whether a run was begun and not finished."""
    return bool(record) and record.get("status") != "finished"


def point_latest(path: Path) -> None:
    """Let `runs/latest` (and the text file `runs/LATEST`) name this run."""
    folder = path.parent
    temporary = folder / f".latest-{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        temporary.replace(folder / "latest")
    except OSError:  # a file system without symbolic links; the text file below serves it
        temporary.unlink(missing_ok=True)
    (folder / "LATEST").write_text(path.name + "\n", encoding="utf-8")
