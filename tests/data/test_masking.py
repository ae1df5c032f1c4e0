"""What is hidden can be put back, in the asked shares, and never crosses what it must not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.data.masking import IGNORE, Masking, choose_words, mask_tokens, random_lengths, remove_spans

SPECIAL = np.zeros(100, dtype=bool)
SPECIAL[:5] = True
MASK = 4


def test_masking_hides_exactly_the_share_and_labels_what_it_hid():
    tokens = np.random.default_rng(0).integers(5, 100, 1000)
    inputs, labels = mask_tokens(tokens, np.random.default_rng(1), Masking(MASK, 0.15, SPECIAL))
    chosen = labels != IGNORE
    assert chosen.sum() == 150
    assert (labels[chosen] == tokens[chosen]).all()
    assert (inputs[~chosen] == tokens[~chosen]).all()


def test_of_the_chosen_eighty_become_masks_and_ten_stay():
    tokens = np.random.default_rng(0).integers(5, 100, 200_000)
    inputs, labels = mask_tokens(tokens, np.random.default_rng(1), Masking(MASK, 0.15, SPECIAL))
    chosen = labels != IGNORE
    masked = (inputs[chosen] == MASK).mean()
    kept = (inputs[chosen] == tokens[chosen]).mean()
    assert abs(masked - 0.8) < 0.01
    # one swap in 95 draws the token that stood there
    assert abs(kept - (0.1 + 0.1 / 95)) < 0.01
    assert not SPECIAL[inputs[chosen & (inputs != MASK)]].any()


def test_special_tokens_are_never_chosen():
    tokens = np.array([1, 50, 2, 1, 60, 2])
    for seed in range(50):
        _, labels = mask_tokens(tokens, np.random.default_rng(seed), Masking(MASK, 0.5, SPECIAL))
        assert (labels[[0, 2, 3, 5]] == IGNORE).all()
        assert (labels != IGNORE).sum() == 1


def test_nothing_to_mask_is_no_error():
    inputs, labels = mask_tokens(np.array([1, 2]), np.random.default_rng(0), Masking(MASK, 0.5, SPECIAL))
    assert inputs.tolist() == [1, 2]
    assert (labels == IGNORE).all()


def test_whole_words_are_chosen_whole():
    starts = np.zeros(100, dtype=bool)
    starts[50:] = True  # tokens from 50 on start a word, 5..49 continue one
    tokens = np.array([50, 5, 6, 60, 70, 7, 80, 51, 8, 9, 10, 61])
    words = [{0, 1, 2}, {3}, {4, 5}, {6}, {7, 8, 9, 10}, {11}]
    for seed in range(30):
        masking = Masking(MASK, 0.4, SPECIAL, starts)
        _, labels = mask_tokens(tokens, np.random.default_rng(seed), masking)
        chosen = set(np.flatnonzero(labels != IGNORE).tolist())
        assert chosen == set().union(*(word for word in words if word & chosen))
        assert chosen


def test_a_special_token_ends_a_word():
    starts = np.zeros(100, dtype=bool)
    candidates = np.array([0, 1, 3, 4])
    chosen = choose_words(np.array([5, 6, 1, 7, 8]), candidates, 2, np.random.default_rng(0), starts)
    assert chosen.tolist() in ([0, 1], [3, 4])


@given(st.integers(1, 300), st.integers(0, 1000), st.floats(0.05, 0.6), st.floats(1, 8))
def test_spans_put_back_give_the_text(n_tokens: int, seed: int, frac: float, mean: float):
    tokens = np.random.default_rng(seed).integers(100, 200, n_tokens)
    sentinels = np.arange(30)
    source, target = remove_spans(
        tokens, np.random.default_rng(seed), sentinels=sentinels, frac=frac, mean_span_tokens=mean
    )
    cut: dict[int, list[int]] = {}
    for token in target.tolist():
        cut[token] = [] if token < 30 else cut.get(token, [])
        if token < 30:
            current = token
        else:
            cut.pop(token, None)
            cut[current].append(token)
    restored = [token for item in source.tolist() for token in (cut[item] if item < 30 else [item])]
    assert restored == tokens.tolist()
    used = [token for token in source.tolist() if token < 30]
    assert used == list(range(len(used)))
    n_cut = len(target) - len(used)
    assert n_cut == min(max(round(n_tokens * frac), 1), max(n_tokens - 1, 1))


@pytest.mark.parametrize(("total", "parts"), [(10, 3), (5, 5), (7, 1), (0, 1), (2, 4)])
def test_lengths_add_up(total: int, parts: int):
    lengths = random_lengths(total, parts, np.random.default_rng(0))
    assert lengths.sum() == total
    assert len(lengths) == parts
    assert total < parts or (lengths > 0).all()
