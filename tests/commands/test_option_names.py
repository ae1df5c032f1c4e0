"""An option of another tool leads to ours, and every name in the table is one that a command has."""

import pytest
from typer.main import get_command

from llmctl.cli import COMMANDS
from llmctl.commands.option_names import SYNONYMS, is_given, meant
from tests.commands.conftest import Shell


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("pretrain --preset small", "did you mean `--model`?"),
        ("pretrain --preset=small", "did you mean `--model`?"),
        ("finetune --model_name_or_path m", "did you mean `--model`?"),
        ("pretrain --learning-rate 1", "did you mean `--lr`?"),
        ("pretrain --batch_size 1", "did you mean `--batch-size`?"),
        ("finetune --num_train_epochs 1", "did you mean `--epochs`?"),
        ("pretrain --max-tokens 1", "did you mean `--tokens`?"),
        ("evaluate --max-new-tokens 1", "did you mean `--max-tokens`?"),
        ("generate --temprature 1", "did you mean `--temperature`?"),
        ("pretrain --output x", "did you mean `--out`?"),
        ("pretrain --output_dir x", "did you mean `--out`?"),
        ("pretrain --dataset x", "did you mean the argument `DATA`?"),
        ("distill --dataset x", "did you mean `--data`?"),
        ("generate --prompt x", "did you mean the argument `PROMPT`?"),
        ("pretrain --random-seed 1", "did you mean `--seed`?"),
        ("pretrain --weight-decay 1", "did you mean `--set optim.weight_decay=VALUE`?"),
        ("pretrain --qqqqqq", "`llmctl pretrain --help` shows the options"),
        ("runs ls --jsno", "did you mean `--json`?"),
    ],
)
def test_an_unknown_option_leads_to_ours(shell: Shell, line, hint):
    words = line.split()
    status, out, err = shell(*words)
    assert (status, out) == (2, "")
    assert err.endswith(f"hint: {hint}\n"), err
    assert "error: unknown option `--" in err


def all_options() -> set[str]:
    from importlib import import_module

    found = set()
    for name in COMMANDS:
        command = get_command(import_module(f"llmctl.commands.{'import_' if name == 'import' else name}").app)
        for each in (command, *getattr(command, "commands", {}).values()):
            for parameter in each.params:
                found |= {*parameter.opts, parameter.metavar or parameter.name.upper()}
    return found


def test_the_table_leads_to_options_that_exist():
    assert {ours for names in SYNONYMS.values() for ours in names} <= all_options()


def test_what_counts_as_given():
    assert is_given("--lr", "--lr=3")
    assert is_given("-n", "-n3")
    assert not is_given("--batch", "--batch-size")
    assert not is_given("-o", "--out")
    assert meant("--Learning_Rate", {"--lr"}) == "--lr"
