"""Checkpoints: a folder appears complete or not at all, and the newest valid one wins.

Written under a temporary name, every file fsynced, the manifest with each file's sha256 last, then renamed. Weights
and optimizer state are safetensors keyed by parameter name, the rest is JSON: nothing is ever unpickled.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmctl.errors import ArtifactError, NotFoundError
from llmctl.files import atomic_path, write_json
from llmctl.formats.safetensors import read_tensors, write_safetensors

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: weights and optimizer tensors by name, and the loop's own numbers."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Publish the checkpoint of a step and return its folder.

    Raises: OutputError if the disk is full or read-only; what was there before stays as it was.
    """
    final = folder / f"step-{step:08d}"
    with atomic_path(final) as temporary:
        temporary.mkdir()
        write_safetensors(temporary / "model.safetensors", model, {"format": "pt"})
        write_safetensors(temporary / "optimizer.safetensors", optimizer, {"format": "pt"})
        write_json(temporary / "state.json", dict(state))
        names = ("model.safetensors", "optimizer.safetensors", "state.json")
        write_json(temporary / MANIFEST, {"step": step, "sha256": {n: file_sha256(temporary / n) for n in names}})
        if final.exists():  # a resumed run passes this step again; what it holds is the same
            shutil.rmtree(final)
    return final


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def published(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, valid or not."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def defect(path: Path) -> str:
    """Return what is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digests = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"`{name}` is missing"
        if file_sha256(path / name) != digest:
            return f"`{name}` does not match its sha256"
    return ""


def load(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises: ArtifactError if it is damaged.
    """
    problem = defect(path)
    if problem:
        raise ArtifactError(f"checkpoint `{path}` is damaged: {problem}", "resume without it, or delete its folder")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(
        path, read_tensors(path / "model.safetensors"), read_tensors(path / "optimizer.safetensors"), state
    )


def load_newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Read the newest valid checkpoint, and say in one line each which newer ones were skipped and why.

    Raises: NotFoundError if there is none.
    """
    skipped: list[str] = []
    for path in published(folder):
        problem = defect(path)
        if not problem:
            return load(path), skipped
        skipped.append(f"skipped checkpoint {path.name}: {problem}")
    details = "; ".join(skipped) or "no checkpoint was published yet"
    raise NotFoundError(f"`{folder}` has no valid checkpoint: {details}", "start the run again without --resume")


def rotate(folder: Path, keep: int, protected: Path | None) -> None:
    """Delete all but the newest `keep` valid checkpoints; `protected` (the best one) always stays."""
    valid = [path for path in published(folder) if (path / MANIFEST).is_file()]
    for path in valid[max(keep, 1) :]:
        if path != protected:
            shutil.rmtree(path, ignore_errors=True)
