"""Each figure equals the textbook's: loops written out here, values worked out by hand, and libraries where installed."""

import math
import random

import numpy as np
import pytest

from llmctl.metrics import scores


def test_accuracy():
    assert scores.accuracy([1, 2, 0], [1, 0, 0]) == pytest.approx(2 / 3)
    assert scores.accuracy(np.array([[1], [0]]), np.array([[1], [1]])) == 0.5
    assert scores.accuracy([[1, 0], [1, 1]], [[1, 0], [0, 1]]) == 0.5, "all labels of a row count together"
    assert math.isnan(scores.accuracy([], []))


def confusion_f1(found, wanted, label) -> float:
    true = sum(f == label and w == label for f, w in zip(found, wanted, strict=True))
    precision = true / max(1, sum(f == label for f in found))
    recall = true / max(1, sum(w == label for w in wanted))
    return 2 * precision * recall / (precision + recall) if true else 0.0


@pytest.mark.parametrize("n_labels", [2, 3, 5])
def test_f1(n_labels: int):
    draw = random.Random(n_labels)
    found, wanted = ([draw.randrange(n_labels) for _ in range(60)] for _ in range(2))
    labels = [1] if n_labels == 2 else range(n_labels)
    expected = sum(confusion_f1(found, wanted, label) for label in labels) / len(labels)
    assert scores.f1_score(found, wanted, n_labels) == pytest.approx(expected)
    column = np.array(found)[:, None], np.array(wanted)[:, None]
    assert scores.f1_score(*column, n_labels) == pytest.approx(expected)


def test_f1_of_several_labels_and_of_labels_that_are_missing():
    found = np.array([[1, 0, 1], [1, 1, 0]])
    wanted = np.array([[1, 0, 0], [0, 1, 0]])
    assert scores.f1_score(found, wanted, 3) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores.f1_score(np.array([[1, 0], [1, 1]]), np.array([[1, 0], [0, 1]]), 2) == pytest.approx((2 / 3 + 1) / 2)
    assert scores.f1_score([0, 0], [0, 0], 4) == 1.0, "labels that are nowhere take no part"
    assert scores.f1_score([0, 0], [0, 0], 2) == 0.0, "the positive label is nowhere"


def test_matthews():
    # Two labels: (TP TN - FP FN) / sqrt(...), with TP 6, FN 2, FP 1, TN 3.
    wanted = [1] * 8 + [0] * 4
    found = [1] * 6 + [0] * 2 + [1] + [0] * 3
    expected = (6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 5 * 4)
    assert scores.matthews(found, wanted) == pytest.approx(expected)
    assert scores.matthews([0, 1, 2, 2], [0, 1, 2, 2]) == pytest.approx(1.0)
    assert scores.matthews([1, 1, 1], [0, 1, 1]) == 0.0
    # Three labels: the correlation of indicator matrices, by its definition.
    draw = np.random.default_rng(0)
    x, y = draw.integers(3, size=50), draw.integers(3, size=50)
    a, b = np.eye(3)[x], np.eye(3)[y]

    def cov(p, q):
        return float(((p - p.mean(0)) * (q - q.mean(0))).sum())

    assert scores.matthews(x, y) == pytest.approx(cov(a, b) / math.sqrt(cov(a, a) * cov(b, b)))


def test_correlations():
    # Anscombe's first set: 0.816.
    x = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
    y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]
    assert scores.pearson(x, y) == pytest.approx(0.81642, abs=1e-5)
    assert scores.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert scores.spearman(x, y) == pytest.approx(0.81818, abs=1e-5)
    assert scores.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]
    # With ties, 1 - 6 sum(d^2) / (n (n^2 - 1)) does not hold; the correlation of the shared ranks is the definition.
    assert scores.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1]
    )
    assert scores.spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1.0)
    assert math.isnan(scores.pearson([1, 1], [1, 2]))
    assert math.isnan(scores.spearman([1], [1]))


def test_answers():
    assert scores.normal_answer("  The  “Eiffel” Tower, an icon! ") == "eiffel tower icon"
    assert scores.exact_match(["the cat.", "dog", "北京。"], [["Cat"], ["a bird", "Dog!"], ["北 京"]]) == 1.0
    assert scores.exact_match(["cats"], [["cat"]]) == 0.0
    assert scores.token_f1(["in the year 1999"], [["1999"]]) == pytest.approx(2 * 1 / (3 + 1))
    assert scores.token_f1(["在北京"], [["北京市", "上海"]]) == pytest.approx(2 * 2 / 6)
    assert scores.token_f1(["", "x"], [[""], [""]]) == 0.5, "no answer is right where none is wanted"


def textbook_lcs(a, b) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_longest_common_subsequence_equals_the_table():
    draw = random.Random(0)
    for _ in range(200):
        a, b = ([draw.choice("abcde") for _ in range(draw.randrange(90))] for _ in range(2))
        assert scores.lcs_length(a, b) == textbook_lcs(a, b)


def test_rouge_l():
    # Lin 2004, section 3.1: "police killed the gunman" against "police kill the gunman" and "the gunman kill police".
    assert scores.rouge_l(["police kill the gunman"], [["police killed the gunman"]]) == pytest.approx(0.75)
    assert scores.rouge_l(["the gunman kill police"], [["police killed the gunman"]]) == pytest.approx(0.5)
    assert scores.rouge_l(["我爱北京"], [["我爱上海"]]) == pytest.approx(0.5)
    assert scores.rouge_l(["The  Cat!", ""], [["the cat"], ["x"]]) == pytest.approx(0.5)
    assert scores.rouge_l(["b c"], [["x", "b"]]) == pytest.approx(2 / 3), "the nearest of several"
    assert scores.words("GPU-2 用 PyTorch训练") == ["gpu", "2", "用", "pytorch", "训", "练"]


def test_bleu_and_chrf_are_sacrebleu_s():
    sacrebleu = pytest.importorskip("sacrebleu")
    found = ["the cat sat on a mat", "hello there, world"]
    wanted = [["the cat sat on the mat", "a cat sat on a mat"], ["hello, world"]]
    columns = [["the cat sat on the mat", "hello, world"], ["a cat sat on a mat", None]]
    assert scores.bleu(found, wanted) == pytest.approx(sacrebleu.metrics.BLEU().corpus_score(found, columns).score)
    assert scores.chrf(found, wanted) == pytest.approx(sacrebleu.metrics.CHRF().corpus_score(found, columns).score)
    chinese = ["我爱北京天安门。"], [["我爱北京的天安门。"]]
    expected = sacrebleu.corpus_bleu(chinese[0], [["我爱北京的天安门。"]], tokenize="zh").score
    assert scores.bleu(*chinese) == pytest.approx(expected)
    assert expected > 30, "as one word it would be 0"
    assert scores.bleu(["same words here now"], [["same words here now"]]) == pytest.approx(100)
    assert math.isnan(scores.bleu([], []))


def test_figures_equal_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(1)
    found, wanted = draw.integers(4, size=200), draw.integers(4, size=200)
    assert scores.f1_score(found, wanted, 4) == pytest.approx(metrics.f1_score(wanted, found, average="macro"))
    assert scores.matthews(found, wanted) == pytest.approx(metrics.matthews_corrcoef(wanted, found))
    stats = pytest.importorskip("scipy.stats")
    x, y = draw.integers(10, size=100), draw.integers(10, size=100)
    assert scores.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("B-P I-P O B-L", [("P", 0, 2), ("L", 3, 4)]),
        ("I-P I-P I-L B-L I-L", [("P", 0, 2), ("L", 2, 3), ("L", 3, 5)]),  # I- begins one after O or another kind
        ("B-P B-P O O", [("P", 0, 1), ("P", 1, 2)]),
        ("S-P B-P I-P E-P E-P", [("P", 0, 1), ("P", 1, 4), ("P", 4, 5)]),
        ("B-A-b I-A-b PER PER O", [("A-b", 0, 2), ("PER", 2, 4)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_of_tagged_words(tags: str, entities: list):
    assert scores.entities_of(tags.split()) == entities


def test_an_entity_is_right_as_a_whole_or_wrong():
    wanted = [["B-P", "I-P", "O", "B-L"], ["O", "B-L"]]
    found = [["B-P", "O", "O", "B-L"], ["B-P", "B-L"]]
    figures = scores.entity_scores(found, wanted)
    assert figures == {
        "f1": pytest.approx(2 * 2 / (4 + 3)),
        "precision": 0.5,
        "recall": pytest.approx(2 / 3),
        "accuracy": pytest.approx(4 / 6),
    }
    assert scores.entity_scores(wanted, wanted)["f1"] == 1.0
    assert scores.entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
