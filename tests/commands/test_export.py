"""`llmctl export` as a user runs it."""

import json
import subprocess
import sys

import pytest

from llmctl.cli import run
from llmctl.config import ModelConfig
from llmctl.formats.artifact_write import write_artifact
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
    assert run(["export", str(folder), "--to", "hf"]) == 2
    assert "-o" in capsys.readouterr().err
    assert run(["export", str(folder), "--to", "single", "-o", out, "--type", "q4_0"]) == 2
    assert "hint: use `--to gguf`" in capsys.readouterr().err


def test_a_gguf_file_and_what_was_proved(models, tmp_path, capsys):
    pytest.importorskip("gguf", reason="pip install gguf")
    out = tmp_path / "m.gguf"
    assert run(["export", str(models["decoder"]), "--to", "gguf", "--type", "q4_k", "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "rows of 32 do not divide into blocks of Q4_K" in captured.err
    assert "KL" in captured.err
    assert run(["export", str(models["decoder"]), "--to", "gguf", "-f", "-o", str(out), "--json", "-q"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert captured.err == ""
    assert (record["type"], record["bytes"]) == ("f16", out.stat().st_size)
    assert 16 <= record["bits_per_weight"] < 16.5
    assert record["proof"]["logits_max_difference"] == 0
    assert run(["import", str(out), "-o", str(tmp_path / "back"), "-q"]) == 0


def test_what_is_no_gguf_has_its_exit_code(folder, models, tmp_path, capsys):
    pytest.importorskip("gguf", reason="pip install gguf")
    out = tmp_path / "m.gguf"
    (tmp_path / "there.gguf").write_bytes(b"")
    cases = [
        (models["decoder"], ["--type", "q2"], 2, "q4_K"),
        (models["decoder"], ["-o", str(tmp_path / "m.bin")], 2, "X.gguf"),
        (tmp_path / "nowhere", [], 3, "nowhere"),
        (models["encoder"], [], 4, "nomic-embed's, which is not exported as GGUF"),
        (folder, [], 4, "no tokenizer"),
        (models["decoder"], ["-o", str(tmp_path / "there.gguf")], 8, "already exists"),
    ]
    for model, flags, code, message in cases:
        assert run(["export", str(model), "--to", "gguf", "-o", str(out), *flags]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert message in captured.err
        assert "hint: " in captured.err
    assert not out.exists()


def test_without_the_package_the_extra_is_named(models, tmp_path):
    program = "import sys; sys.modules['gguf'] = None; from llmctl.cli import run; sys.exit(run(sys.argv[1:]))"
    command = ["export", str(models["decoder"]), "--to", "gguf", "-o", str(tmp_path / "m.gguf")]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "pip install gguf" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.interop
def test_an_onnx_file_and_what_was_proved(models, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime", reason="pip install '.[onnx]'")
    monkeypatch.chdir(tmp_path)
    assert run(["export", str(models["bert"]), "--to", "onnx"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "bert-onnx\n"
    assert "outputs of 7 padded texts within" in captured.err
    assert "bert-onnx/onnx/model.onnx: float32, opset 17" in captured.err
    assert run(["export", str(models["bert"]), "--to", "onnx", "--int8", "-o", "bert-onnx", "--json", "-q"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert captured.err == ""
    assert (record["type"], record["file"]) == ("int8", "bert-onnx/onnx/model_quantized.onnx")
    assert record["bytes"] == (tmp_path / record["file"]).stat().st_size
    assert 0.9 < record["proof"]["cosine"] < 1
    assert record["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert run(["export", str(models["bert"]), "--to", "onnx", "--int8", "-o", "bert-onnx"]) == 8


def test_flags_of_another_format(folder, models, tmp_path, capsys):
    out = str(tmp_path / "out")
    cases = [
        (folder, ["hf", "--int8"], 2, "`--int8` applies to `--to onnx`", "llmctl quantize --bits 8"),
        (folder, ["gguf", "--int8"], 2, "`--int8` applies to `--to onnx`", "--type q8_0"),
        (folder, ["onnx", "--type", "q8_0"], 2, "applies to `--to gguf`", "omit `--type`"),
        (folder, ["onnx"], 4, "is a decoder, which is not exported as ONNX", "--to gguf"),
        (models["encoder_decoder"], ["onnx"], 4, "is an encoder-decoder", "--to hf"),
    ]
    for model, flags, code, message, hint in cases:
        assert run(["export", str(model), "-o", out, "--to", *flags]) == code
        captured = capsys.readouterr()
        assert message in captured.err
        assert hint in captured.err.partition("hint: ")[2]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_a_package_of_onnx_the_extra_is_named(package, models, tmp_path):
    if package == "onnxruntime":
        pytest.importorskip("onnx", reason="pip install '.[onnx]'")
    program = f"import sys; sys.modules[{package!r}] = None; from llmctl.cli import run; sys.exit(run(sys.argv[1:]))"
    command = ["export", str(models["bert"]), "--to", "onnx", "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert f"pip install {package}\n" in done.stderr
    assert list(tmp_path.iterdir()) == []
