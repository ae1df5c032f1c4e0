"""Removing runs: all checked before one goes, nothing half removed, and `latest` never dangling."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.errors import BusyError, NotFoundError, UsageError
from llmctl.runs.checkpoint import published
from llmctl.runs.folder import open_run
from llmctl.runs.history import list_runs
from llmctl.runs.removal import choose, remove

FIRST, SECOND, KILLED = "0001-pretrain-clm-tiny", "0002-pretrain-mlm-tiny", "0003-pretrain-clm-tiny"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def take(*runs: str, checkpoints: bool = False) -> list[str]:
    return [str(removal.path) for removal in remove(choose(runs, checkpoints=checkpoints)) if not removal.kept]


def test_runs_go_and_latest_follows_the_newest_that_is_left(runs):
    assert (runs / "latest").resolve().name == SECOND
    assert take("2", "0003") == [f"runs/{SECOND}", f"runs/{KILLED}"]
    assert names(runs) == {FIRST, "latest", "LATEST"}
    assert (runs / "latest").resolve().name == FIRST
    assert (runs / "LATEST").read_text() == f"{FIRST}\n"
    take("1")
    assert names(runs) == set()


def test_latest_stays_where_another_run_goes(runs):
    take("1")
    assert (runs / "latest").resolve().name == SECOND
    assert (runs / "LATEST").read_text() == f"{SECOND}\n"


def test_the_text_file_alone_is_repaired_too(runs):
    (runs / "latest").unlink()
    take("2")
    assert (runs / "LATEST").read_text() == f"{FIRST}\n"


def test_a_link_means_the_run_it_points_to(runs):
    assert take("runs/latest") == [f"runs/{SECOND}"]
    assert (runs / "latest").resolve().name == FIRST


def test_a_run_named_twice_goes_once(runs):
    assert take("1", f"runs/{FIRST}", FIRST) == [f"runs/{FIRST}"]


def test_a_dot_means_the_folder_one_stands_in(runs, monkeypatch):
    monkeypatch.chdir(runs / FIRST)
    assert take(".") == [str(runs / FIRST)]
    assert FIRST not in names(runs)


def test_checkpoints_go_and_the_model_stays(runs):
    before = names(runs / FIRST)
    assert take("1", checkpoints=True) == [f"runs/{FIRST}/checkpoints"]
    assert names(runs / FIRST) == before - {"checkpoints"}
    (again,) = choose(["1"], checkpoints=True)
    assert again.kept == "it has no checkpoints"


@pytest.mark.parametrize("record", [None, "{", '{"status": "interrupted"}', '{"status": "failed"}'])
def test_an_unfinished_run_keeps_its_checkpoints(runs, record: str | None):
    if record is not None:
        (runs / KILLED / "run.json").write_text(record)
    before = published(runs / KILLED / "checkpoints")
    assert take("3", checkpoints=True) == []
    assert published(runs / KILLED / "checkpoints") == before != []


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_running_run_keeps_all_that_were_named(runs, checkpoints: bool):
    held = open_run(runs / FIRST)
    with pytest.raises(BusyError, match=FIRST):
        choose(["2", "1"], checkpoints=checkpoints)
    held.close()
    chosen = choose(["2", "1"], checkpoints=checkpoints)
    held = open_run(runs / FIRST)  # begun again after the check
    with pytest.raises(BusyError, match=FIRST):
        list(remove(chosen))
    held.close()
    assert {FIRST, SECOND} <= names(runs)
    assert (runs / SECOND / "checkpoints").is_dir()


def test_what_is_no_run_is_refused(runs, tmp_path):
    (tmp_path / "precious").mkdir()
    for name in ("precious", "/", "..", "runs"):
        with pytest.raises(NotFoundError):
            choose([name], checkpoints=False)
    (runs / "run.json").write_text("{}")  # as `pretrain -o runs` leaves it
    with pytest.raises(UsageError, match="contains other runs"):
        choose(["runs"], checkpoints=False)


def test_a_damaged_run_can_be_removed(runs):
    (runs / KILLED / "run.json").write_text("{")
    assert take("3") == [f"runs/{KILLED}"]


def test_a_crash_leaves_no_half_run_and_the_next_removal_tidies_up(runs):
    # The process dies at the moment the first file is to be deleted.
    code = (
        "import os, shutil, sys; shutil.rmtree = lambda *_, **__: os._exit(7)\n"
        "from llmctl.runs.removal import choose, remove; list(remove(choose(['2'], checkpoints=False)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
    assert [run.path.name for run in list_runs()[0]] == [FIRST, KILLED]
    assert list_runs()[1] == []
    assert (runs / "latest").resolve().name == FIRST
    (left,) = [name for name in names(runs) if name.startswith(".")]
    assert (runs / left / "model.safetensors").is_file()
    (runs / ".somebody-elses").mkdir()
    take("3")
    assert {name for name in names(runs) if name.startswith(".")} == {".somebody-elses"}


def test_what_no_run_wrote_stays(runs):
    (runs / FIRST / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"contains `notes\.txt`, which no run wrote"):
        choose(["2", "1"], checkpoints=False)
    assert take("1", checkpoints=True) == [f"runs/{FIRST}/checkpoints"]
    assert (runs / FIRST / "notes.txt").read_text() == "mine"
    (runs / FIRST / "notes.txt").unlink()
    (runs / FIRST / ".model.safetensors.12345678.tmp").write_bytes(b"")
    assert take("1") == [f"runs/{FIRST}"]
