"""Remove runs, or their checkpoints: chosen and checked first, all of them, then removed so that a crash leaves no half.

A folder is renamed to a hidden name before its files go; what a crash leaves under such a name, the next removal takes.
Knows nothing of what a run holds but its record and its checkpoints.
"""

import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import BusyError, UsageError
from llmctl.files import writing
from llmctl.runs.folder import find_run, is_held, open_run, point_latest, read_record
from llmctl.runs.history import disk_bytes

LEFT = re.compile(r"\..*\.[0-9a-f]{8}\.llmctl-removed")
"""The hidden names of folders whose removal was begun."""


@dataclass(frozen=True)
class Removal:
    """A run and the folder of it that is to go; `kept` says why nothing does."""

    run: Path
    path: Path
    size_bytes: int
    kept: str = ""


def choose(names: Sequence[str], *, checkpoints: bool) -> list[Removal]:
    """Return what is to be removed of the named runs; nothing is touched yet.

    checkpoints: only their checkpoints, and none of an unfinished run, which needs them to go on.
    Raises: NotFoundError or UsageError for a name, as find_run does; UsageError for a folder that holds other runs;
    BusyError for a run whose process lives.
    """
    found = {
        folder.resolve(): folder for folder in (real(find_run(n, holding="run.json", finished=True)) for n in names)
    }
    for folder in found.values():
        if any(folder.glob("*/run.json")):
            raise UsageError(f"`{folder}` holds other runs", "name those that are to be removed")
        if is_held(folder):
            raise BusyError(f"run `{folder}` is in use by another process", "stop it first, or wait for its end")
    return [checkpoints_of(folder) if checkpoints else whole(folder) for folder in found.values()]


def real(folder: Path) -> Path:
    """Return the folder itself where a link (`runs/latest`) or a dot was named: that is what is renamed."""
    if folder.is_symlink():
        target = folder.resolve()
        return folder.parent / target.name if folder.parent.resolve() == target.parent else target
    return folder.resolve() if folder.name in ("", "..") else folder


def whole(folder: Path) -> Removal:
    """Return the removal of a run."""
    return Removal(folder, folder, disk_bytes(folder))


def checkpoints_of(folder: Path) -> Removal:
    """Return the removal of a run's checkpoints, or why they stay."""
    path = folder / "checkpoints"
    if not path.is_dir():
        return Removal(folder, path, 0, "it has no checkpoints")
    if read_record(folder).get("status") != "finished":  # a record that cannot be read says nothing against it
        return Removal(folder, path, 0, "it is unfinished and goes on from them")
    return Removal(folder, path, disk_bytes(path))


def remove(chosen: Sequence[Removal]) -> Iterator[Removal]:
    """Remove what was chosen, and yield each as it has gone.

    Raises: BusyError, before anything is removed, if a run was begun again meanwhile; OutputError where the file
    system refuses.
    """
    with ExitStack() as locks:
        for removal in chosen:
            with writing(removal.run):
                locks.callback(open_run(removal.run).close)
        for removal in chosen:
            if not removal.kept:
                take_away(removal)
            yield removal


def take_away(removal: Removal) -> None:
    """Remove one folder: out of sight first, and out of `latest`, then its files."""
    path = removal.path
    hidden = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.llmctl-removed"
    with writing(path):
        path.rename(hidden)
        if path == removal.run:
            repair_latest(path.parent)
        with suppress(FileNotFoundError):  # another removal found it and helped
            shutil.rmtree(hidden)
        for left in path.parent.iterdir():
            if LEFT.fullmatch(left.name) and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)


def repair_latest(folder: Path) -> None:
    """Let `latest` and `LATEST` name the newest finished run that is left, or remove them, if theirs has gone."""
    link, file = folder / "latest", folder / "LATEST"
    named = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    is_dangling = link.is_symlink() and not link.exists()
    if not is_dangling and not (named and not (folder / named).exists()):
        return
    records = [(read_record(path.parent), path.parent) for path in folder.glob("[0-9]*-*/run.json")]
    finished = [(str(record.get("finished")), path) for record, path in records if record.get("status") == "finished"]
    if finished:
        point_latest(max(finished)[1])
        return
    if link.is_symlink():
        link.unlink()
    file.unlink(missing_ok=True)
