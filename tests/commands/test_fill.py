"""`llmctl fill` in a shell: candidates, lines, records, and the mistakes that are answered with an error."""

import json
from functools import partial
from pathlib import Path

import pytest

from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """Return an encoder of random weights whose vocabulary is padded."""
    path = tmp_path_factory.mktemp("models") / "encoder"
    tokenizer = train_tokenizer(["a list of strings 中文，诗。\n\n"] * 20, TokenizerConfig(vocab_size=330))
    settings = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 40, "init_std": 0.4, "mask_id": 4}
    model = LanguageModel(ModelConfig(family="encoder", vocab_size=tokenizer.vocab_size + 6, **settings))
    initialize(model, 0)
    write_artifact(path, model.config, model.state_dict(), files=tokenizer.files(), provenance={})
    return str(path)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(shell):
    """Return a caller of the command: (exit code, stdout, stderr)."""
    return partial(shell, "fill")


def test_one_mask_gives_a_line_per_candidate_likeliest_first(call, encoder):
    status, out, err = call("a <mask> of", "-m", encoder, "-k", "4")
    assert status == 0
    assert err.startswith("model: ")
    lines = [line.split("\t", 1) for line in out.split("\n")[:-1]]
    assert len(lines) == 4
    assert [float(p) for p, _ in lines] == sorted((float(p) for p, _ in lines), reverse=True)
    assert all(text.startswith("a") and text.endswith(" of") for _, text in lines)
    record = json.loads(call("a <mask> of", "-m", encoder, "-k", "4", "--json", "-q")[1])
    assert [f"{entry['p']:.3f}" for entry in record["masks"][0]] == [p for p, _ in lines]


def test_all_candidates_are_lines_even_those_that_break_lines(call, encoder):
    _, out, _ = call("a <mask> of", "-m", encoder, "-q", "-k", "100000")
    _, record, _ = call("a <mask> of", "-m", encoder, "-q", "-k", "100000", "--json")
    candidates = json.loads(record)["masks"][0]
    assert any("\n" in candidate["token"] for candidate in candidates)
    assert out.count("\n") == len(candidates)


def test_lines_in_are_lines_out_and_each_is_its_own(call, encoder):
    texts = ["a <mask> of", "[MASK]", "<mask> of <mask> 中文"] * 7
    _, out, _ = call("-", "-m", encoder, "-q", stdin="\n".join(texts).encode())
    lines = out.split("\n")[:-1]
    assert len(lines) == 21
    assert lines[:3] * 7 == lines
    assert call("-", "-m", encoder, "-q", stdin=texts[2].encode())[1] == lines[2] + "\n"
    assert call("-", "-m", encoder, "-q", stdin=b"") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "stdin", "part"),
    [
        (["no mask"], None, "`no mask`"),
        (["-"], b"<mask>\n" * 20 + b"none\n", "text 21, `none`"),
        (["-"], b"<mask>\n\xff\n", "byte 7"),
        (["<mask>\udcff"], None, "byte 6"),
        (["<mask>", "-k", "0"], None, "`--top-k` is 0"),
        (["<mask>" * 60], None, "40"),
    ],
)
def test_mistakes_are_answered(call, encoder, arguments: list[str], stdin: bytes | None, part: str):
    status, _, err = call(*arguments, "-m", encoder, "-q", stdin=stdin)
    assert status == 2
    assert part in err


def test_a_sentence_encoder_is_for_similarity(shell, models, tmp_path):
    status, out, err = shell("fill", "a <mask> of", "-m", models["bert"])
    assert (status, out) == (2, "")
    assert "without a prediction head, which cannot fill" in err
    assert f"llmctl evaluate {models['bert']} -d pairs.tsv --task similarity" in err
    (tmp_path / "pairs.tsv").write_text("text\tpair\tlabel\na\tb\t1\na\ta\t5\nb\tc\t2\n")
    status, out, err = shell("evaluate", models["bert"], "-d", "pairs.tsv")
    assert status == 0
    assert "task: similarity" in err
    assert "spearman" in out
    status, _, err = shell("evaluate", models["bert"], "-d", "pairs.tsv", "--task", "mask")
    assert status == 2
    assert "without a prediction head, which cannot be measured on `mask`" in err
