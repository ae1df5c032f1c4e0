"""The name that is meant by a misspelled one; every suggestion of the package is made here."""

from collections.abc import Iterable
from difflib import SequenceMatcher

SIMILAR = 0.6
"""Least similarity of a suggestion, as in difflib.get_close_matches."""


LONGEST = 100
"""Characters of a name that are compared: what is misread as a name can be a whole text."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return the known name with the fewest typing errors, empty if none is similar.

    difflib alone ranks by common letters in order: it finds `mlm` closer to `cml` than `clm`, which only swaps two.
    """
    name = name[:LONGEST]
    found = [(edits(name, each), -similarity(name, each), each) for each in known]
    similar = [row for row in found if -row[1] >= SIMILAR or row[0] == 1 < len(name)]
    return min(similar, key=lambda row: row[:2])[2] if similar else ""


def similarity(left: str, right: str) -> float:
    """Return the fraction of the characters that two names have in common, in order."""
    return SequenceMatcher(None, right, left).ratio()


def edits(left: str, right: str) -> int:
    """Return the fewest typing errors between two names: letters inserted, left out, replaced, or swapped with the next.

    Source: the restricted edit distance of Damerau, "A technique for computer detection and correction of spelling
    errors", 1964.
    """
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        older, before, row = before, row, [i]
        for j, b in enumerate(right, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and b == left[i - 2]:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]
