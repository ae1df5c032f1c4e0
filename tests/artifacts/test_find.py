"""One way to name a model, in every command that takes one: the table walks commands and names."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmctl.cli import run

TEXT = "the good cat sat on a bad mat.\n" * 8

NAMES = {
    "folder": "runs/0001-pretrain-clm-tiny",
    "file": "teacher.safetensors",
    "number": "1",
    "padded number": "0001",
    "number in runs": "runs/1",
    "padded number in runs": "runs/0001",
    "prefix": "0001-pre",
    "latest": "latest",
    "latest in runs": "runs/latest",
}

OPTION: dict[str, list[str]] = {
    "generate": ["generate", "the", "-n", "1", "-q"],
    "chat": ["chat", "--script", "text.txt", "-n", "1", "-q"],
    "evaluate": ["evaluate", "-d", "text.txt", "--limit", "1", "-q"],
    "bench": ["bench", "--prompt", "2", "-n", "1", "--batch", "1", "-q"],
    "export": ["export", "--to", "single", "-o", "single.safetensors", "-f"],
    "inspect": ["inspect"],
    "use": ["use"],
    "distill": ["distill", "--print-config"],
    "quantize": ["quantize", "--print-config"],
    "finetune": ["finetune", "chats.jsonl", "--print-config"],
    "pretrain": ["pretrain", "--print-config"],
    "tokenize": ["tokenize", "--stats"],
}
"""Commands that take a decoder with `-m`, as short as they can be."""

ARGUMENT = {
    name: OPTION[name] for name in ("evaluate", "bench", "export", "inspect", "use", "distill", "quantize", "chat")
}
"""Those that take it as their argument too."""

DEFAULT = {name: OPTION[name] for name in OPTION if name not in ("pretrain", "use", "distill", "quantize", "finetune")}
"""Those that find a model by themselves. (Training commands do so too, but print their defaults with --print-config.)"""


LONG = ("bench", "evaluate")
"""Commands that take longer: they get a name of each kind, the others all."""


def named(commands: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return pairs of a command and a key of NAMES."""
    return [(each, name) for each in commands for name in (("file", "number", "latest") if each in LONG else NAMES)]


@pytest.fixture(scope="module")
def made(models, tmp_path_factory) -> Path:
    """Return a folder with one finished run, a file of its model and some text."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "text.txt").write_text(TEXT)
    (folder / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    made = folder / NAMES["folder"]
    shutil.copytree(models["decoder"], made)
    record = {"status": "finished", "finished": "2026-01-01T00:00:00Z", "family": "decoder", "has_head": False}
    (made / "run.json").write_text(json.dumps(record))
    shutil.copyfile(made / "model.safetensors", folder / NAMES["file"])
    return folder


@pytest.fixture
def call(made, monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(made)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("LLMCTL_MODEL", raising=False)

    def run_it(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n")))
        status = run(arguments)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run_it


@pytest.mark.parametrize(("command", "name"), named(OPTION))
def test_a_model_is_named_with_an_option(call, command: str, name: str):
    status, said = call(*OPTION[command], "-m", NAMES[name])
    assert status == 0, said


@pytest.mark.parametrize(("command", "name"), named(ARGUMENT))
def test_a_model_is_named_as_an_argument(call, command: str, name: str):
    status, said = call(command, NAMES[name], *ARGUMENT[command][1:])
    assert status == 0, said


@pytest.mark.parametrize("command", DEFAULT)
def test_a_model_is_named_by_the_environment_or_found(call, monkeypatch, command: str):
    for variable in ("teacher.safetensors", "1", None):
        if variable:
            monkeypatch.setenv("LLMCTL_MODEL", variable)
        else:
            monkeypatch.delenv("LLMCTL_MODEL")
        status, said = call(*DEFAULT[command])
        assert status == 0, said
    monkeypatch.setenv("LLMCTL_MODEL", "nowhere")
    status, said = call(*DEFAULT[command])
    assert (status, "`nowhere` does not exist" in said) == (3, True), said


@pytest.mark.parametrize("command", OPTION)
def test_a_model_that_does_not_exist_is_said_to(call, command: str):
    status, said = call(*OPTION[command], "-m", "7")
    assert status == 3
    assert "model `7` does not exist" in said


def test_two_names_are_one_too_many(call):
    for command in ("export", "inspect", "use", "distill", "quantize", "chat"):
        status, said = call(*OPTION[command], "1", "-m", "latest")
        assert (status, "two models are given" in said) == (2, True), said


def test_the_printed_config_names_the_run(call):
    for command in ("distill", "quantize", "finetune", "pretrain"):
        _, said = call(*OPTION[command], "-m", "runs/1")
        assert NAMES["folder"] in said


def test_the_newest_run_is_by_time_and_not_by_text(made, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    times = {"0001-later": "2026-01-01T00:30:00-0500", "0002-earlier": "2026-01-01T02:00:00+0100"}
    for name, time in times.items():
        shutil.copytree(made / NAMES["folder"], tmp_path / "runs" / name)
        record = {"status": "finished", "finished": time, "family": "decoder", "has_head": False}
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(record))
    _, said = call("quantize", "-m", "latest", "--print-config")
    assert "runs/0001-later" in said


def test_a_variable_that_names_nothing_is_named(tmp_path, monkeypatch):
    from llmctl.artifacts.find import resolve_model
    from llmctl.errors import NotFoundError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMCTL_MODEL", "nowhere/m.safetensors")
    with pytest.raises(NotFoundError, match=r"LLMCTL_MODEL: model `nowhere/m.safetensors` does not exist"):
        resolve_model(None, able="any")
