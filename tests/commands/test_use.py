"""`llmctl use`: a choice that holds everywhere, written whole or not at all."""

from pathlib import Path

import pytest

from llmctl.artifacts.find import default_file, resolve_model
from llmctl.cli import run
from llmctl.config import ModelConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def model(home) -> Path:
    made = LanguageModel(ModelConfig(vocab_size=20, d_model=8, n_layers=1, n_heads=2))
    initialize(made, 0)
    return write_artifact(home / "m", made.config, made.state_dict(), files={}, provenance={})


def test_the_choice_holds_from_any_directory(home, model, capsys, monkeypatch):
    assert run(["use", "m"]) == 0
    assert capsys.readouterr().out == f"{model}\n"
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    assert run(["use"]) == 0
    assert capsys.readouterr().out == f"{model}\n"
    assert resolve_model(None, able="generate").path == model
    assert [path.name for path in default_file().parent.iterdir()] == ["default"]


@pytest.mark.parametrize(
    ("name", "status"), [("nowhere", 3), ("/nowhere", 3), ("", 2), ("data", 3), ("damaged.safetensors", 4)]
)
def test_a_choice_that_is_no_model_changes_nothing(home, model, capsys, name: str, status: int):
    assert run(["use", "m"]) == 0
    (home / "damaged.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:50])
    assert run(["use", name]) == status
    assert default_file().read_text() == f"{model}\n"
    assert "this is a bug" not in capsys.readouterr().err


def test_no_choice_says_how_to_make_one(home, capsys):
    assert run(["use"]) == 3
    assert "llmctl use" in capsys.readouterr().err


def test_no_folder_to_write_to_is_an_error_of_its_own(home, model, capsys, monkeypatch):
    (home / "file").write_text("in the way")
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "file" / "data"))
    assert run(["use", "m"]) == 8
    assert "file/data" in capsys.readouterr().err
