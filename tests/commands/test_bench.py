"""`llmctl bench`: every figure is there and adds up; what cannot be measured is refused."""

import json

import pytest

from llmctl.benchmarking.bench import read_per_token
from llmctl.benchmarking.random_models import random_model
from llmctl.cli import run
from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer

SHAPE = {"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 128, "max_positions": 32}
SHORT = ["--prompt", "4", "-n", "3", "--batch", "1,2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def folder(path, files=None, **fields):
    model = LanguageModel(ModelConfig(**(SHAPE | fields)))
    initialize(model, 0)
    write_artifact(path, model.config, model.state_dict(), files=files or {}, provenance={})
    return str(path)


def test_two_models_side_by_side(tmp_path, capsys):
    names = [folder(tmp_path / "a"), folder(tmp_path / "b", n_layers=1, positions="relative")]
    assert run(["bench", *names, *SHORT, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    first, second = record["models"]
    assert [first["name"], second["name"]] == names
    assert [found["batch"] for found in first["batches"]] == [1, 2]
    assert all(found["decode_ratio"] == found["prefill_ratio"] == 1 for found in first["batches"])
    for one, other in zip(first["batches"], second["batches"], strict=True):
        ratio = other["decode_tokens_per_second"] / one["decode_tokens_per_second"]
        assert other["decode_ratio"] == pytest.approx(ratio)
    assert first["read_bytes_per_token"] > second["read_bytes_per_token"]
    assert 0 < first["roofline_frac"] < 1
    assert first["cold_seconds"] is None


def test_keys_and_values_of_both_kinds_side_by_side(tmp_path, capsys):
    name = folder(tmp_path / "a")
    assert run(["bench", name, *SHORT, "--kv", "float,int8", "--cold", "--json"]) == 0
    plain, coded = json.loads(capsys.readouterr().out)["models"]
    assert [plain["name"], coded["name"]] == [name, f"{name} kv int8"]
    positions = 2 * 2 * 2 * (4 + 3)  # layers, keys and values, heads, tokens
    assert [found["cache_bytes"] for found in plain["batches"]] == [positions * 4 * 32, 2 * positions * 4 * 32]
    assert [found["cache_bytes"] for found in coded["batches"]] == [positions * 36, 2 * positions * 36]
    assert coded["cold_seconds"] > 0


def test_a_text_tells_what_writing_costs(tmp_path, capsys):
    tokenizer = train_tokenizer(["a list of strings\n"] * 20, TokenizerConfig(vocab_size=300))
    name = folder(tmp_path / "a", files=tokenizer.files(), vocab_size=tokenizer.vocab_size, bos_id=2)
    (tmp_path / "text.txt").write_text("a list of strings\n" * 30)
    arguments = ["bench", name, *SHORT, "--kv", "float,int8", "-d", str(tmp_path / "text.txt")]
    assert run([*arguments, "--json"]) == 0
    plain, coded = (model["loss"] for model in json.loads(capsys.readouterr().out)["models"])
    assert plain["n_tokens"] == coded["n_tokens"] > 40
    assert plain["read"] == coded["read"] == pytest.approx(plain["written"], abs=1e-4)
    assert coded["written"] != plain["written"]
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 79 for line in lines)
    assert sum("top-1 agreement" in line for line in lines) == 2


def test_a_person_reads_a_table(tmp_path, capsys):
    names = [folder(tmp_path / ("a" * 60))]
    assert run(["bench", *names, *SHORT, "--cold"]) == 0
    streams = capsys.readouterr()
    assert all(len(line) <= 79 for line in streams.out.splitlines())
    assert "cold" in streams.out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "w8a8", "int4", "int4-sym", "int3"])
def test_random_models_hold_what_they_are_named_after(precision: str):
    config = ModelConfig(**SHAPE)
    blocks = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "w8a8": 8, "int4": 4, "int4-sym": 4, "int3": 3}[precision]
    expected = (blocks * bits + 64 * 64 * max(8, bits)) / 8
    assert expected < read_per_token(random_model(config, precision)) < 1.25 * expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "30M", "--scheme", "int7"], "`--scheme int7` is not supported"),
        (["--shape", "30M", "--batch", "one"], "`--batch one`"),
        (["--shape", "30M", "--batch", "0"], "`--batch` is 0"),
        (["--shape", "30M", "-d", "text.txt"], "`--shape 30M` has random weights"),
        (["--shape", "30M", "--kv", "int3"], "`--kv int3` is not supported"),
        (["--shape", "30M", "-n", "0"], "`--tokens` is 0"),
        (["--shape", "30M", "-n", "4000"], "the model's context is 2048".replace("the model", "a model")),
        (["--shape", "bert-base"], "is an encoder, which cannot generate"),
        (["--shape", "no-such-shape"], "no-such-shape"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, words: str, capsys):
    assert run(["bench", *arguments]) in (2, 3)
    assert words in capsys.readouterr().err
