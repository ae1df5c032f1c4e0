"""`llmctl evaluate` in a shell: tables, records, the gate's exit code, and mistakes that are answered with an error."""

import json
from functools import partial
from pathlib import Path

import pytest

from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.converting.convert import export_model
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with tiny models of random weights: decoders a and b, an encoder, a classifier `sorter`."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a list of strings 中文，诗。\n\n"] * 20, TokenizerConfig(vocab_size=330))
    other = train_tokenizer(["the strings that it returns"] * 20, TokenizerConfig(vocab_size=300))
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 40, "init_std": 0.4}
    sorter = {"family": "encoder", "n_labels": 2, "labels": ("bad", "good")}
    for seed, (name, fields) in enumerate(
        {"a": {}, "b": {}, "other": {}, "encoder": {"family": "encoder"}, "sorter": sorter}.items()
    ):
        used = other if name == "other" else tokenizer
        model = LanguageModel(ModelConfig(vocab_size=used.vocab_size, mask_id=4, **shape, **fields))
        initialize(model, seed)
        write_artifact(folder / name, model.config, model.state_dict(), files=used.files(), provenance={})
    export_model(folder / "b", folder / "b.safetensors", to="single")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(models, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "t.txt").write_text("a list of strings 中文，诗。\n" * 9)
    (tmp_path / "dev.tsv").write_text("a list\tgood\n诗\tbad\nstrings\tgood\n")
    return tmp_path


@pytest.fixture
def call(shell):
    """Return a caller of the command: (exit code, stdout, stderr)."""
    return partial(shell, "evaluate")


def test_models_stand_side_by_side(call):
    status, out, err = call("a", "b.safetensors", "-d", "t.txt")
    assert status == 0, err
    header, *lines = out.splitlines()
    assert header.split()[:3] == ["model", "perplexity", "loss"]
    assert [line.split()[0] for line in lines] == ["a", "b.safetensors"]
    assert "task: text" in err
    record = json.loads(call("a", "b.safetensors", "-d", "t.txt", "--json", "-q")[1])
    assert (record["task"], record["metric"], record["higher_is_better"]) == ("text", "perplexity", False)
    shown = [float(line.split()[1]) for line in lines]
    assert [model["figures"]["perplexity"] for model in record["models"]] == pytest.approx(shown, rel=1e-5)


def test_nothing_is_said_where_that_is_asked_for(call):
    status, out, err = call("a", "-d", "t.txt", "-q")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 2


def test_a_table_without_a_header(call):
    status, out, err = call("sorter", "-d", "dev.tsv", "--set", "columns.names=text,label", "--json")
    assert status == 0, err
    record = json.loads(out)
    assert (record["task"], record["models"][0]["n_rows"]) == ("classify", 3)
    assert record["models"][0]["figures"]["accuracy"] in (
        0.0,
        pytest.approx(1 / 3, 1e-4),
        pytest.approx(2 / 3, 1e-4),
        1.0,
    )
    limited = call("sorter", "-d", "dev.tsv", "--set", "columns.names=text,label", "--json", "--limit", "2", "-q")[1]
    assert json.loads(limited)["models"][0]["n_rows"] == 2


def test_the_gate_speaks_after_the_table(call):
    first = json.loads(call("a", "b", "-d", "t.txt", "--json", "-q")[1])["models"]
    worse, better = sorted(first, key=lambda model: -model["figures"]["perplexity"])
    arguments = (better["model"], worse["model"], "-d", "t.txt", "--max-drop", "0.01%")
    status, out, err = call(*arguments)
    assert status == 10
    assert len(out.splitlines()) == 3
    assert f"`{worse['model']}`" in err.split("error:")[1]
    assert err.split("error:")[1].strip().splitlines()[1:] == ["", "hint: raise `--max-drop` to accept it"]
    status, out, _ = call(worse["model"], better["model"], "-d", "t.txt", "--max-drop", "0", "--json")
    assert status == 0
    assert len(json.loads(out)["models"]) == 2


def test_another_figure_may_be_the_main_one(call):
    _, out, _ = call("a", "other", "-d", "t.txt", "--metric", "bits_per_byte", "-q")
    assert out.split()[1] == "bits_per_byte"
    assert "tokenizers differ" in call("a", "other", "-d", "t.txt")[2]
    assert "tokenizers differ" not in call("a", "b", "-d", "t.txt")[2]
    assert "tokenizers differ" not in call("a", "other", "-d", "t.txt", "--metric", "bits_per_byte")[2]


@pytest.mark.parametrize("columns", [30, 60, 80, 200])
def test_a_narrow_terminal_keeps_the_main_figure(call, monkeypatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = call("a", "-d", "t.txt", "-q")
    assert out.split()[:2] == ["model", "perplexity"]
    assert max(map(len, out.splitlines())) <= columns


def test_the_newest_model_and_the_embedded_corpus(runs, call):
    status, out, err = call("--limit", "2")
    assert status == 0, err
    assert "0002" in err, "the newest finished run"
    assert "built-in corpus" in err
    assert out.split()[:2] == ["model", "accuracy"], "it is an encoder"
    status, out, err = call("0001", "--limit", "2", "--json")
    assert status == 0, err
    assert json.loads(out)["task"] == "text"


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        (["nowhere"], 3, ["`nowhere`"]),
        (["a", "t.txt"], 2, ["`t.txt` is not a model", "-d t.txt"]),
        (["a", "-d", "nowhere.txt"], 3, ["nowhere.txt"]),
        (["a", "--task", "classify", "-d", "dev.tsv"], 2, ["cannot be measured on `classify`", "text"]),
        (["a", "--task", "tex"], 2, ["`tex`", "text"]),
        (["a", "--task", "qa"], 2, ["`a` is a decoder model, and `--task qa` needs data", "question"]),
        (
            ["sorter"],
            2,
            ["`sorter` is a classifier, and `--task classify` needs data", "`llmctl runs` lists other models"],
        ),
        (["sorter", "--task", "text"], 2, ["a classification head, which cannot", "`llmctl runs` lists other models"]),
        (["a", "--max-drop", "1%"], 2, ["one"]),
        (["a", "b", "--max-drop", "much"], 2, ["much"]),
        (["a", "-d", "t.txt", "--device", "gpu"], 2, ["gpu"]),
        (["a", "-d", "t.txt", "--limit", "many"], 2, ["many"]),
        (["a", "--set", "columns.txt=x"], 2, ["columns.txt", "columns.text"]),
        (["sorter", "-d", "dev.tsv"], 2, ["line 2", "columns.names=text,label"]),
        (["a", "--tasks", "piqa", "--max-drop", "1"], 2, ["--max-drop"]),
        (["encoder", "--tasks", "piqa"], 2, ["an encoder", "--task"]),
    ],
)
def test_mistakes_are_answered(call, arguments: list[str], status: int, parts: list[str]):
    got, out, err = call(*arguments)
    assert (got, out) == (status, ""), err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def test_what_was_cut_or_empty_is_said(call, elsewhere):
    (elsewhere / "long.jsonl").write_text(
        '{"text": "%s", "label": "good"}\n{"text": "", "label": "bad"}\n' % ("诗 " * 99)
    )
    status, _, err = call("sorter", "-d", "long.jsonl")
    assert status == 0, err
    assert "1 of 2 inputs are longer" in err
    assert "1 of 2 inputs are empty" in err


def test_documents_without_text_are_counted_once(call, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a list of strings"}\n{"text": ""}\n{"text": ""}\n')
    for models in (["a"], ["a", "b.safetensors"], ["encoder"]):
        status, _, err = call(*models, "-d", "rows.jsonl")
        assert status == 0, err
        assert err.count("data: 2 documents have no text and are left out\n") == 1
    assert "left out" not in call("a", "-d", "t.txt")[2]
    status, _, err = call("a", "-d", "-", stdin=b"a list\n")
    assert (status, "left out" in err) == (0, False)


@pytest.mark.parametrize("command", ["quantize", "distill"])
def test_a_newest_run_that_is_a_classifier_is_named(shell, command):
    status, _, err = shell(command, "sorter", "--steps", "1")
    assert status == 2
    assert "`sorter` is a classifier, and `--task classify` needs data" in err


def test_a_classifier_is_not_pretrained(shell):
    status, _, err = shell("pretrain", "t.txt", "-m", "sorter", "--steps", "1")
    assert status == 2
    assert "`sorter` is a classifier, `--objective clm` needs a language modeling head" in err
