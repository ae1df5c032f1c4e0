"""A command line as a shell would give it: arguments and standard input in, exit code and both streams out."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest

from llmctl.artifacts.load import load_model
from llmctl.cli import run
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Return a caller of the command line: (exit code, stdout, stderr)."""

    def call(*arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def headed(models, tmp_path, monkeypatch):
    """Return a maker of tiny models with a head over tokens, of random weights."""
    monkeypatch.chdir(tmp_path)

    def make_it(head: str, **fields: object) -> str:
        base = load_model(models["bert"], device="cpu", dtype="float32")
        config = replace(base.model.config, head=head, n_labels=2, init_std=0.4, **fields)
        model = LanguageModel(config)
        initialize(model, 1)
        write_artifact(tmp_path / head, config, model.state_dict(), files=base.artifact.files, provenance={})
        return str(tmp_path / head)

    return make_it
