"""Which model a command means: the order, the names, and the errors that say how to get one."""

import json
from pathlib import Path

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.engine.models import announce, default_file, load_model, resolve_model, runs_folder
from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.formats.artifact import write_artifact
from llmctl.model.transformer import LanguageModel, initialise


def model(family: str = "decoder", **fields) -> LanguageModel:
    made = LanguageModel(ModelConfig(family=family, vocab_size=330, d_model=16, n_layers=1, n_heads=2, **fields))
    initialise(made, 0)
    return made


def write(path: Path, made: LanguageModel, files: dict[str, bytes] | None = None) -> Path:
    return write_artifact(path, made.config, made.state_dict(), files=files or {}, provenance={})


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    return tmp_path


def add_run(name: str, family: str, status: str = "finished", finished: str = "2026-01-01") -> Path:
    path = write(Path("runs") / name, model(family))
    (path / "run.json").write_text(json.dumps({"status": status, "family": family, "finished": finished}))
    return path


def test_nothing_says_how_to_make_one(home):
    for able, hint in (("generate", "llmctl pretrain"), ("fill", "--objective mlm")):
        with pytest.raises(NotFoundError, match="no model") as caught:
            resolve_model(None, able=able)
        assert hint in caught.value.hint


def test_the_order(home, monkeypatch):
    write(home / "chosen", model())
    default_file().parent.mkdir(parents=True)
    default_file().write_text(f"{home / 'chosen'}\n")
    assert resolve_model(None, able="generate").path == home / "chosen"
    run = add_run("0001-a", "decoder")
    assert resolve_model(None, able="generate").path == run
    (home / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert resolve_model(None, able="generate").path == Path()
    monkeypatch.setenv("LLMCTL_MODEL", str(home / "chosen"))
    assert resolve_model(None, able="generate").path == home / "chosen"
    assert resolve_model("runs/0001-a", able="generate").path == run


def test_only_finished_runs_that_can_are_taken(home):
    wanted = add_run("0001-a", "decoder", finished="2026-01-01")
    add_run("0002-b", "encoder", finished="2026-01-02")
    add_run("0003-c", "decoder", status="running")
    (Path("runs") / "0004-d").mkdir()
    (Path("runs") / "0004-d" / "run.json").write_text("{broken")
    found = resolve_model(None, able="generate")
    assert found.path == wanted
    assert "newest run" in announce(found)
    assert resolve_model(None, able="fill").path.name == "0002-b"
    assert resolve_model("latest", able="any").path.name == "0002-b"


def test_an_encoder_never_serves_generate(home):
    add_run("0001-a", "encoder")
    with pytest.raises(NotFoundError, match="encoder") as caught:
        resolve_model(None, able="generate")
    assert "llmctl fill" in caught.value.hint


def test_names_and_prefixes(home):
    first, second = add_run("0001-x-a", "decoder"), add_run("0011-x-b", "decoder")
    assert resolve_model("0001", able="generate").path == first
    assert resolve_model("0011-x", able="generate").path == second
    with pytest.raises(UsageError, match="more than one"):
        resolve_model("00", able="generate")
    with pytest.raises(NotFoundError, match="0007"):
        resolve_model("0007", able="generate")


def test_runs_are_found_from_below_and_elsewhere(home, monkeypatch):
    add_run("0001-a", "decoder")
    (home / "sub" / "deep").mkdir(parents=True)
    monkeypatch.chdir(home / "sub" / "deep")
    assert runs_folder().resolve() == home / "runs"
    monkeypatch.setenv("LLMCTL_RUNS", str(home / "other"))
    assert runs_folder() == home / "other"


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "relative"])
def test_loading_gives_the_same_logits(home, positions: str):
    made = model(positions=positions)
    loaded = load_model(write(home / "m", made))
    ids = torch.arange(10)[None]
    assert torch.equal(loaded.model(ids), made.eval()(ids))
    assert not loaded.model.training


def test_a_tokenizer_that_does_not_fit_is_refused(home, text_tokenizer):
    small = LanguageModel(ModelConfig(vocab_size=100, d_model=16, n_layers=1, n_heads=2))
    path = write(home / "m", small, text_tokenizer.files())
    with pytest.raises(ArtifactError, match="100"):
        load_model(path)


@pytest.mark.parametrize(("option", "value"), [("dtype", "int3"), ("device", "tpu")])
def test_unknown_places_and_precisions_are_refused(home, option: str, value: str):
    path = write(home / "m", model())
    with pytest.raises(UsageError, match=value):
        load_model(path, **{option: value})
