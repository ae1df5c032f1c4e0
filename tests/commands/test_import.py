"""`llmctl import` as a user runs it."""

import json

from llmctl.cli import run


def test_it_prints_the_path_and_nothing_else(shared_data, tmp_path, capsys):
    source = shared_data / "models" / "stories260K" / "hf"
    out = tmp_path / "m.safetensors"
    assert run(["import", str(source), "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "260,032 parameters" in captured.err
    assert run(["import", str(source), "-o", str(out)]) == 8
    assert "already exists" in capsys.readouterr().err
    assert run(["import", str(source), "-o", str(out), "-f", "--json", "-q", "--dtype", "float16"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["architecture"] == "LlamaForCausalLM"
    assert record["dtypes"] == {"F16": 47}
    assert captured.err == ""


def test_errors_have_their_exit_code(tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(b"\x80")
    (tmp_path / "b.gguf").write_bytes(b"nonsense")
    cases = {
        ("nowhere",): 3,
        ("a.bin",): 4,
        ("b.gguf",): 4,
        ("b.gguf", "--dtype", "int3"): 2,
        (".",): 4,
    }
    for args, code in cases.items():
        arguments = ["import", str(tmp_path / args[0]), *args[1:], "-o", str(tmp_path / "out")]
        assert run(arguments) == code, args
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert "Traceback" not in captured.err
    assert run(["import", str(tmp_path)]) == 2
    assert not (tmp_path / "out").exists()
