"""A server's probabilities as targets for a student's tokens."""

import math

import numpy as np
import pytest

from llmctl.config import TokenizerConfig
from llmctl.preparing.soft_targets import N_KEPT, WHOLE, SoftTargets, checked_logprobs
from llmctl.tokenizer.train import train_tokenizer
from tests.support.spm import HAN, TEXT


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, HAN] * 40, TokenizerConfig(vocab_size=400))


def token(text: str, *others: tuple[str, float]) -> dict:
    top = [[list(data.encode()), math.log(p)] for data, p in others]
    return {"bytes": list(text.encode()), "logprob": dict(others).get(text, math.log(0.5)) and top[0][1], "top": top}


def example(tokenizer, answer: str):
    prompt, ids = tokenizer.encode("Q: x"), tokenizer.encode_next(answer, after_special=False)
    whole = [*prompt, *ids, tokenizer.eos_id]
    return whole, [False] * len(prompt) + [True] * (len(ids) + 1), len(prompt)


def columns(found, place):
    ids, shares = (np.array(values).reshape(-1, N_KEPT)[place] for values in found)
    return {int(index): share / WHOLE for index, share in zip(ids, shares, strict=True) if share}


def test_alternatives_stand_for_their_first_pieces(tokenizer):
    texts = [f" {word}" for word in TEXT.split()]
    one, two, three = [text for text in texts if len(tokenizer.encode_next(text, after_special=False)) == 1][:3]
    ids, trained, first = example(tokenizer, one + two)
    first_id, second_id, third_id = (tokenizer.encode_next(text, after_special=False)[0] for text in (one, two, three))
    logs = [token(one, (one, 0.6), (three, 0.3)), token(two, (two, 0.5), (one, 0.25))]
    found = SoftTargets(tokenizer).make(ids, trained, logs)
    assert columns(found, first) == pytest.approx({first_id: 0.6, third_id: 0.3}, abs=1e-4)
    assert columns(found, first + 1) == pytest.approx({second_id: 0.5, first_id: 0.25}, abs=1e-4)
    # What the server did not write: the end, and everything before the answer.
    assert columns(found, len(ids) - 1) == {tokenizer.eos_id: 1.0}
    assert columns(found, 0) == {ids[0]: 1.0}


def test_tokens_inside_or_beyond_those_of_the_server_are_learned_from_the_data(tokenizer):
    word = " strings"
    ids, trained, first = example(tokenizer, word)
    pieces = tokenizer.encode_next(word, after_special=False)
    assert ids[first : first + len(pieces)] == pieces
    # One token for the whole word: only the first piece has a target.
    found = SoftTargets(tokenizer).make(ids, trained, [token(word, (word, 0.9))])
    assert columns(found, first) == pytest.approx({pieces[0]: 0.9}, abs=1e-4)
    for place in range(first + 1, len(ids)):
        assert columns(found, place) == {ids[place]: 1.0}
    # A token for each byte: the first one ends inside of the label, which goes on beyond it.
    logs = [token(letter, (letter, 0.7)) for letter in word]
    found = SoftTargets(tokenizer).make(ids, trained, logs)
    if tokenizer.piece_bytes(pieces[0]) != b" ":
        assert columns(found, first) == pytest.approx({pieces[0]: 0.7}, abs=1e-4)


def test_another_text_has_no_targets(tokenizer):
    ids, trained, first = example(tokenizer, " the cat")
    logs = [token(" a", (" a", 0.6)), token(" cat", (" cat", 0.5))]
    found = SoftTargets(tokenizer).make(ids, trained, logs)
    assert columns(found, first + 1) == {ids[first + 1]: 1.0}
    assert SoftTargets(tokenizer).make(ids, [False] * len(ids), logs)[1][0] == WHOLE


@pytest.mark.parametrize(
    "value", [None, "x", [1], [{"bytes": [300], "logprob": 0, "top": []}], [{"bytes": [1], "logprob": "a", "top": []}]]
)
def test_other_forms_are_none(value):
    assert checked_logprobs(value) == ()


def test_the_form_of_answers():
    good = [token("a", ("a", 0.5))]
    assert checked_logprobs(good) == tuple(good)
