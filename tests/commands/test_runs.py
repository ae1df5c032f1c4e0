"""`llmctl runs`: tables that fit, JSON that parses, and removal that asks."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from llmctl.cli import run
from llmctl.runs.folder import open_run

FIRST, SECOND, KILLED = "0001-pretrain-clm-tiny", "0002-pretrain-mlm-tiny", "0003-pretrain-clm-tiny"


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    status = run(["runs", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_the_list_has_one_line_per_run(capsys, runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = call(capsys, "ls")
    assert (status, err) == (0, "")
    header, *rows = out.splitlines()
    assert header.split() == [
        "run",
        "status",
        "objective",
        "parameters",
        "steps",
        "held",
        "out",
        "begun",
        "time",
        "size",
    ]
    assert [row.split()[:3] for row in rows] == [
        [FIRST, "finished", "clm"],
        [SECOND, "finished", "mlm"],
        [KILLED, "stopped", "clm"],
    ]
    assert rows[0].split()[4] == "12/12"
    assert call(capsys) == (status, out, err), "the list is what `llmctl runs` means"


def test_a_run_at_work_is_running(capsys, runs):
    held = open_run(runs / KILLED)
    assert json.loads(call(capsys, "ls", "--json")[1])[2]["status"] == "running"
    held.close()


def test_json_is_one_array(capsys, runs):
    records = json.loads(call(capsys, "ls", "--json")[1])
    assert [record["number"] for record in records] == ["0001", "0002", "0003"]
    assert records == json.loads(call(capsys, "--json")[1])
    status, out, err = call(capsys, "--json", "ls")
    assert (status, out) == (2, "")
    assert "llmctl runs ls ... --json" in err


@pytest.mark.parametrize("columns", [200, 100, 80, 60, 40, 30, 20, 4])
def test_the_list_fits_and_breaks_no_word(capsys, runs, monkeypatch, columns: int):
    words = set(call(capsys, "ls")[1].split()) | {"#", "0001", "0002", "0003"}
    monkeypatch.setenv("COLUMNS", str(columns))
    out = call(capsys, "ls")[1]
    assert max(map(len, out.splitlines())) <= columns
    assert set(out.split()) <= words
    assert len(out.splitlines()) == 4
    assert all(number in out for number in ("0001", "0002", "0003"))
    if columns >= 40:
        assert "bits/byte" in out


def test_no_runs_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys)
    assert (status, out) == (0, "")
    assert "llmctl pretrain" in err
    assert call(capsys, "ls", "--json")[1] == "[]\n"
    for command in (["show"], ["show", "latest"], ["rm", "latest", "-y"], ["diff", "1", "2"]):
        assert call(capsys, *command)[:2] == (3, "")


def test_damage_and_foreign_folders_are_said(capsys, runs):
    (runs / FIRST / "run.json").write_text("{")
    shutil.rmtree(runs / SECOND)
    (runs / SECOND).mkdir()
    (runs / "notes").mkdir()
    status, out, err = call(capsys, "ls")
    assert status == 0
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["damaged", "damaged", "stopped"]
    assert f"{FIRST}: its run.json cannot be read" in err
    assert f"{SECOND}: it has no run.json" in err
    assert "not runs: notes" in err
    status, out, _ = call(capsys, "show", "1")
    assert status == 0
    assert "its run.json cannot be read" in out
    for name in (SECOND, "runs/notes"):
        status, out, err = call(capsys, "show", name)
        assert (status, out) == (3, "")
        assert "no `run.json`" in err


def test_show_tells_a_finished_run(capsys, runs):
    status, out, err = call(capsys, "show", "1")
    assert (status, err) == (0, "")
    assert out.startswith(f"runs/{FIRST}\n  status      finished\n")
    for part in ("train.steps           12\n", "torch", "held out", "loss  ", "step-00000012", "valid"):
        assert part in out
    assert "--resume" not in out
    assert out.splitlines()[0] == json.loads(call(capsys, "show", "1", "--json")[1])["run"]


def test_show_tells_how_to_go_on(capsys, runs):
    _, out, _ = call(capsys, "show")
    assert out.splitlines()[-1] == f"resume with: llmctl pretrain --resume runs/{KILLED}"
    assert call(capsys, "show", "latest")[1] == out


def test_show_tells_events_whatever_they_hold_and_shortens_long_courses(capsys, runs):
    with (runs / FIRST / "metrics.jsonl").open("a") as file:
        for step in range(50):
            file.write(
                json.dumps({"kind": "event", "step": step, "seconds": 1.0, "what": "skipped", "loss": None}) + "\n"
            )
    _, out, _ = call(capsys, "show", "1")
    assert "  step 0: what skipped, loss None\n" in out
    assert "  step 49: what skipped, loss None\n" in out
    assert "  step 20: " not in out
    assert "26 more, --json has all" in out
    assert len(json.loads(call(capsys, "show", "1", "--json")[1])["events"]) == 50


def test_show_without_files_says_what_is_missing(capsys, runs):
    for name in ("metrics.jsonl", "recipe.yaml"):
        (runs / FIRST / name).unlink()
    _, out, _ = call(capsys, "show", "1")
    assert "recipe.yaml, metrics.jsonl" in out
    assert "no metrics yet" in out


def test_diff_shows_both_values(capsys, runs):
    status, out, err = call(capsys, "diff", "1", "2")
    assert status == 0
    assert "  train.steps  12 -> 18\n" in out
    assert "environment\n  the same\n" in out
    assert "`objective`" in err
    steps = next(line for line in out.splitlines() if line.startswith("steps"))
    assert steps.split() == ["steps", "12", "18", "6"]
    status, out, err = call(capsys, "diff", "1", "1")
    assert (status, err) == (0, "")
    assert "recipe\n  the same\n" in out
    assert "not recorded for both" in call(capsys, "diff", "1", "latest")[1]
    assert json.loads(call(capsys, "diff", "1", "2", "--json")[1])["recipe"]["train.steps"] == [12, 18]


def test_rm_prints_what_it_removed(capsys, runs):
    status, out, _ = call(capsys, "rm", "1", "0003", "-y")
    assert (status, out) == (0, f"runs/{FIRST}\nruns/{KILLED}\n")
    assert not (runs / FIRST).exists()
    records = json.loads(call(capsys, "rm", "latest", "-y", "--json")[1])
    assert [record["removed"] for record in records] == [f"runs/{SECOND}"]


def test_rm_of_checkpoints_keeps_those_of_unfinished_runs(capsys, runs):
    status, out, err = call(capsys, "rm", "1", "3", "--checkpoints", "-y")
    assert (status, out) == (0, f"runs/{FIRST}/checkpoints\n")
    assert KILLED in err
    assert (runs / KILLED / "checkpoints").is_dir()
    records = json.loads(call(capsys, "rm", "1", "3", "--checkpoints", "--json")[1])
    assert [record["removed"] for record in records] == [None, None], "nothing to remove needs no yes"


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["1"], 2, "-y"),
        (["1", "0009", "-y"], 3, "0009"),
        (["texts", "-y"], 3, "run.json"),
        (["", "-y"], 2, "empty"),
        (["000", "-y"], 2, "more than one run"),
        (["1", KILLED, "-y"], 9, KILLED),
        ([], 2, "RUN"),
    ],
)
def test_rm_refuses(capsys, runs, monkeypatch, tmp_path, arguments: list[str], status: int, part: str):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    (tmp_path / "texts").mkdir()
    held = open_run(runs / KILLED)
    got, out, err = call(capsys, "rm", *arguments)
    held.close()
    assert (got, out) == (status, ""), err
    assert part in err
    assert all((runs / name).is_dir() for name in (FIRST, SECOND, KILLED))


@pytest.mark.parametrize(("answer", "is_left"), [(b"y\n", False), (b"n\n", True), (b"\n", True)])
def test_rm_asks_on_a_terminal(runs, answer: bytes, is_left: bool):
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    command = [sys.executable, "-m", "llmctl", "runs", "rm", "1"]
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=False)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert "remove permanently?" in done.stderr
    assert FIRST in done.stderr
    assert done.stdout == ("" if is_left else f"runs/{FIRST}\n")
    assert (runs / FIRST).is_dir() == is_left


@pytest.mark.parametrize("command", [[], ["ls", "--json"], ["diff", "1", "2"], ["rm", "1", "-y"]])
def test_only_show_loads_torch(runs, command: list[str]):
    code = "import sys; from llmctl.cli import run; status = run(['runs', *sys.argv[1:]]); sys.exit(status or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
