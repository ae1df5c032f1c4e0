"""Equal documents stay on one side of the split, and what is left out of a corpus is counted."""

import json
from pathlib import Path

import pytest

from llmctl.config import DataConfig, PretrainConfig, TokenizerConfig
from llmctl.data.shards import Part
from llmctl.preparing.corpus import Corpus, prepare_corpus, sample_held_out
from llmctl.preparing.tokenize import encode_corpus, write_tokenizer
from llmctl.recipe import load
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import find_tokenizer
from llmctl.tokenizer.train import train_tokenizer
from tests.support.spm import folder_files, sentences


def documents(path: Path, texts: list[object]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(tmp_path: Path, *settings: str) -> tuple[Corpus, list[str]]:
    config = load(PretrainConfig, settings=["tokenizer.vocab_size=300", *settings], environment={}).config
    said: list[str] = []
    return prepare_corpus(config, tmp_path / "data", None, said.append), said


def sides(corpus: Corpus) -> tuple[list[str], list[str]]:
    shards = corpus.targets or corpus.documents
    return tuple(
        [corpus.tokenizer.decode(shards.document(int(index)).tolist()) for index in part]
        for part in (corpus.train, corpus.held_out)
    )


def test_the_split_of_different_documents_is_what_it_was(tmp_path):
    path = documents(tmp_path / "a.jsonl", [f"text {number}" for number in range(60)])
    corpus, said = prepared(tmp_path, f"data.paths=[{path}]")
    assert corpus.held_out.tolist() == sample_held_out(60, 0.05, 0).tolist()
    assert not [line for line in said if line.startswith("data:")]


def test_equal_documents_are_on_one_side_of_the_split(tmp_path):
    path = documents(tmp_path / "a.jsonl", [f"text {number % 40}" for number in range(400)])
    corpus, said = prepared(tmp_path, f"data.paths=[{path}]")
    train, held_out = sides(corpus)
    assert len(train) + len(held_out) == 400
    assert len(held_out) == 20
    assert not set(train) & set(held_out)
    assert any("360 of 400 documents are copies" in line and "same side" in line for line in said)


def test_equal_documents_of_shards_are_on_one_side_too(tmp_path):
    texts = [f"{'text ' * 40} {number % 40}" for number in range(400)]
    path, folder = documents(tmp_path / "a.jsonl", texts), tmp_path / "tokenizer"
    write_tokenizer(folder, train_tokenizer(texts, TokenizerConfig(vocab_size=300)))
    encode_corpus([str(path)], str(folder), DataConfig(), tmp_path / "shards", part=Part(), workers=1)
    corpus, said = prepared(tmp_path, f"data.paths=[{tmp_path / 'shards'}]")
    train, held_out = sides(corpus)
    assert len(held_out) == 20
    assert not set(train) & set(held_out)
    assert any("360 of 400 documents are copies" in line for line in said)


@pytest.mark.parametrize("setting", ["data.val_tail=true", "data.val_paths=[{path}]"])
def test_copies_on_both_sides_of_a_given_split_are_counted(tmp_path, setting: str):
    path = documents(tmp_path / "a.jsonl", [f"text {number % 5}" for number in range(40)])
    _, said = prepared(tmp_path, f"data.paths=[{path}]", setting.format(path=path))
    assert any("held-out documents are also in the training data" in line for line in said)


def test_rows_without_text_are_counted(tmp_path):
    path = documents(tmp_path / "a.jsonl", ["a b", "", None, *[f"c {number}" for number in range(30)]])
    assert "data: 2 documents have no text and are left out" in prepared(tmp_path, f"data.paths=[{path}]")[1]
    (tmp_path / "p.tsv").write_text("".join(f"a {number}\tb\n" for number in range(30)) + "\tb\n")
    said = prepared(tmp_path, "objective=seq2seq", f"data.paths=[{tmp_path / 'p.tsv'}]")[1]
    assert "data: 1 pairs have no text and are left out" in said


def test_held_out_pairs_that_are_trained_on_are_counted(tmp_path):
    (tmp_path / "p.tsv").write_text("".join(f"a {number}\tb\n" for number in range(30)))
    (tmp_path / "v.tsv").write_text("a 1\tb\nz\tb\n")
    given = [f"data.paths=[{tmp_path / 'p.tsv'}]", f"data.val_paths=[{tmp_path / 'v.tsv'}]"]
    said = prepared(tmp_path, "objective=seq2seq", *given)[1]
    assert any("1 held-out" in line for line in said)


def test_targets_are_encoded_with_their_own_model_and_language(tmp_path):
    targets = list(sentences())[:40]
    (tmp_path / "p.tsv").write_text("".join(f"the cat {n}\t{text}\n" for n, text in enumerate(targets)))
    settings = ["objective=seq2seq", f"data.paths=[{tmp_path / 'p.tsv'}]"]
    for name, config in {"Marian": {}, "MBart50": {"src_lang": "en_XX", "tgt_lang": "de_DE"}}.items():
        tokenizer = find_tokenizer(folder_files(name, **config))
        corpus = prepare_corpus(
            load(PretrainConfig, settings=settings).config, tmp_path / name, tokenizer, lambda _: None
        )
        as_sources = 0
        for number, text in enumerate(targets):
            source, target = (side.document(number).tolist() for side in (corpus.documents, corpus.targets))
            assert source == around(tokenizer, f"the cat {number}")
            assert target == around(tokenizer.for_target, text)
            as_sources += target == around(tokenizer, text)
        assert as_sources < len(targets)


def around(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.frame("encoder_decoder").before, *tokenizer.encode(text)]
