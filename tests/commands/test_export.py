"""`llmctl export` as a user runs it."""

import json

import pytest

from llmctl.cli import run
from llmctl.config import ModelConfig
from llmctl.formats.artifact import write_artifact
from llmctl.model.transformer import LanguageModel


@pytest.fixture
def folder(tmp_path):
    model = LanguageModel(ModelConfig(vocab_size=30, d_model=16, n_layers=1, n_heads=2))
    return write_artifact(tmp_path / "m", model.config, model.state_dict(), files={}, provenance={})


def test_single_file_and_back(folder, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    assert run(["export", str(folder), "--to", "single", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert run(["export", str(out), "--to", "hf", "-o", str(tmp_path / "y"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "y"), "to": "hf"}


def test_errors_have_their_exit_code(folder, tmp_path, capsys):
    out = str(tmp_path / "x.safetensors")
    assert run(["export", str(folder), "--to", "hf", "-o", out]) == 2
    assert run(["export", str(folder), "--to", "zip", "-o", out]) == 2
    assert run(["export", str(tmp_path / "nowhere"), "--to", "single", "-o", out]) == 3
    (tmp_path / "x").write_bytes(b"")
    assert run(["export", str(folder), "--to", "hf", "-o", str(tmp_path / "x" / "y")]) == 8
    assert "error: " in capsys.readouterr().err
