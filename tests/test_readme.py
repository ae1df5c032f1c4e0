"""The README's transcript runs as it stands, its commands exist, and nothing but results is on stdout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli import COMMANDS, EXIT_CODES, root_help

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def transcript() -> list[tuple[str, str]]:
    """Return (command, expected stdout or nothing) of the console block."""
    block = re.search(r"```console\n(.*?)```", README, re.DOTALL)
    assert block
    steps: list[tuple[str, str]] = []
    for line in block[1].splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], ""))
        else:
            steps[-1] = (steps[-1][0], steps[-1][1] + line + "\n")
    return steps


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme_and_the_help(name: str):
    assert f"`{name}`" in README
    assert name in root_help()


def test_exit_codes_of_the_readme_are_those_of_the_help():
    section = README.split("## Exit codes")[1].split("##")[0]
    for code in re.findall(r"\b(\d{1,3})(?:/\d+)? [a-z]", EXIT_CODES):
        assert re.search(rf"\b{code}\b", section), code


def test_the_transcript_runs(tmp_path, monkeypatch):
    # The commands as they stand; only the number of steps is bounded, so that a minute is seconds here.
    shim = tmp_path / "bin" / "llmctl"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -P -m llmctl "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LLMCTL_TRAIN_STEPS", "12")
    for command, expected in transcript():
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stdout
        if expected:
            assert done.stdout == expected
        elif not command.startswith("cp "):
            assert done.stdout, command
