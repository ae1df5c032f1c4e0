"""`llmctl finetune` in a shell: a path or a record on stdout, the data's report, and mistakes that name their place."""

import json
from pathlib import Path

import pytest

from llmctl.cli import run
from tests.support.tuning import SMALL

FLAGS = [part for setting in (*SMALL, "train.steps=2") for part in ("--set", setting)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.tsv").write_text(
        "".join(f"cat {i}\t{w}\n" for i in range(20) for w in ("good", "bad")), encoding="utf-8"
    )
    return tmp_path


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    status = run(["finetune", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_path_alone_is_on_stdout_and_the_run_is_listed(capsys, models):
    command = (models["encoder"], "rows.tsv", "--task", "classify", "--columns", "text,label", *FLAGS)
    status, out, err = call(capsys, *command, "--method", "lora", "--rank", 4, "--show-example")
    assert (status, out) == (0, "runs/0001-finetune-classify-encoder\n")
    for part in ("38 training examples, 2 held out", "labels: ", "given    ", "label    good", "lora of rank 4 on"):
        assert part in err
    assert run(["runs"]) == 0
    assert "classify" in capsys.readouterr().out
    assert run(["classify", "-q", "-m", "1", "cat 3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert run(["evaluate", "1", "-d", "rows.tsv", "--set", "columns.names=text,label", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "accuracy"


def test_a_single_file_carries_head_and_labels(capsys, models):
    command = (models["bert"], "rows.tsv", "--task", "classify", "--columns", "text,label", *FLAGS)
    status, out, _ = call(capsys, *command, "-o", "one.safetensors", "-q", "--json")
    assert status == 0
    assert json.loads(out)["model"] == "one.safetensors"
    assert run(["classify", "-q", "-m", "one.safetensors", "cat"]) == 0
    assert {line.split("\t")[1] for line in capsys.readouterr().out.splitlines()} == {"good", "bad"}


def test_a_dry_run_examines_and_leaves_nothing(capsys, models, here):
    command = (models["encoder"], "rows.tsv", "--task", "classify", "--columns", "text,label", "--dry-run", *FLAGS)
    status, out, _ = call(capsys, *command, "--show-example")
    assert status == 0
    assert "38 training examples" in out
    assert "label    good" in out
    status, out, _ = call(capsys, *command, "--json")
    assert json.loads(out)["findings"]["rows"] == 40
    # Minutes are not steps until steps have been timed; epochs are.
    budget = [argument for argument in command if argument not in FLAGS]
    status, out, _ = call(capsys, *budget, "--json", "--minutes", "1")
    assert (json.loads(out)["steps"], json.loads(out)["minutes"]) == (None, 1.0)
    status, out, _ = call(capsys, *budget, "--json", "--set", "train.epochs=2", "--set", "train.batch_size=4")
    assert json.loads(out)["steps"] == 38 * 2 // 4
    assert sorted(path.name for path in here.iterdir()) == ["rows.tsv"]


BAD = {
    "no-column.csv": ("a,b\n1,2\n", "classify", "`no-column.csv` line 2 has no column for the text"),
    "role.jsonl": ('{"messages": [{"role": "wizard", "content": "x"}]}\n', "chat", "line 1: message 1 of `messages`"),
    "broken.jsonl": ('{"text": "a", "label": "x"}\n{"text"\n', "classify", "`broken.jsonl` line 2 is not JSON"),
    "empty.jsonl": ("", "classify", "there are no examples in `empty.jsonl`"),
    "silent.jsonl": ('{"messages": [{"role": "user", "content": "x"}]}\n', "chat", "`silent.jsonl` line 1"),
    "label.jsonl": ('{"text": "a", "label": null}\n', "classify", "line 1: column `label` is empty"),
    "none.txt": ("a text\n", "qa", "`none.txt` is plain text without column names"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named_with_its_place_and_leaves_no_run(capsys, models, name):
    text, task, message = BAD[name]
    Path(name).write_text(text, encoding="utf-8")
    status, out, err = call(capsys, models["decoder"], name, "--task", task, "-q", *FLAGS)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert "\nhint: " in err
    assert list(Path("runs").iterdir()) == []


def test_bad_commands_are_answered(capsys, models):
    for arguments, status, message in (
        ((models["decoder"],), 2, "no data"),
        (("nothing", "rows.tsv"), 3, "model `nothing` does not exist"),
        ((models["decoder"], "rows.tsv", "--task", "clasify"), 2, "`--task` is `clasify`"),
        ((models["decoder"], "rows.tsv", "--method", "lora", "-o", "x.safetensors"), 2, "--merge"),
        (
            (models["decoder"], "rows.tsv", "--task", "qa", "--set", "template={nope}"),
            2,
            "contains the unknown field `{nope}`",
        ),
        ((models["decoder"], "gone.jsonl"), 3, "gone.jsonl"),
        ((models["decoder"], "rows.tsv", "--task", "classify", "--rank", "0", "--method", "lora"), 2, "column"),
    ):
        found, out, err = call(capsys, *arguments, "-q")
        assert (found, out) == (status, ""), err
        assert message in err
