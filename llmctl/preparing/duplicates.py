"""Equal documents: found by their hashes, kept on one side of the held-out split, or counted where they are on both.

Knows hashes only. A document takes eight bytes; that two different ones share a hash keeps them together, and does no harm.
"""

from array import array
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from llmctl.files import hash64

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

HEAD_TOKENS = 32
"""Documents of shards are compared as a whole only if they have the same length and begin alike."""


def hashes_of(texts: Iterable[str]) -> Hashes:
    """Return a hash per text."""
    return as_hashes(array("Q", (hash64(text.encode()) for text in texts)))


def as_hashes(values: "array[int]") -> Hashes:
    """Return collected hashes as an array."""
    return np.frombuffer(values, dtype=np.uint64) if values else np.zeros(0, dtype=np.uint64)


def document_hashes(n_documents: int, document: Callable[[int], NDArray[np.integer]], lengths: Ints) -> Hashes:
    """Return a hash per encoded document, read as a whole only if another one begins alike."""
    begins = array(
        "Q",
        (
            hash64(document(n)[:HEAD_TOKENS].tobytes() + int(lengths[n]).to_bytes(8, "little"))
            for n in range(n_documents)
        ),
    )
    hashes = as_hashes(begins).copy()
    _, group, count = np.unique(hashes, return_inverse=True, return_counts=True)
    for index in np.flatnonzero(count[group] > 1):
        hashes[index] = hash64(document(int(index)).tobytes())
    return hashes


def groups_of(hashes: Hashes) -> Ints:
    """Number equal documents alike, in the order of their first occurrence; without duplicates: 0, 1, 2, ..."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[group]


def describe_duplicates(hashes: Hashes, held_out: Ints) -> list[str]:
    """Return a line per kind of duplicate: documents that occur again, and those on both sides of a split."""
    n_again = len(hashes) - len(np.unique(hashes))
    if not n_again:
        return []
    is_held_out = np.zeros(len(hashes), dtype=bool)
    is_held_out[held_out] = True
    n_leaked = int(np.isin(hashes[is_held_out], hashes[~is_held_out]).sum())
    lines = [f"data: {n_again:,} of {len(hashes):,} documents are copies of an earlier one"]
    if n_leaked:
        return [*lines, f"data: {n_leaked:,} held-out documents are also in the training data"]
    return [f"{lines[0]}; equal documents are on the same side of the held-out split"]
