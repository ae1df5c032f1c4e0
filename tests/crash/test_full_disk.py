"""A disk that is really full: training goes on without checkpoints, the end says what is needed, resume continues."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmctl.cli import run
from llmctl.runs.metrics_file import MetricsFile
from tests.crash.kill import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


def size(folder: Path) -> int:
    """Return the bytes of a folder's files on a file system of 4 KiB pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a mounted file system in memory, which `mount -o remount,size=` makes smaller or larger."""
    if os.geteuid():
        pytest.skip("only root may mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, n_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", str(folder)], check=True)


def test_a_run_goes_on_without_checkpoints_and_is_resumed_when_there_is_space(
    tmp_path, small_disk, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("".join(f"the cat {number} sat on the mat.\n" for number in range(200)))
    # All checkpoints are kept, so that the disk fills by itself.
    settings = SETTINGS | {"train.keep_checkpoints": 0}
    command = ["pretrain", "a.txt", *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]

    assert run([*command, "-o", "whole"]) == 0, capsys.readouterr().err
    steps = sorted(path.name for path in Path("whole/checkpoints").iterdir())
    assert len(steps) == 1 + 30 // 2
    n_bytes = size(Path("whole/checkpoints")) // len(steps)

    # Space for the encoded text and some checkpoints; the rest of it is too little for the finished model.
    resize(small_disk, 5 * n_bytes + Path("whole/model.safetensors").stat().st_size // 2)
    folder = small_disk / "run"
    capsys.readouterr()
    status, text = run([*command, "-o", str(folder)]), capsys.readouterr().err
    assert status == 8, text
    assert "was not saved: cannot write" in text
    error = text[text.rindex("error: ") :]
    assert "no space left on device" in error
    assert "hint: free some disk space" in error
    assert "Traceback" not in text
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == steps[: len(saved)]
    assert 2 <= len(saved) < len(steps)
    assert not (folder / "model.safetensors").exists()

    resize(small_disk, 64 * 2**20)
    assert run(["pretrain", "--resume", str(folder)]) == 0, capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert losses(folder) == losses(Path("whole"))
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def losses(folder: Path) -> list[tuple[str, int, float]]:
    lines = MetricsFile(folder / "metrics.jsonl").read()
    return [(line["kind"], line["step"], line["loss"]) for line in lines if line["kind"] != "event"]
