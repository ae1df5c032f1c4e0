"""Completion as a shell asks for it: words in, candidates out; and what is installed."""

import os
import shutil
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


@pytest.fixture
def in_shell(tmp_path):
    """Return what runs code in a shell, in a folder with a file, with this checkout's llmctl."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llmctl").write_text(f'#!/bin/sh\nexec {sys.executable} -m llmctl "$@"\n')
    (tmp_path / "bin" / "llmctl").chmod(0o755)
    for name in ("texts.txt", "mlm.txt"):
        (tmp_path / name).touch()

    def run(name: str, code: str) -> list[str]:
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}")
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run(
            [name, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    return run


LINES = {
    "quantize --bi": ["--bits"],
    "pretrain --objective m": ["mlm"],
    "distill ca": ["cache"],
    "pretrain texts": ["texts.txt"],
}
"""Command lines and what completes their last word: llmctl, and for a file the shell itself."""


@pytest.mark.parametrize("line", [line for line, found in LINES.items() if found != ["texts.txt"]])
def test_bash_completes_with_the_script(in_shell, line):
    words = line.split()
    code = f"COMP_WORDS=(llmctl {line}); COMP_CWORD={len(words)}; _llmctl; printf '%s\\n' ${{COMPREPLY[@]}}"
    assert in_shell("bash", SCRIPTS["bash"] + code) == LINES[line]


@pytest.mark.parametrize("line", LINES)
def test_zsh_completes_with_the_script(in_shell, line):
    # Outside its line editor zsh has no `compadd`; what the script gives it is printed.
    stubs = """compdef() {}; compadd() { print -l -- "${@:2}" }; _files() { print -l -- ${words[CURRENT]}* }\n"""
    code = f"words=(llmctl {line}); CURRENT={len(line.split()) + 1}; _llmctl"
    assert in_shell("zsh", stubs + SCRIPTS["zsh"] + code) == LINES[line]


@pytest.mark.parametrize("line", LINES)
def test_fish_completes_with_the_script(in_shell, line):
    assert in_shell("fish", f"{SCRIPTS['fish']}complete -C 'llmctl {line}'") == LINES[line]
