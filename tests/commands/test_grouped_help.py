"""`--help`: groups in one order, values and defaults from the config, types as people write them."""

import re

import pytest

from llmctl.cli import COMMANDS, SUBCOMMANDS, run
from llmctl.commands.grouped_help import GROUPS
from llmctl.tables.losses import DIVERGENCES
from llmctl.tables.methods import METHODS
from llmctl.tables.tasks import trained_tasks

TRAINING = ("pretrain", "finetune", "distill", "quantize", "compress")


@pytest.fixture
def help_of(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*command: str) -> str:
        capsys.readouterr()
        assert run([*command, "--help"]) == 0
        return capsys.readouterr().out

    return call


ALL = [(name,) for name in COMMANDS] + [(name, sub) for name, subs in SUBCOMMANDS.items() for sub in subs]
ALL += [
    ("tokenize", "train"),
    ("tokenize", "encode"),
    ("runs", "ls"),
    ("runs", "show"),
    ("runs", "diff"),
    ("runs", "rm"),
]


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_types_are_as_people_write_them(help_of, command: tuple[str, ...]):
    text = help_of(*command)
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"<(?!mask)[a-z]+|list\[|INTEGER|<str>", text)
    assert "Examples:" in text


@pytest.mark.parametrize("command", TRAINING)
def test_groups_have_one_order_and_every_option_is_in_one(help_of, command: str):
    text = help_of(command)
    titles = [line.rstrip(":") for line in text.splitlines() if re.fullmatch(r"[A-Z][a-z ]+:", line)]
    shown = [title for title in titles if title in GROUPS]
    assert shown == [title for title in GROUPS if title in shown]
    assert len(shown) >= 6
    first = text.split("\nOptions:\n")[1].split("\n\n")[0]
    assert len(re.findall(r"^  -", first, re.MULTILINE)) <= 10
    known = {name for names in GROUPS.values() for name in names}
    names = {match.replace("-", "_") for match in re.findall(r"--([a-z-]+)", text) if f"--{match} " in text}
    aliases = {"batch", "no_compile", "compile", "set", "type", "data", "calib", "for", "to"}
    unknown = {
        n
        for n in names
        if n not in known | aliases and re.search(rf"^  (?:-\w, )?--{n.replace('_', '-')}\b", text, re.MULTILINE)
    }
    assert not unknown


def test_names_and_defaults_come_from_the_tables(help_of):
    flat = {command: " ".join(help_of(command).split()) for command in TRAINING}
    assert all(name in flat["quantize"] for name in METHODS)
    assert all(name in flat["distill"] for name in DIVERGENCES)
    assert all(name in flat["finetune"] for name in trained_tasks())
    assert "[default: 512]" in flat["finetune"]
    assert "[default: 256]" in flat["distill"]
