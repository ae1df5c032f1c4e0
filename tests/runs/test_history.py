"""What is read from run folders: states that can be trusted, figures that agree with the files, and damage that is said."""

import json
import shutil
from pathlib import Path

import pytest

from llmctl.errors import NotFoundError, UsageError
from llmctl.recipe import read_recipe
from llmctl.runs.checkpoint import published
from llmctl.runs.folder import find_run, is_held, open_run, read_record
from llmctl.runs.history import History, compare, disk_bytes, find, in_full, list_runs, spread
from llmctl.runs.metrics_file import MetricsFile

FIRST, SECOND, KILLED = "0001-pretrain-clm-tiny", "0002-pretrain-mlm-tiny", "0003-pretrain-clm-tiny"


def append(run: Path, *lines: object) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_row_agrees_with_what_the_run_wrote(runs):
    record = read_record(runs / FIRST)
    row = History(runs / FIRST).row()
    assert row["n_parameters"] == record["summary"]["n_parameters"]
    assert (row["step"], row["total_steps"]) == (12, 12)
    assert row["bits_per_byte"] == record["summary"]["after"]["bits_per_byte"]
    assert row["begun"] == record["created"]
    assert row["seconds"] >= record["seconds"]
    assert row["size_bytes"] == sum(path.stat().st_size for path in (runs / FIRST).rglob("*") if path.is_file())
    assert row["problem"] is None


def test_a_killed_run_is_stopped_and_its_size_comes_from_its_checkpoint(runs):
    killed, finished = History(runs / KILLED), History(runs / FIRST)
    assert read_record(runs / KILLED)["status"] == "running"
    assert killed.status == "stopped"
    assert killed.n_parameters == finished.n_parameters
    assert killed.total_steps == 100_000
    assert killed.step is not None
    assert killed.step >= 5
    # only the evaluation before training exists
    assert killed.final["loss"] == MetricsFile(runs / KILLED / "metrics.jsonl").read()[0]["loss"]


def test_running_means_that_the_lock_is_held(runs):
    held = open_run(runs / KILLED)
    assert History(runs / KILLED).status == "running"
    assert History(runs / KILLED).resume_command([]) is None
    held.close()
    assert History(runs / KILLED).status == "stopped"
    assert not is_held(runs / "nowhere")


def test_asking_who_holds_a_lock_keeps_nobody_from_it(runs):
    assert not is_held(runs / FIRST)
    open_run(runs / FIRST).close()


def test_runs_are_listed_by_number_and_named_folders_come_first(runs):
    shutil.copytree(runs / FIRST, runs / "zebra")
    shutil.copytree(runs / FIRST, runs / "12345-pretrain-x")
    (runs / "notes").mkdir()
    (runs / "notes.txt").write_text("mine")
    (runs / ".hidden").mkdir()
    found, others = list_runs()
    assert [run.number for run in found] == ["zebra", "0001", "0002", "0003", "12345"]
    assert others == ["notes", "notes.txt"]


def test_no_runs_folder_is_an_empty_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list_runs() == ([], [])
    with pytest.raises(NotFoundError, match="no run in `runs`"):
        find("latest")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("latest", KILLED),
        ("0002", SECOND),
        ("2", SECOND),
        ("0001-pre", FIRST),
        (FIRST, FIRST),
        (f"runs/{FIRST}", FIRST),
        ("runs/0001", FIRST),
    ],
)
def test_names_mean_runs(runs, name: str, folder: str):
    assert find(name).path.resolve() == (runs / folder).resolve()
    if name != "latest":
        assert find_run(name).resolve() == (runs / folder).resolve(), "the same for --resume"


def test_latest_is_the_newest_run_here_and_the_newest_unfinished_for_resume(runs):
    assert find_run("latest").name == KILLED
    shutil.copytree(runs / FIRST, runs / "0004-pretrain-clm-tiny")
    assert find("latest").path.name == "0004-pretrain-clm-tiny"
    assert find_run("latest").name == KILLED


@pytest.mark.parametrize(
    ("name", "error", "part"),
    [
        ("0009", NotFoundError, "0009"),
        ("/nowhere/at/all", NotFoundError, "nowhere"),
        ("[", NotFoundError, r"`\[`"),
        ("foreign", NotFoundError, "contains no `run.json`"),
        ("00", UsageError, "more than one run"),
        ("", UsageError, "empty"),
    ],
)
def test_names_that_mean_none_or_several_are_refused(runs, name: str, error: type[Exception], part: str):
    (runs / "foreign").mkdir()
    with pytest.raises(error, match=part):
        find(name)


def test_a_run_in_full_agrees_with_its_files(runs):
    record = in_full(find("1"))
    lines = MetricsFile(runs / FIRST / "metrics.jsonl").read()
    assert record["evaluations"] == [line for line in lines if line["kind"] == "eval"]
    assert record["losses"] == [line["loss"] for line in lines if line["kind"] == "train"]
    assert record["environment"] == read_record(runs / FIRST)["environment"]
    assert record["events"] == []
    assert record["missing"] == []
    assert record["resume"] is None
    assert record["recipe"]["train.steps"] == 12
    assert record["recipe"]["model.d_model"] == 32
    assert "objective" not in record["recipe"], "clm is the default"
    assert "optim.lr" not in record["recipe"]
    assert in_full(find("2"))["recipe"]["objective"] == "mlm"


def test_a_models_own_field_is_shown_even_if_it_equals_the_field_of_another_preset(runs):
    path = runs / FIRST / "recipe.yaml"
    path.write_text("model: {preset: auto, d_model: 256}\nfuture: {key: 1}\n")
    # 256 is the field's default, but not what the preset would have taken; a key of a later version is not hidden
    assert History(runs / FIRST).changed() == {"model.d_model": 256, "future.key": 1}


def test_checkpoints_are_told_sound_from_damaged_and_decide_whether_a_run_can_go_on(runs):
    saved = published(runs / KILLED / "checkpoints")
    for older in saved[2:]:  # it may have been killed before it tidied up
        shutil.rmtree(older)
    record = in_full(find("latest"))
    assert [entry["defect"] for entry in record["checkpoints"]] == [None, None]
    assert record["resume"] == f"llmctl pretrain --resume runs/{KILLED}"
    (saved[0] / "model.safetensors").write_bytes(b"")
    record = in_full(find("latest"))
    assert "does not match" in record["checkpoints"][0]["defect"]
    assert record["checkpoints"][1]["defect"] is None
    assert record["n_parameters"] is None
    assert record["resume"]
    (saved[1] / "manifest.json").unlink()
    assert in_full(find("latest"))["resume"] is None


def test_events_and_unknown_kinds_are_read(runs):
    event = {"kind": "event", "step": 7, "what": "skipped"}
    append(runs / FIRST, event, {"kind": "later"}, {"nothing": None}, [1], 2, "three")
    with (runs / FIRST / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "event", "text": "\xe7\x8c')  # cut within a character
    record = in_full(find("1"))
    assert record["events"] == [event]
    assert record["step"] == 12
    assert len(record["evaluations"]) == 4


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff", "[" * 100_000, '{"a": ' * 500 + "1" + "}" * 500, None])
def test_a_damaged_record_is_said(runs, content: str | None):
    path = runs / FIRST / "run.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    run = History(runs / FIRST)
    assert run.status == "damaged"
    assert "run.json" in run.problem
    assert (run.step, run.total_steps) == (12, 12), "what the other files tell is told"
    assert run.row()["bits_per_byte"] is not None
    assert in_full(run)["resume"] is None


@pytest.mark.parametrize(
    "value", [None, 3, "text", [1], {"after": [2]}, {"n_parameters": "x", "steps": None}, {"steps": 10**400}]
)
def test_values_of_other_types_are_passed_over(runs, value: object):
    record = read_record(runs / FIRST) | {"summary": value, "environment": value, "seconds": value, "objective": 5}
    (runs / FIRST / "run.json").write_text(json.dumps(record | {"created": 1, "invocation": {}}))
    row = in_full(find("1"))
    assert row["objective"] is row["begun"] is row["command"] is None
    assert row["step"] == 12
    compare(find("1"), find("2"))


def test_a_run_without_metrics_recipe_and_checkpoints_is_read(runs):
    for name in ("metrics.jsonl", "recipe.yaml"):
        (runs / KILLED / name).unlink()
    shutil.rmtree(runs / KILLED / "checkpoints")
    record = in_full(find("latest"))
    assert record["missing"] == ["recipe.yaml", "metrics.jsonl"]
    for name in ("n_parameters", "step", "total_steps", "bits_per_byte", "seconds", "resume"):
        assert record[name] is None
    assert record["recipe"] == {}


def test_a_budget_of_minutes_has_no_total_before_it_is_divided(runs):
    state = published(runs / KILLED / "checkpoints")[0] / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"total_steps": 10**9}))
    (runs / KILLED / "recipe.yaml").write_text("train: {minutes: 1}\n")
    assert History(runs / KILLED).total_steps is None


def test_a_comparison_has_both_values_and_b_minus_a(runs):
    record = compare(find("1"), find("2"))
    assert record["recipe"] == {"objective": ["clm", "mlm"], "optim.lr": [0.003, 0.01], "train.steps": [12, 18]}
    assert record["environment"] == {}
    assert record["held_out_differs"] == ["objective"]
    steps = record["figures"]["steps"]
    assert (steps["a"], steps["b"], steps["difference"]) == (12, 18, 6)
    there, back = record["figures"]["loss"], compare(find("2"), find("1"))["figures"]["loss"]
    assert there["difference"] == -back["difference"] != 0
    same = compare(find("1"), find("1"))
    assert same["recipe"] == {}
    assert same["held_out_differs"] == []


def test_a_comparison_says_what_was_not_recorded(runs):
    (runs / SECOND / "recipe.yaml").unlink()
    record = compare(find("2"), find("3"))
    assert record["recipe"] is None
    assert record["environment"] is None, "the killed run did not come to record it"
    assert record["figures"]["steps"]["difference"] == History(runs / KILLED).step - 18


def test_a_key_that_one_recipe_leaves_out_has_its_default(runs):
    values = read_recipe(str(runs / FIRST / "recipe.yaml"))
    del values["optim"], values["model"]["d_model"]
    shutil.copytree(runs / FIRST, runs / "0004-x")
    (runs / "0004-x" / "recipe.yaml").write_text(json.dumps(values))
    assert compare(find("1"), find("4"))["recipe"] == {"model.d_model": [32, None]}


def test_a_long_course_is_averaged_and_a_short_one_left():
    assert spread([1.0, 2.0], 5) == [1.0, 2.0]
    values = [float(value) for value in range(100)]
    parts = spread(values, 7)
    assert len(parts) == 7
    assert parts == sorted(parts)
    assert spread(values, 10) == [4.5 + 10 * index for index in range(10)]


def test_disk_use_counts_files_not_what_links_point_to(runs, tmp_path):
    before = disk_bytes(runs / FIRST)
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    (runs / FIRST / "link").symlink_to(tmp_path / "large")
    assert disk_bytes(runs / FIRST) < before + 10_000
    assert disk_bytes(runs / "nowhere") == 0
