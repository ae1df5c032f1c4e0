"""`llmctl tokenize trim`: a run or a tokenizer -> its path on stdout, what changed on stderr."""

import json

import pytest

from llmctl.cli import run
from llmctl.tokenizer.load import load_tokenizer


@pytest.fixture
def text(runs):
    (runs.parent / "text.txt").write_text("the cat 7 sat on the mat.\n" * 900)
    return "text.txt"


def test_a_run_becomes_a_smaller_model_that_generates(runs, text, capsys):
    assert run(["tokenize", "trim", "runs/0001", "--keep", text, "-o", "small.safetensors", "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["path"] == "small.safetensors"
    assert record["vocab_size"] < record["vocab_size_before"]
    assert record["bytes"] < record["bytes_before"]
    assert (record["equal_texts"], record["largest_difference"]) == (1.0, 0.0)
    assert f"{record['vocab_size_before']:,} -> {record['vocab_size']:,}" in err
    assert "equal bit for bit" in err
    for model in ("runs/0001", "small.safetensors"):
        arguments = ["generate", "-m", model, "--max-tokens", "12", "-q", "--temperature", "0", "the cat"]
        assert run(arguments) == 0
    assert len(capsys.readouterr().out.strip()) > 8
    assert run(["tokenize", "trim", "runs/0001", "--keep", text, "-o", "small.safetensors", "-q"]) == 8
    out, err = capsys.readouterr()
    assert (out, err.count("error: ")) == ("", 1)
    assert "already exists" in err


def test_a_tokenizer_becomes_a_smaller_tokenizer(runs, text, capsys):
    run_folder, folder = next(runs.glob("0001*")), runs.parent / "whole"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        folder.joinpath(name).write_bytes((run_folder / name).read_bytes())
    arguments = ["tokenize", "trim", str(folder), "--keep", text, "--keep-chars", "han", "-o", "tok", "-q"]
    assert run(arguments) == 0
    assert capsys.readouterr() == ("tok\n", "")
    small, whole = load_tokenizer("tok"), load_tokenizer(folder)
    assert small.vocab_size < whole.vocab_size
    assert small.decode(small.encode("猫 <s> Ω")) == "猫 <s> Ω"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--keep-chars", "klingon"], "`--keep-chars klingon`"),
        (["--vocab-size", "5"], "`--vocab-size 5`"),
        (["--keep", "missing.txt"], "missing.txt"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(runs, text, capsys, arguments, named):
    assert run(["tokenize", "trim", "runs/0001", "--keep", text, "-o", "small", *arguments]) in (2, 3)
    out, err = capsys.readouterr()
    assert (out, err.count("error: ")) == ("", 1)
    assert named in err
    assert not (runs.parent / "small").exists()


def test_our_own_vocabulary_is_extended(runs, text, capsys):
    assert run(["tokenize", "extend", "runs/0001", "--with", text, "--add", "20", "-o", "more", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    before = record["vocab_size_before"]
    assert before < record["vocab_size"] == load_tokenizer(runs.parent / "more").vocab_size <= before + 20
    assert record["bytes_per_token"] > record["bytes_per_token_before"]


def test_a_model_gets_the_tokenizer_of_another_run(runs, text, capsys):
    assert run(["tokenize", "train", text, "-o", "other", "--vocab-size", "300"]) == 0
    capsys.readouterr()
    assert run(["tokenize", "transplant", "runs/0001", "--from", "other", "-o", "given", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == "mean"
    size = load_tokenizer(runs.parent / "other").vocab_size
    assert record["vocab_size"] == load_tokenizer(runs.parent / "given").vocab_size == size
    assert 0 < record["shared"] <= size
    assert run(["tokenize", "transplant", "runs/0001", "--from", "other", "-o", "given"]) != 0
    assert run(["tokenize", "transplant", "runs/0001", "--from", "other", "-o", "x", "--method", "best"]) == 2
    assert "`--method best` is not a method" in capsys.readouterr().err
    assert not (runs.parent / "x").exists()
    assert run(["tokenize", "transplant", "runs/0001", "--from", "other", "-o", "x", "--with", "missing.txt"]) == 3
    assert "missing.txt" in capsys.readouterr().err
    assert not (runs.parent / "x").exists()
