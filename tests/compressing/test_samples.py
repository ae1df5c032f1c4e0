"""Samples of a corpus, and text that models write themselves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmctl.artifacts.load import load_model
from llmctl.compressing.samples import HELD_OUT, TRAIN, data_of, frequencies, generated, make_data, windows
from llmctl.config import CompressConfig, FinetuneDataConfig
from llmctl.recipe import load
from llmctl.training.task_data import open_task_model, prepare_task


@pytest.fixture
def corpus(models, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"the good cat {number} sat. 猫坐在垫子上。" for number in range(300)), encoding="utf-8")
    flags = {"model": str(models["decoder"]), "data.paths": [str(path)], "data.split": "line", "task": "text"}
    config = load(CompressConfig, flags=flags, environment={}).config
    return prepare_task(config, open_task_model(config, models["decoder"]), tmp_path / "data", lambda _: None)


@pytest.mark.parametrize("n_tokens", [200, 2000])
def test_a_sample_of_short_documents_has_about_the_tokens_asked_for(corpus, n_tokens: int):
    found = list(windows(corpus, corpus.train, n_tokens))
    size = sum(len(corpus.tokenizer.encode(text)) for text in found)
    assert 0.8 * n_tokens < size < 1.2 * n_tokens
    assert len(set(found)) == len(found)


def test_a_sample_larger_than_the_corpus_is_the_corpus(corpus):
    assert len(list(windows(corpus, corpus.train, 10**9))) == len(corpus.train)


def test_used_ids_are_those_of_training_documents_by_frequency(corpus):
    found = frequencies(corpus, corpus.tokenizer.vocab_size)
    ids = np.concatenate([corpus.documents.document(int(index)) for index in corpus.train])
    counts = np.bincount(ids, minlength=corpus.tokenizer.vocab_size)
    assert [counts[index] for index in found] == sorted(counts[counts > 0], reverse=True)


def test_generated_text_is_the_same_after_an_interruption(models, tmp_path):
    loaded = load_model(models["decoder"], device="cpu", dtype="float32")
    files = [generated(loaded, 6000, 1, tmp_path / name, lambda _: None) for name in ("a", "b")]
    first = [path.read_bytes() for path in files[0]]
    assert first == [path.read_bytes() for path in files[1]]
    for path in (*files[1], tmp_path / "b" / "part-00001.json"):
        path.unlink()
    assert [path.read_bytes() for path in generated(loaded, 6000, 1, tmp_path / "b", lambda _: None)] == first
    texts = [json.loads(line)["text"] for line in first[0].decode().splitlines()]
    assert len(texts) > 40


@pytest.mark.parametrize(("name", "writes"), [("decoder", True), ("encoder", True), ("encoder_decoder", False)])
def test_data_that_is_not_given_is_written_where_a_model_can(models, tmp_path, name: str, writes: bool):
    config = replace(CompressConfig(), model=str(models[name]))
    config = replace(config, plan=replace(config.plan, written_tokens=3000))
    make_data(config, tmp_path / "text", lambda _: None)
    found = data_of(config, tmp_path / "text")
    assert (found != FinetuneDataConfig()) is writes
    if writes:
        assert found.paths == (str(tmp_path / "text" / TRAIN),)
        for file in (TRAIN, HELD_OUT):
            lines = (tmp_path / "text" / file).read_text(encoding="utf-8").splitlines()
            assert lines
            assert all(json.loads(line)["text"] for line in lines)


def test_files_are_read_where_they_are(models):
    config = CompressConfig(model=str(models["decoder"]), data=FinetuneDataConfig(paths=("a.txt",)))
    make_data(config, Path("nowhere"), lambda _: None)
    assert data_of(config, Path("nowhere")) == config.data
