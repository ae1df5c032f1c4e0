"""Pairs of neighbors that become one piece."""

from collections import Counter

from llmctl.tokenizer.learn_pairs import learn


def test_the_most_frequent_pair_is_joined_first_and_counts_follow():
    words = Counter({("a", "b", "c"): 5, ("a", "b"): 4, ("b", "c"): 7, ("x", "x", "x", "x"): 2, ("q", "r"): 1})
    # (b, c) 12, then (a, b) 4 of its 9 are left, (x, x) 6; "abc" of the joined pieces 5.
    assert learn(words, set(), 3) == [("b", "c"), ("x", "x"), ("a", "bc")]
    assert learn(words, {"bc"}, 2) == [("a", "b"), ("x", "x")]
    assert ("q", "r") not in learn(words, set(), 99)
