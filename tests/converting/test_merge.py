"""Merged models open and generate; models that differ, quantized ones and bad settings are refused."""

import json
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.cli import run
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from tests.support.tuning import FAMILIES


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def other(path: Path, out: str, seed: int, **changes) -> Path:
    """Write a model like another with random weights."""
    loaded = load_model(path, device="cpu", dtype="float32")
    config = type(loaded.model.config)(**{**vars(loaded.model.config), **changes})
    model = LanguageModel(config)
    initialize(model, seed)
    return write_artifact(Path(out), config, model.state_dict(), files=loaded.artifact.files, provenance={})


def weights(path) -> dict[str, torch.Tensor]:
    return load_model(Path(path), device="cpu", dtype="float32").model.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_merged(models, family, capsys):
    second = other(models[family], "second", 7)
    assert run(["merge", str(models[family]), str(second), "--weights", "1,3", "-o", "mean", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["weights"] == [1.0, 3.0]
    own, theirs, found = weights(models[family]), weights(second), weights("mean")
    for name, value in found.items():
        torch.testing.assert_close(value, 0.25 * own[name] + 0.75 * theirs[name], rtol=1e-6, atol=1e-7)


def test_slerp_and_ties_at_their_ends(models):
    first, second = models["decoder"], other(models["decoder"], "second", 7)
    assert (
        run(["merge", str(first), str(second), "--method", "slerp", "--weights", "1,0", "-o", "same.safetensors", "-q"])
        == 0
    )
    for name, value in weights("same.safetensors").items():
        torch.testing.assert_close(value, weights(first)[name], rtol=1e-5, atol=1e-7)
    command = [
        "merge",
        str(second),
        str(second),
        "--method",
        "ties",
        "--base",
        str(first),
        "--density",
        "1",
        "-o",
        "ties",
        "-q",
    ]
    assert run(command) == 0
    for name, value in weights("ties").items():
        torch.testing.assert_close(value, weights(second)[name], rtol=1e-5, atol=1e-6)
    assert run(["generate", "-m", "ties", "the cat", "--max-tokens", "3", "-q"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "x"], 2, "one model is given"),
        (["{second}", "-o", "x", "--weights", "1"], 2, "1 weights are given for 2 models"),
        (["{second}", "-o", "x", "--weights", "1,a"], 2, "`a` is no number"),
        (["{second}", "-o", "x", "--weights", "0,0"], 2, "have no mean"),
        (["{second}", "-o", "x", "--weights", "nan,1"], 2, "have no mean"),
        (["{second}", "{second}", "-o", "x", "--method", "slerp"], 2, "takes 2 models, not 3"),
        (["{second}", "-o", "x", "--method", "ties"], 2, "--base"),
        (["{second}", "-o", "x", "--base", "{second}"], 2, "is not used by"),
        (["{second}", "-o", "x", "--method", "mean"], 2, "use one of linear, slerp, ties"),
        (["{second}", "-o", "x", "--method", "ties", "--base", "{second}", "--density", "0"], 2, "`--density 0`"),
        (["{wide}", "-o", "x"], 2, "differ in `d_ff`"),
        (["{encoder}", "-o", "x"], 2, "differ in `family`"),
        (["{second}", "-o", "{second}", "-f"], 2, "is one of the models"),
        (["missing", "-o", "x"], 3, "missing"),
    ],
)
def test_what_cannot_be_merged_is_named(models, arguments, code, message, capsys):
    known = {
        "second": other(models["decoder"], "second", 7),
        "wide": other(models["decoder"], "wide", 7, d_ff=96),
        "encoder": models["encoder"],
    }
    before = {path: path.read_bytes() for path in Path("second").iterdir()}
    assert run(["merge", str(models["decoder"]), *(part.format(**known) for part in arguments)]) == code
    assert message in capsys.readouterr().err
    assert not Path("x").exists()
    assert {path: path.read_bytes() for path in Path("second").iterdir()} == before


def test_quantized_models_are_refused(models, capsys):
    assert run(["quantize", str(models["decoder"]), "--bits", "8", "--method", "nearest", "-o", "q", "-q"]) == 0
    assert run(["merge", str(models["decoder"]), "q", "-o", "x"]) == 4
    assert "`q` is quantized" in capsys.readouterr().err
