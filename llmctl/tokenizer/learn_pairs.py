"""Learn which neighbors in words become one piece, the most frequent pair first.

Source: Sennrich et al. 2016, arXiv:1508.07909, algorithm 1.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

MOST_BYTES = 32
"""The longest new piece."""

LEAST_COUNT = 2
"""How often two pieces must stand together, or a character must occur, to become one piece."""

Pair = tuple[str, str]


def learn(words: Mapping[tuple[str, ...], int], known: Iterable[str], n_merges: int) -> list[Pair]:
    """Return the merges of neighbors, the most frequent pair first, that make new pieces; known: pieces that exist."""
    return [pair for pair, _ in learn_counted(words, known, n_merges, str.__add__)]


def learn_counted(
    words: Mapping[tuple[str, ...], int], known: Iterable[str], n_merges: int, join: Callable[[str, str], str]
) -> list[tuple[Pair, int]]:
    """Return merges as `learn` does, each with how often the pair occurred; join: the name of two neighbors."""
    rows = [list(word) for word in words]
    counts = list(words.values())
    totals: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, row in enumerate(rows):
        for pair in pairwise(row):
            totals[pair] += counts[number]
            places[pair].add(number)
    heap = [(-total, pair) for pair, total in totals.items() if total >= LEAST_COUNT]
    heapq.heapify(heap)
    merges, taken = list[tuple[Pair, int]](), set(known)
    while heap and len(merges) < n_merges:
        total, pair = heapq.heappop(heap)
        current = totals.get(pair, 0)
        joined = join(*pair)
        if current < LEAST_COUNT or joined in taken or len(joined) > MOST_BYTES:
            continue
        if current != -total:  # it has been merged away in part
            heapq.heappush(heap, (-current, pair))
            continue
        merges.append((pair, current))
        taken.add(joined)
        changed: set[Pair] = set()
        for number in places.pop(pair):
            row, count = rows[number], counts[number]
            for old in pairwise(row):
                totals[old] -= count
            rows[number] = row = merged(row, pair, joined)
            for new in pairwise(row):
                totals[new] += count
                if number not in places[new]:
                    places[new].add(number)
                if joined in new:
                    changed.add(new)
        for new in changed:
            heapq.heappush(heap, (-totals[new], new))
    return merges


def merged(row: list[str], pair: Pair, joined: str) -> list[str]:
    """Return a row in which a pair of neighbors is joined, from the left."""
    found: list[str] = []
    at = 0
    while at < len(row):
        if at + 1 < len(row) and (row[at], row[at + 1]) == pair:
            found.append(joined)
            at += 2
        else:
            found.append(row[at])
            at += 1
    return found
