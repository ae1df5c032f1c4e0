"""Checkpoints: a folder appears complete or not at all, and the newest valid one wins.

Written under a temporary name, every file and the folder fsynced, the manifest with each file's sha256 last, then
renamed. Weights and optimizer state are safetensors keyed by parameter name, the rest is JSON: nothing is ever
unpickled. Every process writes the rows that it holds; the manifest says which file has which rows of which tensor,
so that any number of processes reads what any other number wrote.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from llmctl.distributed.sharding import Part
from llmctl.errors import ArtifactError, LlmctlError, NotFoundError, OutputError
from llmctl.files import sync, write_json, writing
from llmctl.formats.safetensors import read_tensors, write_safetensors

MANIFEST = "manifest.json"
STATE = "state.json"
KINDS = ("model", "optimizer")
Result = TypeVar("Result")


class Team(Protocol):
    """The processes that save together."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def gather(self, obj: Any) -> list[Any]:
        """Return what each of them gave."""


class Alone:
    """A team of one."""

    rank, world_size = 0, 1

    def gather(self, obj: Any) -> list[Any]:
        """Return the one thing that was given."""
        return [obj]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the loop's own numbers at once, tensors when they are asked for."""

    path: Path
    state: dict[str, Any]
    index: dict[str, dict[str, Any]]

    def names(self, kind: str) -> list[str]:
        """Return the names of the model's or the optimizer's tensors."""
        return list(self.index[kind])

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self.index[kind][name]["shape"])

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows [start, stop) of a tensor, put together from the files that hold them.

        Raises: ArtifactError if some are nowhere.
        """
        shape, parts = self.shape(kind, name), self.index[kind][name]["parts"]
        if not shape:
            return read_tensors(self.path / parts[0][0], [name])[name].clone()
        stop = shape[0] if stop is None else stop
        pieces: list[Tensor] = []
        for file, first, n_rows in sorted(parts, key=lambda part: part[1]):
            low, high = max(start, first), min(stop, first + n_rows)
            if low < high or (start == stop and not pieces):
                rows = read_tensors(self.path / file, [name])[name]
                pieces.append(rows[max(low - first, 0) : max(high - first, 0)])
        joined = torch.cat(pieces) if pieces else torch.empty(0)
        if joined.shape != (stop - start, *shape[1:]):
            raise ArtifactError(f"checkpoint `{self.path}` lacks rows of `{name}`", "resume from an older one")
        return joined

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Return all whole tensors of the model or the optimizer."""
        return {name: self.read(kind, name) for name in self.names(kind)}


@dataclass
class Store:
    """The checkpoints of a run; `verified` are those known to be valid, so that they are not read again to be sure."""

    folder: Path
    team: Team = field(default_factory=Alone)
    verified: set[str] = field(default_factory=set)

    def save(
        self, step: int, model: Mapping[str, Part], optimizer: Mapping[str, Part], state: Mapping[str, Any]
    ) -> Path:
        """Publish the checkpoint of a step and return its folder; every process gives the parts that it holds.

        A valid checkpoint of the same step stays: a resumed run that saves it again holds the same.
        Raises: OutputError, in every process, if the disk is full or read-only; what was there before stays.
        """
        final = self.folder / name_of(step)
        temporary = self.folder / f".{final.name}.tmp"
        rank, team = self.team.rank, self.team
        self._together(final, lambda: self._begin(temporary) if rank == 0 else None)
        try:
            suffix = "" if team.world_size == 1 else f"-{rank + 1:05d}-of-{team.world_size:05d}"
            parts = dict(zip(KINDS, (model, optimizer), strict=True))
            reports = self._together(final, lambda: write_parts(temporary, suffix, parts))
            self._together(final, lambda: publish(temporary, final, step, reports, state) if rank == 0 else None)
        finally:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        self.verified.add(final.name)
        return final

    def _begin(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if temporary.exists():  # of a process that was killed; the run's lock is ours
            shutil.rmtree(temporary)
        temporary.mkdir()

    def _together(self, path: Path, action: Callable[[], Result]) -> list[Result]:
        """Do something in every process and wait for all; the first one's error is everybody's."""
        result, problem = None, None
        try:
            with writing(path):
                result = action()
        except LlmctlError as error:
            problem = [str(error), error.hint]
        reports = self.team.gather([result, problem])
        problems = [report[1] for report in reports if report[1] is not None]
        if problems:
            raise OutputError(*problems[0])
        return [report[0] for report in reports]

    def published(self) -> list[Path]:
        """Return the checkpoint folders, newest first, valid or not."""
        return published(self.folder)

    def is_valid(self, path: Path) -> bool:
        """Tell whether a checkpoint is whole, reading it unless that is known."""
        if path.name not in self.verified:
            if defect(path):
                return False
            self.verified.add(path.name)
        return True

    def load_newest(self) -> tuple[Checkpoint, list[str]]:
        """Open the newest valid checkpoint, and say in one line each which newer ones were skipped and why.

        Raises: NotFoundError if there is none at all, ArtifactError if all are damaged.
        """
        skipped: list[str] = []
        for path in self.published():
            problem = defect(path)
            if not problem:
                self.verified.add(path.name)
                return open_checkpoint(path), skipped
            skipped.append(f"skipped checkpoint {path.name}: {problem}")
        if skipped:
            raise ArtifactError(
                f"`{self.folder}` has no valid checkpoint: {'; '.join(skipped)}", "start the run again without --resume"
            )
        raise NotFoundError(f"`{self.folder}` has no checkpoint yet", "start the run again without --resume")

    def rotate(self, keep: int, protected: Path | None) -> None:
        """Delete all but the newest `keep` valid checkpoints; `protected` (the best one) always stays; 0 keeps all.

        Damaged ones do not count, and go when as many newer valid ones are there. What cannot be deleted stays: the
        checkpoint that has just been saved is none the worse for it.
        """
        paths: list[Path] = []
        if self.team.rank == 0 and keep:
            with suppress(OSError):
                paths = self.published()
        n_valid = 0
        for path in paths:
            is_old = n_valid >= keep
            n_valid += self.is_valid(path)
            if is_old and path != protected:
                trash = path.with_name(f".{path.name}.trash")
                with suppress(OSError):
                    shutil.rmtree(trash, ignore_errors=True)
                    path.rename(trash)
                    shutil.rmtree(trash)

    def sweep(self) -> None:
        """Remove what killed processes left half-written or half-deleted; only the holder of the run's lock may."""
        for pattern in (".step-*.tmp", ".step-*.trash"):
            for path in self.folder.glob(pattern) if self.folder.is_dir() else ():
                shutil.rmtree(path, ignore_errors=True)


def name_of(step: int) -> str:
    """Return the name of a step's folder; names sort like numbers up to 10^8 steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a folder, -1 for a foreign name."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def published(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first, valid or not."""
    found = [path for path in folder.glob("step-*") if step_of(path) >= 0] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def write_parts(folder: Path, suffix: str, parts: Mapping[str, Mapping[str, Part]]) -> dict[str, Any]:
    """Write a process's tensors; return the files' digests and where which rows are."""
    report: dict[str, Any] = {"sha256": {}, "index": {kind: {} for kind in KINDS}}
    for kind, named in parts.items():
        if not named:
            continue
        file = f"{kind}{suffix}.safetensors"
        write_safetensors(folder / file, {name: part.tensor for name, part in named.items()}, {"format": "pt"})
        report["sha256"][file] = file_sha256(folder / file)
        for name, part in named.items():
            n_rows = part.tensor.shape[0] if part.shape else 1
            report["index"][kind][name] = [list(part.shape), [file, part.start, n_rows]]
    return report


def publish(temporary: Path, final: Path, step: int, reports: list[Any], state: Mapping[str, Any]) -> None:
    """Write the numbers and, last, the manifest; then give the folder its name."""
    index: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    digests: dict[str, str] = {}
    for report in reports:
        digests |= report["sha256"]
        for kind in KINDS:
            for name, (shape, part) in report["index"][kind].items():
                index[kind].setdefault(name, {"shape": shape, "parts": []})["parts"].append(part)
    write_json(temporary / STATE, {**state, "index": index})
    digests[STATE] = file_sha256(temporary / STATE)
    write_json(temporary / MANIFEST, {"format": 2, "step": step, "sha256": digests})
    if final.exists():
        if not defect(final):
            return
        shutil.rmtree(final)
    sync(temporary)
    temporary.rename(final)
    sync(final.parent)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def defect(path: Path) -> str:
    """Return what is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digests = dict(manifest["sha256"])
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if step != step_of(path):
        return f"its {MANIFEST} is of step {step}"
    if STATE not in digests:
        return f"its {MANIFEST} does not name `{STATE}`"
    for name, digest in digests.items():
        try:
            if Path(name).name != name or not (path / name).is_file():
                return f"`{name}` is missing"
            if file_sha256(path / name) != digest:
                return f"`{name}` does not match its sha256"
        except OSError as error:  # a bad sector makes this one bad, not those beside it
            return f"`{name}` cannot be read ({error.strerror})"
    return ""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint that was found valid.

    Raises: ArtifactError if its numbers cannot be read.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, state, state.pop("index"))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"checkpoint `{path}` is damaged: `{STATE}` ({error})", "delete its folder") from error


def load(path: Path) -> Checkpoint:
    """Check and open one checkpoint.

    Raises: ArtifactError if it is damaged.
    """
    problem = defect(path)
    if problem:
        raise ArtifactError(f"checkpoint `{path}` is damaged: {problem}", "resume without it, or delete its folder")
    return open_checkpoint(path)
