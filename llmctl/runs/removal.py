"""Remove runs or their checkpoints: all are checked before the first is removed, and a crash leaves no partial run.

A folder is renamed to a hidden name before its files are deleted; the next removal deletes what a crash left behind.
What no run writes is not removed with one.
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
from llmctl.formats.artifact import ADAPTER_CONFIG, CONFIG, FILES, GGUF, INDEX, WEIGHTS
from llmctl.runs.folder import Run, find_run, is_held, open_run, point_latest, read_record
from llmctl.runs.history import disk_bytes

LEFT = re.compile(r"\..*\.[0-9a-f]{8}\.llmctl-removed")
"""Hidden names of folders whose removal has started."""


@dataclass(frozen=True)
class Removal:
    """A run and the folder to remove (the run itself or its checkpoints); `kept` is the reason to keep it, if any."""

    run: Path
    path: Path
    size_bytes: int
    kept: str = ""


def choose(names: Sequence[str], *, checkpoints: bool) -> list[Removal]:
    """Plan the removal of the named runs, without changing anything.

    checkpoints: remove only checkpoints, and none of an unfinished run, which needs them to resume.
    Raises: NotFoundError or UsageError for a name, as find_run does; UsageError for a folder that contains other runs, or
    what no run wrote; BusyError for a run that is in use.
    """
    # Keyed by resolved path: several names may mean one run.
    folders = {
        folder.resolve(): folder for folder in (real(find_run(n, holding="run.json", finished=True)) for n in names)
    }
    for folder in folders.values():
        if any(folder.glob("*/run.json")):
            raise UsageError(f"`{folder}` contains other runs", "name the runs to remove")
        if is_held(folder):
            raise BusyError(f"run `{folder}` is in use by another process", "stop it first, or wait until it ends")
        if others := [] if checkpoints else not_written(folder):
            listed = ", ".join(f"`{name}`" for name in others[:5]) + (", ..." if len(others) > 5 else "")
            raise UsageError(f"`{folder}` contains {listed}, which no run wrote", "move it away first")
    return [checkpoints_of(folder) if checkpoints else whole(folder) for folder in folders.values()]


def not_written(folder: Path) -> list[str]:
    """Return the names in a run folder that no run writes."""
    trackers = (folder.name, "wandb", "trackio", "mlruns")  # tensorboard's folder has the name of the run
    known = {*WRITTEN, *(Path(name).parts[0] for name in FILES), *trackers}
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name not in known and not PART.fullmatch(name)]


WRITTEN = (
    ".lock", "run.json", "recipe.yaml", "metrics.jsonl", "samples.jsonl", "loss.svg", "README.md", "report.json",
    "checkpoints", "data", "parts", "base-int4",
    WEIGHTS, GGUF, INDEX, CONFIG, ADAPTER_CONFIG, "adapter_model.safetensors",
)  # fmt: skip
"""The names of what runs write, besides the small files of a model."""
PART = re.compile(r"model-\d+-of-\d+\.safetensors|\..*\.tmp|\.nfs\w+")
"""Names of shards, and of what a killed writer or the file system left."""


def real(folder: Path) -> Path:
    """Resolve a link (`runs/latest`) or a dot path to the folder itself, which can be renamed."""
    if folder.is_symlink():
        target = folder.resolve()
        return folder.parent / target.name if folder.parent.resolve() == target.parent else target
    return folder.resolve() if folder.name in ("", "..") else folder


def whole(folder: Path) -> Removal:
    """Plan the removal of a run."""
    return Removal(folder, folder, disk_bytes(folder))


def checkpoints_of(folder: Path) -> Removal:
    """Plan the removal of a run's checkpoints, or say why they are kept."""
    path = folder / "checkpoints"
    if not path.is_dir():
        return Removal(folder, path, 0, "it has no checkpoints")
    if read_record(folder).get("status") != "finished":  # an unreadable record has no status: keep them
        return Removal(folder, path, 0, "it is unfinished and needs them to resume")
    return Removal(folder, path, disk_bytes(path))


def remove(chosen: Sequence[Removal]) -> Iterator[Removal]:
    """Carry out the planned removals, yielding each when it is done.

    Raises: BusyError, before anything is removed, if a run has been resumed meanwhile; OutputError if the file system
    refuses.
    """
    with ExitStack() as locks:
        for removal in chosen:
            with writing(removal.run):
                locks.callback(open_run(removal.run).close)
        for removal in chosen:
            if not removal.kept:
                delete_folder(removal)
            yield removal


def delete_folder(removal: Removal) -> None:
    """Remove one folder: hide it, update `latest`, then delete its files."""
    path = removal.path
    hidden = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.llmctl-removed"
    with writing(path):
        path.rename(hidden)
        if path == removal.run:
            repair_latest(path.parent)
        with suppress(FileNotFoundError):  # a concurrent removal also deletes hidden folders
            shutil.rmtree(hidden)
        for leftover in path.parent.iterdir():
            if LEFT.fullmatch(leftover.name) and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)


def repair_latest(folder: Path) -> None:
    """If the run that `latest` and `LATEST` name was removed, point them at the newest finished run, or delete them."""
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


CLEARED = ("checkpoints", "data", "parts")
"""Folders that a run clears at its beginning and its end."""


def clear(folder: Path) -> None:
    """Remove what an earlier run left in a folder that is used again (`-o` with `-f`)."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in CLEARED:
        shutil.rmtree(folder / name, ignore_errors=True)


def withdraw(run: Run) -> None:
    """Remove a run folder that a mistake of the user's left empty."""
    is_ours = run.lock is not None and run.is_new
    if is_ours and not (run.path / "metrics.jsonl").exists() and not (run.path / "checkpoints").exists():
        shutil.rmtree(run.path, ignore_errors=True)
