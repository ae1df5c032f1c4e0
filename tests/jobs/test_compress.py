"""Compression end to end: files of the size asked for, for every family and format, and runs that are killed and resumed."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from llmctl.artifacts.load import load_model
from llmctl.compressing.settings import check, settle
from llmctl.config import CompressConfig
from llmctl.converting.export_onnx import int8_bytes, overhead_bytes
from llmctl.errors import ArtifactError, UsageError
from llmctl.formats.artifact import read_artifact
from llmctl.jobs.begin import begin
from llmctl.jobs.finish import Trained
from llmctl.jobs.resume import resume
from llmctl.recipe import load
from tests.support.jobs import environment, finish, running
from tests.support.warm import WARM

TINY = [
    "train.batch_size=8",
    "train.steps=8",
    "train.eval_every=4",
    "train.seq_len=48",
    "train.dtype=float32",
    "train.device=cpu",
    "plan.calibration_rows=4",
    "plan.measure_tokens=512",
    "plan.refit_tokens=256",
    "plan.trials=2",
    "student.calibration_rows=4",
    "data.split=blank",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "\n\n".join(f"the good cat {i} sat on a bad mat. 猫坐在垫子上。" * 3 for i in range(120)), encoding="utf-8"
    )
    return tmp_path


def config_of(model: Path, size: str, *settings: str) -> CompressConfig:
    given = [*TINY, f"model={model}", f"size={size}", "data.paths=[text.txt]", *settings]
    return load(CompressConfig, settings=given, environment={}).config


def compress(model: Path, size: str, *settings: str, out: str = "out") -> Trained:
    trained = begin("compress", config_of(model, size, *settings), out=Path(out), quiet=True)
    assert trained is not None
    return trained


@pytest.mark.parametrize(
    ("name", "size"), [("decoder", 34_000), ("encoder", 34_000), ("bert", 40_000), ("encoder_decoder", 60_000)]
)
def test_the_file_has_at_most_the_size_and_is_a_model(models, name: str, size: int):
    trained = compress(models[name], f"{size / 1000}kB")
    path = trained.path / "model.safetensors"
    # A header of thousands of bytes is estimated: in files of megabytes that is no difference.
    assert size - 2500 <= path.stat().st_size <= size
    report = json.loads((trained.path / "report.json").read_text())
    assert report["bytes"] == path.stat().st_size
    assert [stage["stage"] for stage in report["stages"]][:: len(report["stages"]) - 1] == ["original", "result"]
    assert (trained.path / "frontier.svg").read_text().startswith("<svg")
    model = load_model(path, device="cpu", packed=True).model
    assert model.config.family == read_artifact(models[name]).config.family
    assert not [path for path in (trained.path / "parts").iterdir() if path.is_dir() or path.suffix == ".safetensors"]


@pytest.mark.parametrize("lever", ["vocabulary", "depth", "width", "bits"])
def test_a_lever_that_is_kept_stays(models, lever: str):
    trained = compress(models["decoder"], {"bits": "75kB"}.get(lever, "50kB"), f"keep=[{lever}]", "train.steps=2")
    before, after = read_artifact(models["decoder"]), read_artifact(trained.path)
    if lever == "vocabulary":
        assert after.config.vocab_size == before.config.vocab_size
    elif lever == "depth":
        assert after.config.n_layers == before.config.n_layers
    elif lever == "width":
        assert (after.config.d_model, after.config.d_ff) == (before.config.d_model, before.config.d_ff)
    else:
        assert not after.schemes
        assert (trained.path / "model.safetensors").stat().st_size <= 75_000


def test_without_data_a_decoder_generates_its_own(models):
    trained = compress(models["decoder"], "45kB", "data.paths=[]", "plan.written_tokens=1500", "train.steps=2")
    assert trained.path.joinpath("model.safetensors").stat().st_size <= 45_000
    data = read_artifact(trained.path).provenance["data"]
    assert data["paths"] == ["train.jsonl"]


def test_a_gguf_file_has_at_most_the_size(models):
    pytest.importorskip("gguf", reason="pip install '.[interop]'")
    trained = compress(models["decoder"], "32kB", "format=gguf", out="small.gguf")
    assert trained.path == Path("small.gguf")
    assert 25_000 < trained.path.stat().st_size <= 32_000


def test_16_bit_weights_are_a_hugging_face_folder(models):
    trained = compress(models["decoder"], "60kB", "format=hf", "train.steps=2")
    artifact = read_artifact(trained.path)
    assert artifact.dtype == "BF16"
    assert (trained.path / "model.safetensors").stat().st_size <= 60_000


@pytest.mark.interop
@pytest.mark.parametrize("family", ["encoder", "bert"])
def test_an_onnx_file_has_at_most_the_size_and_is_verified(models, family):
    pytest.importorskip("onnxruntime", reason="pip install '.[onnx]'")
    whole = overhead_bytes(models[family]) + int8_bytes(read_artifact(models[family]).config)
    size = round(0.85 * whole)
    trained = compress(models[family], f"{size}B", "format=onnx", "train.steps=2")
    found = (trained.path / "onnx" / "model_quantized.onnx").stat().st_size
    report = json.loads((trained.path / "report.json").read_text(encoding="utf-8"))
    assert report["bytes"] == found
    assert 0.5 * size < found <= size
    assert (trained.path / "model.safetensors").exists()


def test_a_decoder_is_not_exported_as_onnx(models):
    with pytest.raises(UsageError, match="not exported as ONNX"):
        compress(models["decoder"], "45kB", "format=onnx")


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        ("2kB", [], "cannot be compressed to 0.002 MB"),
        ("10MB", [], "the model has only 0.155 MB"),
        ("much", [], "`--to much` is not a size"),
        ("45kB", ["keep=[colour]"], "`keep` names colour"),
        ("45kB", ["keep=[vocabulary,depth,width,bits]"], "nothing can be compressed"),
        ("45kB", ["plan.trials=0"], "`plan.trials` is 0"),
        ("45kB", ["weights.scheme=int3"], "`weights.scheme` is set by the plan"),
        ("45kB", ["student.shape=30%"], "`student.shape` is set by the plan"),
        ("45kB", ["task=chat", "data.paths=[]"], "needs data"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(models, here, size: str, settings: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        compress(models["decoder"], size, *settings)
    assert not (here / "out").exists()


def test_a_quantized_model_is_refused(models):
    small = compress(models["decoder"], "45kB", "train.steps=2").path
    with pytest.raises(UsageError, match="already quantized"):
        check(settle(config_of(small, "30kB")))


def digest(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def command(model: Path, out: str) -> list[str]:
    settings = [part for setting in TINY for part in ("--set", setting)]
    return ["compress", str(model), "--to", "30kB", "--data", "text.txt", *settings, "-o", out, "-v"]


@pytest.fixture
def undisturbed(models) -> str:
    finish([*WARM, *command(models["decoder"], "whole")], env=environment())
    return digest(Path("whole"))


@pytest.mark.parametrize(
    "line",
    [
        "measuring the bits of the blocks",
        "layers 1:",
        "trial 1: cost",
        "step 2/5",
        pytest.param("kept the weights", marks=pytest.mark.slow),
        "measuring the sensitivity",
        pytest.param("step 1/3", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(models, undisturbed, line: str):
    with running([*WARM, *command(models["decoder"], "killed")], env=environment()) as (run,):
        run.wait_for(line)
        os.kill(run.process.pid, signal.SIGKILL)
        run.end()
    finish([*WARM, "compress", "--resume", "killed", "-v"], env=environment())
    assert digest(Path("killed")) == undisturbed


def test_another_model_under_the_same_name_is_refused(models, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(models["decoder"], model)
    with running([*WARM, *command(model, "killed")], env=environment()) as (run,):
        run.wait_for("trial 1: cost")
        os.kill(run.process.pid, signal.SIGKILL)
        run.end()
    shutil.rmtree(model)
    shutil.copytree(models["bert"], model)  # the encoder has the same random weights
    with pytest.raises((ArtifactError, UsageError)):
        resume("compress", "killed", quiet=True)
