"""Adapters on a base that a run puts in four bits itself: the same as on one that was, and right wherever it is used."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmctl.artifacts.adapters import apply_adapters
from llmctl.artifacts.load import load_model
from llmctl.cli import run as llmctl
from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.formats.adapter import read_adapter
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.quantization import linear_modules
from llmctl.jobs.resume import resume
from llmctl.quantizing.qlora_base import BASE
from llmctl.quantizing.report import layer_bits
from llmctl.runs.folder import find_run
from llmctl.training.finetune_settings import check
from tests.jobs.test_finetune import chats, classes, config_of, interrupt, outputs, questions, run, tensors
from tests.support.tuning import FAMILIES

DATA = {"decoder": (chats, "chat"), "encoder_decoder": (questions, "qa")}
RANK = 4


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data_of(family: str) -> tuple[Path, str]:
    make, task = DATA.get(family, (classes, "classify"))
    return make(), task


@pytest.mark.parametrize(("family", "method"), [*((name, "qlora") for name in FAMILIES), ("decoder", "qdora")])
def test_blocks_are_in_four_bits_and_the_adapter_alone_learns(teachers, family, method):
    trained = run(teachers[family], *data_of(family), f"method={method}", "train.steps=20", out=Path("run"))
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]
    base = read_artifact(Path("run") / BASE)
    shapes = {name: shape for name, shape in linear_modules(base.config).items() if "layers." in name}
    assert {name: scheme.bits for name, scheme in base.schemes.items()} == dict.fromkeys(shapes, 4)
    assert 4 < layer_bits(base, base.schemes) < 6  # groups are as small as these models
    factors = sum(RANK * sum(shape) for shape in shapes.values())
    lengths = sum(n_out for n_out, _ in shapes.values()) if method == "qdora" else 0
    head = sum(
        tensor.numel()
        for name, tensor in load_model(Path("run")).model.state_dict().items()
        if name.startswith("classifier")
    )
    assert trained.summary["n_trained"] == factors + lengths + head
    assert read_adapter(Path("run")).dora == (method == "qdora")


@pytest.mark.parametrize(("quantized", "plain"), [("qlora", "lora"), ("qdora", "dora")])
def test_it_is_an_adapter_on_the_model_that_quantize_makes(teachers, quantized, plain):
    data, task = data_of("decoder")
    run(teachers["decoder"], data, task, f"method={quantized}", out=Path("one"))
    Path("text.txt").write_text("\n\n".join(f"the good cat {number} sat on a bad mat." for number in range(200)))
    rows = ["--calib", "text.txt", "--set", "train.seq_len=48", "--set", "data.split=blank"]
    how = ["--bits", "4", "--set", "weights.scale_bits=16", "--method", "clip", "--embedding", "float"]
    assert llmctl(["quantize", str(teachers["decoder"]), *how, *rows, "-q", "-o", "small"]) == 0
    made, expected = load_file(Path("one") / BASE / "model.safetensors"), load_file("small/model.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    for name, method in (("two", plain), ("three", quantized)):
        run(Path("small"), data, task, f"method={method}", out=Path(name))
        adapters = (tensors(Path(folder) / "adapter_model.safetensors") for folder in ("one", name))
        assert next(adapters) == next(adapters)
        assert not (Path(name) / BASE).exists()


@pytest.mark.parametrize(("family", "method"), [("bert", "qlora"), ("decoder", "qdora"), ("encoder_decoder", "qlora")])
def test_the_folder_goes_anywhere_and_its_base_with_it(teachers, family, method, monkeypatch):
    data = classes()
    run(teachers[family], data, "classify", f"method={method}", out=Path("run"))
    run(teachers[family], data, "classify", f"method={method}", "merge=true", out=Path("merged"))
    assert not (Path("merged") / BASE).exists()
    texts = [("cat 1 is good",), ("猫",)]
    expected = outputs(Path("merged"), texts)
    Path("elsewhere").mkdir()
    shutil.move("run", "elsewhere/moved")
    assert torch.allclose(outputs(Path("elsewhere/moved"), texts), expected, atol=1e-5)
    monkeypatch.chdir("elsewhere/moved")
    assert torch.allclose(outputs(Path(), texts), expected, atol=1e-5)


def test_another_base_is_refused(teachers):
    run(teachers["decoder"], *data_of("decoder"), "method=qlora", out=Path("run"))
    with pytest.raises(ArtifactError, match="weights other") as caught:
        apply_adapters(load_model(teachers["decoder"]), ["run"])
    assert f"`{BASE}`" in caught.value.hint
    assert f"belongs to the base in `{BASE}`" in Path("run/README.md").read_text()
    shutil.rmtree(Path("run") / BASE)
    with pytest.raises(NotFoundError, match=BASE):
        load_model(Path("run"))


@pytest.mark.parametrize(("family", "settings"), [("decoder", "method=qlora"), ("bert", "method=qdora")])
def test_a_run_goes_on_from_its_own_base_whatever_became_of_the_model(teachers, family, settings, monkeypatch):
    shutil.copytree(teachers[family], "teacher")
    job = (Path("teacher"), *data_of(family), settings)
    whole = run(*job, out=Path("whole"))
    interrupt(monkeypatch, *job)
    shutil.rmtree("teacher")
    again = resume("finetune", str(find_run("latest")), quiet=True)
    assert again is not None
    assert tensors(again.path / "adapter_model.safetensors") == tensors(whole.path / "adapter_model.safetensors")
    assert again.summary["after"] == whole.summary["after"]


def test_what_cannot_be_is_refused(teachers):
    with pytest.raises(UsageError, match="not `--method qlora`"):
        check(config_of(teachers["decoder"], chats(), "chat", "method=qlora", "qat=int4"))
    artifact = read_artifact(teachers["decoder"])
    state = artifact.state()
    state["model.norm.weight"] = state["model.norm.weight"] * float("nan")
    write_artifact(Path("bad"), artifact.config, state, files=artifact.files, provenance={})
    with pytest.raises(ArtifactError, match=r"`bad` has NaN.*`model.norm.weight`"):
        run(Path("bad"), chats(), "chat", "method=qlora")
