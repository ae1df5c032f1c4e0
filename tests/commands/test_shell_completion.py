"""Completion as a shell asks for it: words in, candidates out; and what is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli import COMMANDS
from llmctl.commands.shell_completion import ASKED, SCRIPTS


@pytest.fixture
def ask(shell, monkeypatch):
    def ask(*words: str) -> list[str]:
        monkeypatch.setenv(ASKED, "1")
        status, out, err = shell(*words)
        assert (status, err) == (0, "")
        return out.splitlines()

    return ask


def test_commands_options_and_values_are_completed(ask):
    assert ask("") == sorted(COMMANDS)
    assert ask("ex") == ["export"]
    assert ask("--s") == ["--show-completion"]
    assert ask("export", "--t") == ["--to", "--type"]
    assert ask("pretrain", "--minutes", "1", "--obj") == ["--objective"]
    assert ask("pretrain", "--objective", "ml") == ["mlm"]
    assert ask("--debug", "pretrain", "--epo") == ["--epochs"]
    assert ask("distill", "cache", "--dr") == ["--draws"]
    assert ask("distill", "ca") == ["cache"]
    assert ask("runs", "di") == ["diff"]
    assert ask("runs", "rm", "--check") == ["--checkpoints"]


def test_files_and_free_text_are_left_to_the_shell(ask):
    for words in (
        ["inspect", ""],
        ["pretrain", "bo"],
        ["export", "--out", "x"],
        ["nothing", ""],
        ["generate", "--model", ""],
    ):
        assert ask(*words) == []


def test_every_command_completes_its_options(ask):
    for command in COMMANDS:
        assert "--help" in ask(command, "--")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_shown_and_installed_once(shell, monkeypatch, tmp_path, name: str):
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/bin/{name}")
    start = tmp_path / f".{name}rc"
    if name != "fish":
        start.write_text("alias x=y")
    assert shell("--show-completion") == (0, SCRIPTS[name], "")
    for _ in range(2):
        status, out, err = shell("--install-completion", name)
        assert (status, name in err) == (0, True)
        assert Path(out.strip()).read_text() == SCRIPTS[name]
    if name != "fish":
        assert start.read_text() == f"alias x=y\nsource '{out.strip()}'\n"


def test_an_unknown_shell_is_refused(shell):
    status, _, err = shell("--show-completion", "tcsh")
    assert (status, "`tcsh`" in err, "bash" in err) == (2, True, True)


def test_bash_completes_with_the_script(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llmctl").write_text(f'#!/bin/sh\nexec {sys.executable} -m llmctl "$@"\n')
    (tmp_path / "bin" / "llmctl").chmod(0o755)
    code = SCRIPTS["bash"] + "COMP_WORDS=(llmctl quantize --bi); COMP_CWORD=2; _llmctl; echo ${COMPREPLY[@]}"
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", code], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "--bits\n"
