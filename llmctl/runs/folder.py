"""Run folders: `runs/NNNN-command-name/` with a lock, a status verified against that lock, and `runs/latest`.

Knows where runs are stored and their status, nothing about what they train.
"""

import fcntl
import os
import re
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from llmctl.errors import BusyError, NotFoundError, UsageError
from llmctl.files import discard, is_seen, parse_json, write_json, writing

NUMBERED = re.compile(r"(\d{4,})-")
"""The number prefix of a folder in `runs/`."""


@dataclass
class Run:
    """An open run folder; the lock is held until `close` or process exit."""

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    lock: TextIO | None = None
    is_new: bool = False
    """Whether this process made the folder, or found it empty."""

    def update(self, **entries: Any) -> None:
        """Merge entries into `run.json` atomically; without the lock nothing is written."""
        self.record.update(entries)
        if self.lock is not None:
            write_json(self.path / "run.json", self.record)

    def finish(self, **entries: Any) -> None:
        """Mark the run as finished and point `runs/latest` at it."""
        self.update(status="finished", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entries)
        if self.lock is not None and self.path.parent.resolve() == runs_folder().resolve():
            point_latest(self.path)

    def close(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def create_run(command: str, name: str, *, out: Path | None = None) -> Run:
    """Create and lock a run folder with the next free number, or the folder `out` if given.

    Raises: OutputError if it cannot be written.
    """
    folder = runs_folder() if out is None else out.parent
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if out is not None:
            out.mkdir(exist_ok=True)
            run = open_run(out, command=command, is_new=not any(out.iterdir()))
            note_elsewhere(out)
            return run
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{command}-{name}").strip("-")
        number = 1 + max((int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]-*")), default=0)
        while True:
            try:
                path = folder / f"{number:04d}-{label}"
                # Two names must not share a number, so the number itself is claimed by the exclusive mkdir.
                if any(folder.glob(f"{number:04d}-*")):
                    raise FileExistsError
                path.mkdir()
                return open_run(path, command=command, is_new=True)
            except FileExistsError:
                number += 1


def elsewhere_file() -> Path:
    """Return the file that lists the runs begun with `-o`: lines of the runs folder they belong to and their own."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "llmctl" / "elsewhere"


def note_elsewhere(out: Path) -> None:
    """Remember a run outside the runs folder, so that it is listed; that this fails is no reason not to train."""
    if out.parent.resolve() == runs_folder().resolve():
        return
    line = f"{runs_folder().resolve()}\t{out.resolve()}\n"
    with suppress(OSError):
        file = elsewhere_file()
        if file.is_file() and line in file.read_text(encoding="utf-8"):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(line)


def runs_elsewhere() -> list[Path]:
    """Return the runs outside the runs folder that were begun next to it and still exist, by name."""
    here = str(runs_folder().resolve())
    text = ""
    with suppress(OSError, UnicodeDecodeError):
        text = elsewhere_file().read_text(encoding="utf-8")
    pairs = (line.split("\t") for line in text.split("\n") if line.count("\t") == 1)
    paths = sorted({Path(path) for folder, path in pairs if folder == here})
    cwd = Path.cwd()
    return [
        path.relative_to(cwd) if path.is_relative_to(cwd) and path != cwd else path
        for path in paths
        if is_seen(path / "run.json")
    ]


def run_paths() -> list[Path]:
    """Return the runs in the runs folder, by name, then those begun next to it with `-o`."""
    folder = runs_folder()
    # `latest` only points to a run; hidden folders are being removed.
    inside = [path for path in sorted(folder.iterdir()) if is_run(path)] if folder.is_dir() else []
    return [*inside, *runs_elsewhere()]


def is_run(path: Path) -> bool:
    """Tell whether a folder in the runs folder is a run, damaged or not."""
    if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
        return False
    return (path / "run.json").exists() or NUMBERED.match(path.name) is not None


def open_run(path: Path, *, command: str | None = None, is_new: bool = False) -> Run:
    """Lock a run folder and read its `run.json`.

    Raises: BusyError if another process holds the lock.
    """
    lock = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise BusyError(
            f"run `{path}` is in use by another process", "wait until it ends, or start a new run"
        ) from None
    run = Run(path, read_record(path), lock, is_new)
    for leftover in path.glob(".*.tmp"):  # of a killed writer: we hold the lock, so no live process uses them
        discard(leftover)
    if command is not None:
        run.update(status="running", command=command, created=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    return run


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a run's `run.json`, empty if it is missing or unreadable."""
    try:
        record = parse_json((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_held(path: Path) -> bool:
    """Tell whether a live process holds a run's lock; the test briefly takes a shared lock."""
    try:
        with (path / ".lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # locked, or locking failed for another reason: then assume that it is in use
        return True
    return False


def find_run(name: str, *, holding: str = "recipe.yaml", finished: bool = False) -> Path:
    """Resolve a run name to its folder: a path, a run's number, a prefix of its name, or `latest`.

    holding: the file that a folder must contain to count as a run; finished: let `latest` mean the newest run of any
    status rather than the newest unfinished one. The defaults are those of `--resume NAME`.
    Raises: NotFoundError if no run matches; UsageError if the name is empty or ambiguous.
    """
    if not name:
        raise UsageError("the run name is empty", "`llmctl runs` lists the runs")
    folder = runs_folder()
    if name == "latest":
        return find_latest(folder, holding=holding, finished=finished)
    # An existing path wins over a prefix, so that a full name is never ambiguous.
    exact = [path for path in (Path(name), folder / name) if (path / holding).is_file()]
    if exact:
        return exact[0]
    inside = folder.is_dir() and Path(name).parent in (Path(), folder)
    runs = [path for path in sorted(folder.iterdir()) if (path / holding).is_file()] if inside else []
    runs = [path for path in runs if not path.is_symlink()]
    # `12` means run 0012 first, and only then any run whose name starts with 12.
    number = f"{int(Path(name).name):04d}-" if Path(name).name.isdecimal() else Path(name).name
    for prefix in (number, Path(name).name):
        matches = [path for path in runs if path.name.startswith(prefix)]
        if len(matches) > 1:
            names = ", ".join(f"`{path.name}`" for path in matches[:5])
            raise UsageError(f"`{name}` matches more than one run: {names}", "give a longer prefix")
        if matches:
            return matches[0]
    if Path(name).is_dir() or (folder / name).is_dir():
        raise NotFoundError(f"`{name}` is not a run folder: it contains no `{holding}`", "`llmctl runs` lists the runs")
    raise NotFoundError(f"run `{name}` does not exist in `{folder}`", "`llmctl runs` lists the runs")


def resumable_run(name: str, command: str) -> Path:
    """Return the folder of a run that `command` can resume.

    Raises: NotFoundError if there is none; UsageError for a run of another command, and for one that is finished.
    """
    path = find_run(name)
    record, shown = read_record(path), shlex.quote(str(path))
    begun_by = str(record.get("command", command))
    if begun_by != command:
        raise UsageError(f"`{path}` is a run of `llmctl {begun_by}`", f"llmctl {begun_by} --resume {shlex.quote(name)}")
    if record.get("status") == "finished":
        recipe = f"llmctl {command} -r {shlex.quote(str(path / 'recipe.yaml'))}"
        goes_on = command in ("pretrain", "finetune")  # the others make their model from another one each time
        hint = f"`{recipe} --model {shown}` trains its model further" if goes_on else f"`{recipe}` makes it again"
        raise UsageError(f"run `{path}` is finished", f"{hint}, in a new run; `--steps N` there sets its budget")
    return path


def find_latest(folder: Path, *, holding: str, finished: bool) -> Path:
    """Return the newest run, or the newest unfinished one.

    Raises: NotFoundError if there is none.
    """
    numbered = [(int(match[1]), path) for path in folder.glob("[0-9]*-*") if (match := NUMBERED.match(path.name))]
    for _, path in sorted(numbered, reverse=True):
        if (path / holding).is_file() if finished else is_unfinished(read_record(path)):
            return path
    if finished:
        raise NotFoundError(f"there is no run in `{folder}`", "`llmctl pretrain` creates one")
    raise NotFoundError(f"there is no unfinished run in `{folder}`", "name the run: --resume runs/NNNN-...")


def is_finished(path: Path) -> bool:
    """Tell whether a run's status is `finished`."""
    return read_record(path).get("status") == "finished"


def is_unfinished(record: Mapping[str, Any]) -> bool:
    """Tell whether a record exists and is not `finished`."""
    return bool(record) and record.get("status") != "finished"


def point_latest(path: Path) -> None:
    """Point `runs/latest` (a symbolic link) and `runs/LATEST` (a text file) at this run."""
    folder = path.parent
    temporary = folder / f".latest-{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        temporary.replace(folder / "latest")
    except OSError:  # no symbolic links on this file system: the text file has to do
        temporary.unlink(missing_ok=True)
    (folder / "LATEST").write_text(path.name + "\n", encoding="utf-8")


def runs_folder() -> Path:
    """Return the runs folder: `LLMCTL_RUNS`, else the nearest `runs/` in this or a parent directory, else `./runs`."""
    named = os.environ.get("LLMCTL_RUNS")
    if named:
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "runs").is_dir():
            return Path(os.path.relpath(folder / "runs"))
    return Path("runs")
