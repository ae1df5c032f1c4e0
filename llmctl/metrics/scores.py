"""Task metrics of predictions against references: pure functions of numbers and texts, each with its source.

Fractions are from 0 to 1 and correlations from -1 to 1; BLEU and chrF are from 0 to 100, as published. An undefined
metric (a correlation of constants, a mean of nothing) is nan.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmctl.errors import MissingExtraError

ARTICLES = re.compile(r"\b(a|an|the)\b")
HAN = "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of scripts without spaces (Chinese, Japanese); each counts as a word."""
WORDS = re.compile(f"[{HAN}]|[^\\W{HAN}]+")
IS_HAN = re.compile(f"[{HAN}]")


# --- labels and numbers ----------------------------------------------------------------------------------------------


def accuracy(predicted: ArrayLike, expected: ArrayLike) -> float:
    """Return the fraction of correct rows; a row of several labels (N, L) is correct only if all of them are."""
    right = np.asarray(predicted) == np.asarray(expected)
    return mean(right.reshape(len(right), -1).all(axis=1)) if len(right) else math.nan


def f1_score(predicted: ArrayLike, expected: ArrayLike, n_labels: int) -> float:
    """Return F1: of label 1 if there are two, otherwise the mean over all labels (macro).

    A label that occurs in neither predictions nor references is excluded; one that is never predicted counts 0.

    Shapes: (N,) or (N, 1) numbers of labels, or (N, n_labels) of 0 and 1 for several labels per row.
    Source: van Rijsbergen 1979, chapter 7; macro: the mean of F1 values (Opitz & Burst 2019, arXiv:1911.03347).
    """
    predicted_N, expected_N = np.asarray(predicted), np.asarray(expected)
    several = predicted_N.ndim == 2 and predicted_N.shape[1] > 1
    labels = [1] if n_labels == 2 and not several else list(range(n_labels))
    scores = []
    for label in labels:
        has = predicted_N[:, label] == 1 if several else predicted_N.reshape(-1) == label
        should = expected_N[:, label] == 1 if several else expected_N.reshape(-1) == label
        if total := int(has.sum() + should.sum()):
            scores.append(2 * int((has & should).sum()) / total)
    return mean(scores) if scores or not len(predicted_N) else 0.0


def entity_scores(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return F1, precision and recall of entities, and the accuracy of tags; an entity is right as a whole or wrong.

    Source: the CoNLL script conlleval; the same as seqeval (Nakayama 2018) without its mode `strict`.
    """
    found, wanted = (
        {(row, *entity) for row, tags in enumerate(rows) for entity in entities_of(tags)}
        for rows in (predicted, expected)
    )
    right = len(found & wanted)
    same = [
        ours == theirs for pair in zip(predicted, expected, strict=True) for ours, theirs in zip(*pair, strict=True)
    ]
    return {
        "f1": 2 * right / max(len(found) + len(wanted), 1),
        "precision": right / max(len(found), 1),
        "recall": right / max(len(wanted), 1),
        "accuracy": mean(same),
    }


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return kind, begin and end of the entities of tagged words: `B-`, `I-`, and where they are used `E-` and `S-`."""
    entities: list[tuple[str, int, int]] = []
    last_prefix, last_kind = "O", ""
    for number, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-") if tag[1:2] == "-" else ("O" if tag == "O" else "I", "", tag)
        if prefix != "O":
            if last_prefix in "OES" or prefix in "BS" or kind != last_kind:
                entities.append((kind, number, number))
            entities[-1] = (kind, entities[-1][1], number + 1)
        last_prefix, last_kind = prefix, kind
    return entities


def matthews(predicted: ArrayLike, expected: ArrayLike) -> float:
    """Return Matthews' correlation for any number of labels; 0 if one side is constant, by convention.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient", eq. 8.
    """
    predicted_N, expected_N = np.asarray(predicted).reshape(-1), np.asarray(expected).reshape(-1)
    n_rows = len(predicted_N)
    if not n_rows:
        return math.nan
    labels = np.union1d(predicted_N, expected_N)
    n_predicted = np.array([(predicted_N == label).sum() for label in labels], dtype=float)
    n_expected = np.array([(expected_N == label).sum() for label in labels], dtype=float)
    covariance = float((predicted_N == expected_N).sum()) * n_rows - float(n_predicted @ n_expected)
    spread = (n_rows**2 - float(n_predicted @ n_predicted)) * (n_rows**2 - float(n_expected @ n_expected))
    return covariance / math.sqrt(spread) if spread > 0 else 0.0


def pearson(predicted: ArrayLike, expected: ArrayLike) -> float:
    """Return the linear correlation; nan if one side is constant.

    Source: Pearson 1895, "Note on regression and inheritance in the case of two parents".
    """
    x_N, y_N = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (predicted, expected))
    if len(x_N) < 2:
        return math.nan
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    spread = math.sqrt(float(x_N @ x_N) * float(y_N @ y_N))
    return float(x_N @ y_N) / spread if spread > 0 else math.nan


def spearman(predicted: ArrayLike, expected: ArrayLike) -> float:
    """Return the rank correlation, with ties at their mean rank; nan if one side is constant.

    Source: Spearman 1904, "The proof and measurement of association between two things".
    """
    return pearson(ranks(predicted), ranks(expected))


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Return ranks from 1; equal values get their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values).reshape(-1), return_inverse=True, return_counts=True)
    means: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return means[inverse]


def mean(values: ArrayLike) -> float:
    """Return the mean; nan if there are no values."""
    values_N = np.asarray(values, dtype=np.float64)
    return float(values_N.mean()) if values_N.size else math.nan


# --- texts -----------------------------------------------------------------------------------------------------------

References = Sequence[Sequence[str]]
"""The accepted references of each text."""


def words(text: str) -> list[str]:
    """Split a text into lowercase words; every Chinese or Japanese character is one."""
    return WORDS.findall(text.lower())


def has_han(texts: Sequence[str]) -> bool:
    """Tell whether most of the texts contain Chinese or Japanese."""
    return sum(bool(IS_HAN.search(text)) for text in texts) * 2 > len(texts)


def normal_answer(text: str) -> str:
    """Lowercase an answer and remove punctuation, articles and extra white space.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1; here the punctuation of all scripts is removed, and
    spaces between Chinese characters do not matter, since answers are compared as tokens (`answer_tokens`).
    """
    kept = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join(ARTICLES.sub(" ", kept).split())


def answer_tokens(text: str) -> list[str]:
    """Split a normalized answer at spaces, and Chinese or Japanese text into characters."""
    return re.findall(f"[{HAN}]|[^\\s{HAN}]+", normal_answer(text))


def exact_match(predicted: Sequence[str], expected: References) -> float:
    """Return the fraction of answers that, normalized, equal one of their references.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1.
    """
    return _best_mean(predicted, expected, lambda a, b: float(answer_tokens(a) == answer_tokens(b)))


def token_f1(predicted: Sequence[str], expected: References) -> float:
    """Return the mean over answers of the best F1 between their bag of tokens and that of a reference.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1; an empty answer with an empty reference counts 1
    (version 2, arXiv:1806.03822).
    """
    return _best_mean(predicted, expected, _overlap)


def _overlap(predicted: str, expected: str) -> float:
    a, b = answer_tokens(predicted), answer_tokens(expected)
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def rouge_l(predicted: Sequence[str], expected: References) -> float:
    """Return the mean ROUGE-L F1 over whole texts, without stemming.

    Source: Lin 2004, "ROUGE: A package for automatic evaluation of summaries", section 3.1, sentence level, beta 1.
    """
    return _best_mean(predicted, expected, lambda a, b: _rouge(words(a), words(b)))


def _rouge(a: list[str], b: list[str]) -> float:
    return 2 * lcs_length(a, b) / (len(a) + len(b)) if a or b else 1.0


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, with each row of the table as the bits of one integer.

    Source: Crochemore et al. 2001, "A fast and practical bit-vector algorithm for the longest common subsequence
    problem"; the number of zero bits at the end is the length.
    """
    positions: dict[str, int] = {}  # word -> bit mask of its positions in a
    for index, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << index
    all_ones = (1 << len(a)) - 1
    row = all_ones
    for word in b:
        matched = row & positions.get(word, 0)
        row = ((row + matched) | (row - matched)) & all_ones
    return len(a) - row.bit_count()


def _best_mean(predicted: Sequence[str], expected: References, score: Callable[[str, str], float]) -> float:
    return mean([max(score(text, other) for other in others) for text, others in zip(predicted, expected, strict=True)])


def bleu(predicted: Sequence[str], expected: References) -> float:
    """Return sacrebleu's corpus BLEU; Chinese references are tokenized into characters (`zh`), others by `13a`.

    Raises: MissingExtraError without sacrebleu.
    Source: Papineni et al. 2002; Post 2018, arXiv:1804.08771.
    """
    sacrebleu = load_sacrebleu("BLEU")
    tokenizer = "zh" if has_han([others[0] for others in expected]) else "13a"
    return _corpus(sacrebleu.BLEU(tokenize=tokenizer), predicted, expected)


def chrf(predicted: Sequence[str], expected: References) -> float:
    """Return sacrebleu's corpus chrF: F2 of character n-grams up to 6.

    Raises: MissingExtraError without sacrebleu.
    Source: Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    return _corpus(load_sacrebleu("chrF").CHRF(), predicted, expected)


def _corpus(metric: Any, predicted: Sequence[str], expected: References) -> float:
    if not predicted:
        return math.nan
    n_references = max(map(len, expected))
    # sacrebleu takes one list per reference number, with None for texts that have fewer.
    columns = [[others[n] if n < len(others) else None for others in expected] for n in range(n_references)]
    return float(metric.corpus_score(list(predicted), columns).score)


def load_sacrebleu(what: str) -> Any:
    """Import sacrebleu's metrics.

    Raises: MissingExtraError saying that `what` needs it.
    """
    try:
        return import_module("sacrebleu.metrics")
    except ImportError as error:
        raise MissingExtraError(what, "sacrebleu") from error


TEXT_SCORES: Mapping[str, Callable[[Sequence[str], References], float]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge_l": rouge_l,
    "exact_match": exact_match,
    "token_f1": token_f1,
}
"""Metrics of generated texts against references, by name."""
