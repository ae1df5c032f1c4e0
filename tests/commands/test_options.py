"""A budget given on the command line is the budget of the run: it replaces the recipe's, and nothing is not all."""

import pytest

from tests.commands.conftest import Shell


@pytest.mark.parametrize("command", ["pretrain", "finetune", "distill", "quantize"])
@pytest.mark.parametrize("given", [["--steps", "0"], ["--minutes", "0"], ["--set", "train.epochs=0"]])
def test_a_budget_of_nothing_is_refused(shell: Shell, command: str, given: list[str]):
    code, out, err = shell(command, *given, "--print-config")
    assert (code, out) == (2, "")
    assert " is 0: nothing would be trained" in err


def test_a_budget_replaces_that_of_the_recipe(shell: Shell, tmp_path):
    (tmp_path / "r.yaml").write_text("train: {steps: 100, minutes: 5}\n")
    code, out, _ = shell("pretrain", "-r", str(tmp_path / "r.yaml"), "--tokens", "5000", "--print-config")
    lines = [line.split("#")[0].strip() for line in out.splitlines()]
    assert code == 0
    assert {"steps: 0", "tokens: 5000", "minutes: 5.0"} <= set(lines)


def test_two_budgets_at_once_are_refused(shell: Shell):
    code, _, err = shell("finetune", "--steps", "10", "--epochs", "3", "--print-config")
    assert code == 2
    assert "`train.steps` 10, `train.epochs` 3" in err


def test_a_folder_that_no_run_wrote_is_not_cleared_by_force(shell: Shell, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").write_text("mine")
    code, _, err = shell("pretrain", "-o", str(tmp_path), "-f", "--steps", "1")
    assert code == 8
    assert f"`{tmp_path / 'data'}` exists, and no run wrote it" in err
    assert (tmp_path / "data" / "precious.txt").read_text() == "mine"
