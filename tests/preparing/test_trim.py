"""Counting the pieces of a corpus, and what a trimmed vocabulary changes on the rest of it."""

import pytest

from llmctl.config import TokenizerConfig
from llmctl.errors import UsageError
from llmctl.preparing.trim import HELD_OUT_EVERY, PASSAGE, Usage, compare, count, of_scripts, passages, trimmed
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.train import train_tokenizer

LINES = [f"the cat {n} sat on the mat and {n * n} strings 猫坐在垫子上 {'the end ' * 50}\n" for n in range(120)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*LINES, "ein Frosch fragt seinen Lehrer\n" * 20], TokenizerConfig(vocab_size=520))


def test_passages_end_at_lines_and_join_to_the_documents():
    documents = ["a\n" * 900 + "b", "", "c" * 1000, "d\n\n"]
    found = list(passages(documents))
    assert "".join(found) == "".join(documents)
    assert all(len(text) >= PASSAGE for text in found[:4])
    assert found[0] == "a\n" * (PASSAGE // 2)


def test_one_passage_in_twenty_is_held_out(tokenizer):
    usage = count(tokenizer, ["".join(LINES)])
    assert usage.is_held_out
    assert usage.texts == LINES[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    counted = [line for line in LINES if line not in usage.texts]
    assert sum(usage.counts.values()) == sum(map(len, tokenizer.encode_batch(counted)))
    first, second = usage.ranked[:2]
    assert usage.counts[first] >= usage.counts[second]


def test_of_few_passages_none_is_held_out(tokenizer):
    usage = count(tokenizer, LINES[:3])
    assert (usage.texts, usage.is_held_out) == (LINES[:3], False)
    assert sum(usage.counts.values()) == sum(map(len, tokenizer.encode_batch(LINES[:3])))


def test_pieces_of_a_script_are_kept_without_text_of_it(tokenizer):
    usage = count(tokenizer, ["one\n"] * 3)
    bare = trimmed(tokenizer, tokenizer.files(), usage)
    latin = trimmed(tokenizer, tokenizer.files(), usage, more=of_scripts(tokenizer, ["latin"]))
    both = trimmed(tokenizer, tokenizer.files(), usage, more=of_scripts(tokenizer, ["Latin", "han"]))
    german, chinese = "ein Frosch fragt 144", "猫坐在垫子上"
    for result, n_equal in ((bare, 0), (latin, 1), (both, 2)):
        equal = [
            [result.kept[index] for index in result.tokenizer.encode(text)] == tokenizer.encode(text)
            for text in (german, chinese)
        ]
        assert equal == [number < n_equal for number in range(2)]
    assert len(bare.kept) < len(latin.kept) < len(both.kept) == tokenizer.vocab_size
    with pytest.raises(UsageError, match="no letter of this script") as error:
        list(of_scripts(tokenizer, ["latin", "klingon"]))
    assert error.value.hint == "most of its letters are of: latin, han"


def test_the_comparison_counts_texts_tokens_and_bytes(tokenizer):
    usage = count(tokenizer, LINES[:40])
    result = trimmed(tokenizer, tokenizer.files(), usage)
    texts = [LINES[0], "ein Frosch fragt"]
    found, equal = compare(tokenizer, result, Usage(usage.counts, texts))
    old = tokenizer.encode_batch(texts)
    assert equal == old[:1]
    assert (found.n_texts, found.equal_texts) == (2, 0.5)
    assert found.equal_tokens == sum(index in result.kept for ids in old for index in ids) / sum(map(len, old)) < 1
    n_bytes = len("".join(texts).encode())
    assert found.bytes_per_token_before == n_bytes / sum(map(len, old))
    assert found.bytes_per_token == n_bytes / sum(map(len, result.tokenizer.encode_batch(texts)))
    assert (found.vocab_size_before, found.vocab_size) == (tokenizer.vocab_size, len(result.kept))
