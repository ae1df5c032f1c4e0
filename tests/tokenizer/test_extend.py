"""Vocabularies with more pieces: what they join is what the tokenizer made before."""

import json
from collections import Counter

import pytest

from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.tokenizer.extend import extend, learn
from llmctl.tokenizer.load import find_tokenizer
from tests.support.bpe import TEXTS, byte_level
from tests.support.spm import trained

NEW = ["春眠不觉晓，处处闻啼鸟。\n", "夜来风雨声，花落知多少。\n", "春风花草香，处处闻啼鸟。\n"] * 3


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("is_text", [False, True])
def test_new_pieces_join_the_old_ones_and_other_texts_keep_theirs(pre, is_text):
    files = byte_level(pre)
    content = json.loads(files["tokenizer.json"])
    if is_text:  # the older form of merges
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        files = {"tokenizer.json": json.dumps(content).encode()}
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    result = extend(tokenizer, files, NEW, 40)
    new = result.tokenizer
    assert new.vocab_size == tokenizer.vocab_size + 40
    assert sorted(result.parts) == list(range(tokenizer.vocab_size, new.vocab_size))
    for text in (*NEW[:3], *TEXTS[:1], "声声 <think> 春眠"):
        before, after = tokenizer.encode(text), new.encode(text)
        assert [old for index in after for old in result.parts.get(index, [index])] == before
        assert new.decode(after) == tokenizer.decode(before)
    for index, old in result.parts.items():
        assert new.piece_bytes(index) == b"".join(tokenizer.piece_bytes(one) for one in old)
    assert len(new.encode(NEW[0])) < len(tokenizer.encode(NEW[0])) / 2
    assert new.encode(TEXTS[0][:30]) == tokenizer.encode(TEXTS[0][:30])
    assert new.special_tokens() == tokenizer.special_tokens()


def test_the_most_frequent_pair_is_joined_first_and_counts_follow():
    words = Counter({("a", "b", "c"): 5, ("a", "b"): 4, ("b", "c"): 7, ("x", "x", "x", "x"): 2, ("q", "r"): 1})
    # (b, c) 12, then (a, b) 4 of its 9 are left, (x, x) 6; "abc" of the joined pieces 5.
    assert learn(words, set(), 3) == [("b", "c"), ("x", "x"), ("a", "bc")]
    assert learn(words, {"bc"}, 2) == [("a", "b"), ("x", "x")]
    assert ("q", "r") not in learn(words, set(), 99)


def test_other_vocabularies_and_texts_without_pairs_are_refused():
    files = byte_level()
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    with pytest.raises(UsageError, match="stand together twice"):
        extend(tokenizer, files, ["x"], 5)
    other = {"tokenizer.model": trained()}
    unigram = find_tokenizer(other)
    assert unigram is not None
    with pytest.raises(UnsupportedModelError, match="cannot be extended"):
        extend(unigram, other, NEW, 5)
