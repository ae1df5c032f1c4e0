"""`llmctl inspect` as a user runs it: what a file holds, without torch."""

import json
import subprocess
import sys

import pytest
import torch

from llmctl.cli import run
from llmctl.config import ModelConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.safetensors import write_safetensors
from llmctl.model.transformer import LanguageModel


@pytest.fixture
def folder(tmp_path):
    model = LanguageModel(ModelConfig(vocab_size=30, d_model=16, n_layers=1, n_heads=2, max_positions=64))
    return write_artifact(
        tmp_path / "m",
        model.config,
        model.state_dict(),
        files={"tokenizer.json": b'{"model": {"type": "BPE"}}'},
        provenance={"recipe": "7"},
    )


def test_a_person_sees_one_fact_per_line(folder, capsys):
    for path in (folder, folder / "model.safetensors"):
        assert run(["inspect", str(path), "--tensors"]) == 0
        out = capsys.readouterr().out
        for fact in (
            "architecture  LlamaForCausalLM",
            "context       64",
            "vocabulary    30",
            "tokenizer     tokenizer.json (BPE)",
            "dtypes        11 F32",
            "provenance:   recipe = 7",
            "metadata:     format = pt",
            "  model.norm.weight  F32 [16]",
        ):
            assert fact in out


def test_a_program_gets_one_object(folder, capsys):
    assert run(["inspect", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model = LanguageModel(ModelConfig(vocab_size=30, d_model=16, n_layers=1, n_heads=2))
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["bytes"] == (folder / "model.safetensors").stat().st_size
    assert record["config"]["architectures"] == ["LlamaForCausalLM"]
    assert record["provenance"] == {"recipe": "7"}
    assert "tensors" not in record
    assert run(["inspect", str(folder), "--json", "--tensors"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["model.norm.weight"] == ["F32", [16]]


def test_torch_is_not_loaded(folder, shared_data):
    gguf = shared_data / "models" / "stories260K" / "gguf" / "stories260K-q4_1.gguf"
    program = """
import sys
from llmctl.cli import run
codes = [run(["inspect", path, "--tensors"]) for path in sys.argv[1:]]
heavy = {"torch", "transformers", "accelerate"} & set(sys.modules)
sys.exit(f"{codes} {heavy}" if any(codes) or heavy else 0)
"""
    command = [sys.executable, "-c", program, str(folder), str(folder / "model.safetensors"), str(gguf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Q4_1" in done.stdout


def test_files_that_are_sound_but_no_model_of_ours(tmp_path, capsys):
    write_safetensors(tmp_path / "adapter.safetensors", {"lora_A": torch.zeros(2, 3)}, {"rank": "2"})
    assert run(["inspect", str(tmp_path / "adapter.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "parameters    6" in out
    assert "metadata:     rank = 2" in out
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    assert run(["inspect", str(tmp_path / "adapter.safetensors"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["architecture"] == "MambaForCausalLM"
    assert "does not read" in record["unread"]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.safetensors", b"", 4),
        ("a.safetensors", b"\xff" * 100, 4),
        ("a.gguf", b"GGUF" + b"\xff" * 100, 4),
        ("pytorch_model.bin", b"\x80", 4),
        ("a.txt", b"hello, this is a text", 2),
    ],
)
def test_hostile_files_end_with_one_error(name, content, code, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert run(["inspect", str(tmp_path / name)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert name in captured.err
    assert run(["inspect", str(tmp_path / "nowhere")]) == 3


def test_weights_that_do_not_fit_their_configuration(folder, capsys):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {"model.norm.weight": torch.zeros(16)}, {"format": "pt"})
    assert run(["inspect", str(folder)]) == 4
    assert "do not match its configuration" in capsys.readouterr().err


def test_nested_provenance_is_shown_as_facts_and_not_as_python(tmp_path, capsys):
    model = LanguageModel(ModelConfig(vocab_size=30, d_model=16, n_layers=1, n_heads=2, max_positions=64))
    given = {"data": {"paths": ["a.txt", "b.txt"], "n": {"rows": 3}}}
    write_artifact(tmp_path / "m", model.config, model.state_dict(), files={}, provenance=given)
    assert run(["inspect", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "provenance:   data.paths = a.txt, b.txt" in out
    assert "provenance:   data.n.rows = 3" in out
    assert "{" not in out
