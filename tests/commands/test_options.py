"""A budget given on the command line is the budget of the run: it replaces the recipe's, and nothing is not all."""

import json
import shlex
from pathlib import Path

import pytest

from tests.commands.conftest import Shell


@pytest.mark.parametrize("command", ["pretrain", "finetune", "distill", "quantize"])
@pytest.mark.parametrize("given", [["--steps", "0"], ["--minutes", "0"], ["--set", "train.epochs=0"]])
def test_a_budget_of_nothing_is_refused(shell: Shell, command: str, given: list[str]):
    code, out, err = shell(command, *given, "--print-config")
    assert (code, out) == (2, "")
    assert " is 0: nothing would be trained" in err


def test_a_negative_budget_is_named(shell: Shell):
    for given in (["--steps", "-1"], ["--minutes", "-0.5"], ["--tokens", "-7"]):
        code, _, err = shell("pretrain", *given)
        assert code == 2
        assert f"is {given[1]}, a budget must be positive" in err
    assert shell("evaluate", "--limit", "0")[0] == 2


def test_a_budget_replaces_that_of_the_recipe(shell: Shell, tmp_path):
    (tmp_path / "r.yaml").write_text("train: {steps: 100, minutes: 5}\n")
    code, out, _ = shell("pretrain", "-r", str(tmp_path / "r.yaml"), "--tokens", "5000", "--print-config")
    lines = [line.split("#")[0].strip() for line in out.splitlines()]
    assert code == 0
    assert {"steps: 0", "tokens: 5000", "minutes: 5.0"} <= set(lines)


def test_two_budgets_at_once_are_refused(shell: Shell):
    code, _, err = shell("finetune", "--steps", "10", "--epochs", "3", "--print-config")
    assert code == 2
    assert "`--steps` 10, `--epochs` 3" in err


@pytest.mark.parametrize(
    ("command", "given", "named"),
    [
        ("pretrain", ["--minutes", "-1"], "`--minutes` is -1"),
        ("pretrain", ["--set", "train.minutes=-1"], "`train.minutes` is -1"),
        ("pretrain", ["--batch", "0"], "`--batch` is 0"),
        ("pretrain", ["--batch-size=many"], "`--batch-size` is `many`: "),
        ("pretrain", ["--set", "train.batch_size=many"], "`train.batch_size` is `many` (--set): "),
        ("pretrain", ["--lr", "-1", "--set", "train.seq_len=1"], "`train.seq_len` is 1, it must be at least 2; `--lr`"),
        ("pretrain", ["--objective", "cml"], "`--objective` is `cml`: "),
        ("finetune", ["--method", "lroa"], "`--method` is `lroa`: "),
        ("quantize", ["--group", "-3", "--set", "weights.scheme=int4"], "`--group` is -3"),
        ("evaluate", ["--limit", "-1"], "`--limit`"),
    ],
)
def test_an_error_names_what_was_typed(shell: Shell, models, tmp_path, monkeypatch, command, given, named):
    monkeypatch.chdir(tmp_path)
    model = [] if command == "pretrain" else [models["decoder"]]
    status, _, err = shell(command, *model, *given)
    assert status == 2
    assert named in err


def test_a_value_that_is_called_as_a_key_stays(shell: Shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "model `method` does not exist" in shell("finetune", "-m", "method", "--method", "lora")[2]


def test_an_error_names_the_key_of_the_environment(shell: Shell, monkeypatch):
    monkeypatch.setenv("LLMCTL_TRAIN_STEPS", "-2")
    assert "`train.steps` is -2" in shell("pretrain", "--batch-size", "4")[2]


def test_a_folder_that_no_run_wrote_is_not_cleared_by_force(shell: Shell, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").write_text("mine")
    code, _, err = shell("pretrain", "-o", str(tmp_path), "-f", "--steps", "1")
    assert code == 8
    assert f"`{tmp_path / 'data'}` exists, and no run wrote it" in err
    assert (tmp_path / "data" / "precious.txt").read_text() == "mine"


TINY = ["--set", "model.n_layers=1", "--set", "model.d_model=16", "--set", "model.n_heads=2", "--seq-len", "16", "-q"]


def test_a_failed_run_leaves_no_output_folder(shell: Shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a b c\n" * 200)
    wrong = ["pretrain", "a.txt", "-o", "model", "--set", "model.n_heads=3", "--set", "model.d_model=32"]
    assert shell(*wrong, "--steps", "1")[0] == 2
    assert not Path("model").exists()
    # A run that died at its beginning is taken over by the corrected command; one that has a checkpoint is not.
    Path("model").mkdir()
    for name, content in (("run.json", '{"status": "failed"}'), ("recipe.yaml", ""), (".lock", "")):
        (Path("model") / name).write_text(content)
    (Path("model") / "checkpoints" / "step-00000001").mkdir(parents=True)
    right = ["pretrain", "a.txt", "-o", "model", "--steps", "1", "--set", "tokenizer.vocab_size=300", *TINY]
    assert shell(*right)[0] == 8
    (Path("model") / "checkpoints" / "step-00000001").rmdir()
    status, out, err = shell(*right)
    assert (status, out) == (0, "model\n"), err


def test_the_hint_about_a_finished_run_runs_as_printed(shell: Shell, tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a b.txt").write_text("a b c\n" * 200)
    given = ["a b.txt", "-o", "my model", "--steps", "1", "--set", "tokenizer.vocab_size=300", *TINY]
    assert shell("pretrain", *given)[0] == 0
    assert shell("finetune", models["decoder"], "a b.txt", "--task", "text", "--steps", "1", "-q")[0] == 0
    assert shell("quantize", "my model", "-d", "a b.txt", "--set", "weights.calibration_rows=2", "-q")[0] == 0
    newest = {path.name.split("-")[1]: path for path in sorted(Path("runs").glob("0*"))}
    for command, path in {"pretrain": Path("my model"), **newest}.items():
        status, out, err = shell(command, "--resume", path, "--steps", "5")
        assert (status, out) == (2, ""), "a budget is no reason to offer --allow-change"
        assert f"run `{path}` is finished" in err
        assert "loading torch" not in err
        program, *words = shlex.split(err.partition("hint: `")[2].partition("`")[0])
        assert (program, *words[:2]) == ("llmctl", command, "-r")
        assert shell(*words, "-q")[0] == 0
    assert "llmctl pretrain --resume 'my model'" in shell("finetune", "--resume", "my model")[2]


def test_runs_begun_with_an_output_folder_are_listed(shell: Shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a b c\n" * 200)
    given = ["a.txt", "--steps", "1", "--set", "tokenizer.vocab_size=300", *TINY]
    assert shell("pretrain", *given, "-o", "out/model")[0] == 0
    status, out, _ = shell("runs")
    assert status == 0
    assert "out/model" in out
    assert [row["run"] for row in json.loads(shell("runs", "ls", "--json")[1])] == ["out/model"]
    assert shell("runs", "rm", "out/model", "-y")[:2] == (0, "out/model\n")
    assert shell("runs")[1] == ""
    monkeypatch.setenv("LLMCTL_RUNS", str(tmp_path / "other"))
    assert shell("runs")[1] == ""


@pytest.mark.parametrize("out", ["/proc/x", "/sys/x.safetensors", "/dev/null"])
def test_an_output_of_the_kernel_is_refused_before_torch(shell: Shell, out: str):
    status, _, err = shell("pretrain", "--steps", "1", "-f", "-o", out)
    assert status == 8
    assert err.startswith(f"error: cannot write `{out}`: `/{out.split('/')[1]}` holds no files of users\n")
