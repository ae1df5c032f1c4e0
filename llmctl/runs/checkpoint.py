"""Checkpoints, published atomically: a folder is complete or absent, and a resume uses the newest valid one.

Files are written to a temporary folder and fsynced, the manifest with every file's sha256 last; then the folder is
renamed. Weights and optimizer state are safetensors keyed by parameter name, everything else is JSON: nothing is
unpickled. Each rank writes the rows it owns; the index in `state.json` maps each tensor's rows to files, so a
checkpoint can be resumed with a different number of ranks.
"""

import re
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
from llmctl.files import file_sha256, parse_json, sync, write_json, writing
from llmctl.formats.safetensors import read_tensors, write_safetensors

MANIFEST = "manifest.json"
STATE = "state.json"
KINDS = ("model", "optimizer")
FILE = re.compile(r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors")
Result = TypeVar("Result")


class Team(Protocol):
    """The ranks that write one checkpoint together."""

    @property
    def rank(self) -> int:
        """This process's rank."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def gather(self, obj: Any) -> list[Any]:
        """Return every rank's object, in rank order, on every rank."""


class Alone:
    """A single process as a `Team`."""

    rank, world_size = 0, 1

    def gather(self, obj: Any) -> list[Any]:
        """Return a list of the one object."""
        return [obj]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the training state is loaded, tensors are read on demand."""

    path: Path
    state: dict[str, Any]
    index: dict[str, dict[str, Any]]

    def names(self, kind: str) -> list[str]:
        """Return the tensor names of `model` or `optimizer`."""
        return list(self.index[kind])

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Return a tensor's full, unsharded shape."""
        return tuple(self.index[kind][name]["shape"])

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows [start, stop) of a tensor, concatenated from the files that contain them.

        Raises: ArtifactError if rows are missing.
        """
        shape, parts = self.shape(kind, name), self.index[kind][name]["parts"]
        if not shape:
            scalar = read_tensors(self.path / parts[0][0], [name])[name]
            if scalar.ndim:
                raise self._lacking(name)
            return scalar.clone()
        stop = shape[0] if stop is None else stop
        pieces: list[Tensor] = []
        for file, first, n_rows in sorted(parts, key=lambda part: part[1]):
            low, high = max(start, first), min(stop, first + n_rows)
            # An empty range still reads one file: the result needs that tensor's dtype and trailing dimensions.
            if low < high or (start == stop and not pieces):
                rows = read_tensors(self.path / file, [name])[name]
                if rows.shape != (n_rows, *shape[1:]):
                    raise self._lacking(name)
                pieces.append(rows[max(low - first, 0) : max(high - first, 0)])
        joined = torch.cat(pieces) if pieces else torch.empty(0)
        if joined.shape != (stop - start, *shape[1:]):
            raise self._lacking(name)
        return joined

    def _lacking(self, name: str) -> ArtifactError:
        return ArtifactError(
            f"checkpoint `{self.path}` lacks rows of `{name}`", "delete its folder to resume from an older one"
        )

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Return all tensors of `model` or `optimizer`, unsharded."""
        return {name: self.read(kind, name) for name in self.names(kind)}


@dataclass
class Store:
    """The checkpoints of a run; `verified` names those whose digests were already checked, to avoid rereading them."""

    folder: Path
    team: Team = field(default_factory=Alone)
    verified: set[str] = field(default_factory=set)

    def save(
        self, step: int, model: Mapping[str, Part], optimizer: Mapping[str, Part], state: Mapping[str, Any]
    ) -> Path:
        """Publish the checkpoint of a step and return its folder; each rank passes the rows it owns.

        An existing valid checkpoint of the same step is kept: a resumed run would write the same content.
        Raises: OutputError, on every rank, if the disk is full or read-only; existing checkpoints are kept.
        """
        final = self.folder / name_of(step)
        temporary = self.folder / f".{final.name}.tmp"
        rank, team = self.team.rank, self.team
        self._together(final, lambda: self._begin(temporary) if rank == 0 else None)
        try:
            # Each stage ends with a gather: the manifest must not be written before all ranks have their files.
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
        if temporary.exists():  # left by a killed process: we hold the run's lock, so no live one uses it
            shutil.rmtree(temporary)
        temporary.mkdir()

    def _together(self, path: Path, action: Callable[[], Result]) -> list[Result]:
        """Run an action on every rank and wait for all; if any fails, all raise the first error.

        If only the failing rank raised, the others would wait for it in their next collective.
        """
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
        """Tell whether a checkpoint is complete and undamaged; the digests are computed once per process."""
        if path.name not in self.verified:
            if defect(path):
                return False
            self.verified.add(path.name)
        return True

    def load_newest(self) -> tuple[Checkpoint, list[str]]:
        """Open the newest valid checkpoint; also return one line for each newer one that was skipped, with the reason.

        Raises: NotFoundError if there is no checkpoint, ArtifactError if all are damaged.
        """
        skipped: list[str] = []
        for path in self.published():
            problem = defect(path)
            if not problem:
                try:
                    opened = open_checkpoint(path)
                except ArtifactError as error:  # whole, but not of the shape that it should have
                    problem = str(error)
                else:
                    self.verified.add(path.name)
                    return opened, skipped
            skipped.append(f"skipped checkpoint {path.name}: {problem}")
        if skipped:
            raise ArtifactError(
                f"`{self.folder}` contains no valid checkpoint: {'; '.join(skipped)}",
                "start a new run without --resume",
            )
        raise NotFoundError(f"`{self.folder}` contains no checkpoint yet", "start a new run without --resume")

    def rotate(self, keep: int, *protected: Path) -> None:
        """Delete all but the newest `keep` valid checkpoints and `protected` ones (the best, the start); 0 keeps all.

        A damaged checkpoint does not count toward `keep`; it is deleted once `keep` newer valid ones exist. A failed
        deletion is ignored, because the new checkpoint has already been saved.
        """
        paths: list[Path] = []
        if self.team.rank == 0 and keep:
            with suppress(OSError):
                paths = self.published()
        n_valid = 0
        for path in paths:
            is_old = n_valid >= keep
            n_valid += self.is_valid(path)
            if is_old and path not in protected:
                # Rename first: a crash during deletion must not leave a partial folder under a checkpoint's name.
                trash = path.with_name(f".{path.name}.trash")
                with suppress(OSError):
                    shutil.rmtree(trash, ignore_errors=True)
                    path.rename(trash)
                    shutil.rmtree(trash)

    def sweep(self) -> None:
        """Remove partially written or deleted checkpoints of killed processes; the caller must hold the run's lock."""
        for pattern in (".step-*.tmp", ".step-*.trash"):
            for path in self.folder.glob(pattern) if self.folder.is_dir() else ():
                shutil.rmtree(path, ignore_errors=True)


def name_of(step: int) -> str:
    """Return the folder name of a step; names sort numerically below 10^8 steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a folder's name, -1 for any other name."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def published(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first, valid or not."""
    paths = [path for path in folder.glob("step-*") if step_of(path) >= 0] if folder.is_dir() else []
    return sorted(paths, key=step_of, reverse=True)


def write_parts(folder: Path, suffix: str, parts: Mapping[str, Mapping[str, Part]]) -> dict[str, Any]:
    """Write one rank's tensors; return each file's digest and each tensor's (shape, [file, first row, rows])."""
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
    """Write the training state and, last, the manifest; then rename the folder to its final name."""
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
    if final.exists():  # an earlier save of this step; rename cannot replace a non-empty folder
        if not defect(final):
            return
        shutil.rmtree(final)
    sync(temporary)
    temporary.rename(final)
    sync(final.parent)


def defect(path: Path) -> str:
    """Return what is wrong with a checkpoint, or an empty string."""
    try:
        manifest = parse_json((path / MANIFEST).read_text(encoding="utf-8"))
        digests = dict(manifest["sha256"])
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if step != step_of(path):
        return f"its {MANIFEST} is of step {step}"
    if STATE not in digests:
        return f"its {MANIFEST} does not name `{STATE}`"
    for name, digest in digests.items():
        try:
            # A manifest is not trusted: names must not point outside the folder.
            if name != STATE and not FILE.fullmatch(name):
                return f"its {MANIFEST} names `{name[:80]}`, which is no file of a checkpoint"
            if not (path / name).is_file():
                return f"`{name}` is missing"
            if file_sha256(path / name) != digest:
                return f"`{name}` does not match its sha256"
        except OSError as error:  # a bad sector invalidates this checkpoint only: the search goes on to older ones
            return f"`{name}` cannot be read ({error.strerror})"
    return ""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint whose digests have been checked.

    Raises: ArtifactError if its state file cannot be read.
    """
    try:
        state = parse_json((path / STATE).read_text(encoding="utf-8"))
        index = state.pop("index")
        check_index(index)
        return Checkpoint(path, state, index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"checkpoint `{path}` is damaged: `{STATE}` ({error})", "delete its folder to resume from an older one"
        ) from error


def check_index(index: Any) -> None:
    """Check that an index maps tensors to their shapes, and to parts of files in the same folder.

    Raises: TypeError, ValueError.
    """
    for kind in KINDS:
        named = index.get(kind) if isinstance(index, dict) else None
        if not isinstance(named, dict):
            raise TypeError(f"its index has no `{kind}`")
        for name, entry in named.items():
            shape, parts = (entry.get("shape"), entry.get("parts")) if isinstance(entry, dict) else (None, None)
            if not is_counts(shape) or not isinstance(parts, list) or not parts or not all(map(is_part, parts)):
                raise ValueError(f"the index of `{name[:80]}` is not a shape with parts")


def is_counts(value: Any) -> bool:
    """Tell whether this is a list of non-negative integers."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def is_part(part: Any) -> bool:
    """Tell whether this is [file, first row, rows], with a file of the checkpoint's own folder."""
    return (
        isinstance(part, list)
        and len(part) == 3
        and isinstance(part[0], str)
        and FILE.fullmatch(part[0]) is not None
        and is_counts(part[1:])
    )


def load(path: Path) -> Checkpoint:
    """Verify a checkpoint's digests and open it.

    Raises: ArtifactError if it is damaged.
    """
    problem = defect(path)
    if problem:
        raise ArtifactError(
            f"checkpoint `{path}` is damaged: {problem}", "delete its folder to resume from an older one"
        )
    return open_checkpoint(path)
