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

from llmctl.errors import BusyError, NotFoundError, UsageError
from llmctl.files import discard, write_json, writing

NUMBERED = re.compile(r"(\d{4,})-")
"""How the name of a folder in `runs/` begins."""


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
    for left in path.glob(".*.tmp"):  # of a process that was killed while it wrote; the lock is ours
        discard(left)
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


def is_held(path: Path) -> bool:
    """Tell whether a live process holds a run's lock; asking takes it, shared, for a moment."""
    try:
        with (path / ".lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held; or it cannot be asked, and then the run is better left alone
        return True
    return False


def find_run(name: str, *, holding: str = "recipe.yaml", finished: bool = False) -> Path:
    """Return the folder of the run that a name means: a path, a run's number or beginning, or `latest`.

    holding: the file that makes a folder a run to the caller; finished: whether `latest`, the newest run of all, may be
    one that is finished. Without either it is what `--resume NAME` means.
    Raises: NotFoundError if nothing fits; UsageError if the name is empty or several runs begin with it.
    """
    if not name:
        raise UsageError("the run's name is empty", "llmctl runs lists the runs")
    folder = runs_folder()
    if name == "latest":
        return find_latest(folder, holding=holding, finished=finished)
    exact = [path for path in (Path(name), folder / name) if (path / holding).is_file()]
    if exact:
        return exact[0]
    inside = folder.is_dir() and Path(name).parent in (Path(), folder)
    runs = [path for path in sorted(folder.iterdir()) if (path / holding).is_file()] if inside else []
    runs = [path for path in runs if not path.is_symlink()]
    number = f"{int(name):04d}-" if name.isdecimal() else Path(name).name
    for beginning in (number, Path(name).name):
        matches = [path for path in runs if path.name.startswith(beginning)]
        if len(matches) > 1:
            names = ", ".join(f"`{path.name}`" for path in matches[:5])
            raise UsageError(f"`{name}` means more than one run: {names}", "write more of the name")
        if matches:
            return matches[0]
    if Path(name).is_dir() or (folder / name).is_dir():
        raise NotFoundError(f"`{name}` is no run: it holds no {holding}", "llmctl runs lists the runs")
    raise NotFoundError(f"there is no run `{name}` in `{folder}`", "llmctl runs lists the runs")


def find_latest(folder: Path, *, holding: str, finished: bool) -> Path:
    """Return the newest run, or the newest unfinished one.

    Raises: NotFoundError if there is none.
    """
    for path in sorted(folder.glob("[0-9]*-*"), reverse=True):
        if (path / holding).is_file() if finished else is_unfinished(read_record(path)):
            return path
    if finished:
        raise NotFoundError(f"there is no run in `{folder}`", "llmctl pretrain makes one")
    raise NotFoundError(f"there is no unfinished run in `{folder}`", "name the run: --resume runs/NNNN-...")


def is_finished(path: Path) -> bool:
    """Tell whether a run has ended with a model."""
    return read_record(path).get("status") == "finished"


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


def runs_folder() -> Path:
    """Return where runs live: `LLMCTL_RUNS`, else `runs/` of the nearest parent that has one, else `./runs`."""
    named = os.environ.get("LLMCTL_RUNS")
    if named:
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "runs").is_dir():
            return Path(os.path.relpath(folder / "runs"))
    return Path("runs")
