"""Rows of tokens, examples and pairs in an order that is a pure function of (seed, row number).

There is no reader state: row 12,345 is the same after a restart and on any number of processes. Row numbers run
through an endless sequence of epochs. Knows no objectives or models; tokens come from memory-mapped shards.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Documents(Protocol):
    """Token sequences by index, such as a ShardSet."""

    @property
    def lengths(self) -> Ints:
        """Tokens per document."""

    def document(self, index: int) -> NDArray[np.integer]:
        """Return the tokens of one document."""


@dataclass(frozen=True)
class Row:
    """One packed row: tokens, and the number of each token's document within the row (from 1; 0 is padding)."""

    tokens: Ints
    documents: Ints


class PackedRows:
    """Documents concatenated in shuffled order and cut into rows of `seq_len` (+ `overlap`) tokens.

    Every epoch has its own document order, cut offset and row order. Unshuffled rows cover every token once and pad
    the last row, for evaluation. `fixed` rows are cut once and only their order changes per epoch, so that results
    computed for a row (such as cached teacher outputs) can be looked up by its address in every epoch.
    """

    def __init__(
        self,
        source: Documents,
        selection: Ints,
        *,
        seq_len: int,
        overlap: int,
        seed: int,
        shuffle: bool = True,
        isolate: bool = True,
        fixed: bool = False,
    ) -> None:
        self.fixed = fixed
        self.source, self.selection = source, np.asarray(selection, dtype=np.int64)
        self.seq_len, self.overlap, self.seed = seq_len, overlap, seed
        self.shuffle, self.isolate = shuffle, isolate
        self.n_tokens = int(source.lengths[self.selection].sum())
        usable = self.n_tokens - overlap
        # A shuffled epoch loses at most two rows to the offset and the remainder, an unshuffled one nothing.
        self.n_rows = max(1, (usable - seq_len + 1) // seq_len if shuffle else -(-usable // seq_len))
        self._layout = lru_cache(maxsize=2)(self._lay_out)

    def row(self, number: int) -> Row:
        """Return row `number`."""
        epoch, index = divmod(number, self.n_rows)
        order, starts, offset, rows = self._layout(epoch if self.shuffle else 0)
        start = offset + int(rows[index]) * self.seq_len
        return self._read(order, starts, start, start + self.seq_len + self.overlap)

    def address(self, number: int) -> int:
        """Return the epoch-independent index of row `number` if rows are fixed, else `number` itself."""
        if not self.fixed:
            return number
        epoch, index = divmod(number, self.n_rows)
        return int(self._layout(epoch if self.shuffle else 0)[3][index])

    def _lay_out(self, epoch: int) -> tuple[Ints, Ints, int, Ints]:
        order, rows, offset = self.selection, np.arange(self.n_rows), 0
        if self.shuffle and self.fixed:
            rows = np.random.default_rng([self.seed, epoch]).permutation(rows)
        elif self.shuffle:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(order)
            # A random offset puts the cuts elsewhere in every epoch, so that no token is always at a row's start.
            slack = self.n_tokens - self.overlap - self.n_rows * self.seq_len
            offset = int(rng.integers(max(1, min(self.seq_len, slack + 1))))
            rows = rng.permutation(rows)
        starts = np.concatenate([[0], np.cumsum(self.source.lengths[order])])
        return order, starts, offset, rows

    def _read(self, order: Ints, starts: Ints, start: int, stop: int) -> Row:
        tokens = np.zeros(stop - start, dtype=np.int64)
        documents = np.zeros(stop - start, dtype=np.int64)
        at = int(np.searchsorted(starts, start, side="right")) - 1  # the document that contains the first token
        number = 0
        while at < len(order) and starts[at] < stop:
            begin, end = max(start, int(starts[at])), min(stop, int(starts[at + 1]))
            if end > begin:
                number += 1
                segment = self.source.document(int(order[at]))[begin - starts[at] : end - starts[at]]
                tokens[begin - start : end - start] = segment
                documents[begin - start : end - start] = number if self.isolate else 1
            at += 1
        return Row(tokens, documents)


class ExampleRows:
    """Single examples in shuffled order, grouped by similar length, so that batches have little padding.

    Every epoch has its own order; examples are sorted by length only within windows of 64 batches, so that batches
    stay random.
    """

    def __init__(self, lengths: Ints, selection: Ints, *, seed: int, batch_size: int, shuffle: bool = True) -> None:
        self.lengths, self.selection = lengths, np.asarray(selection, dtype=np.int64)
        self.seed, self.batch_size, self.shuffle = seed, batch_size, shuffle
        self.n_rows = len(self.selection)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def index(self, number: int) -> int:
        """Return the index of the example in row `number`."""
        epoch, index = divmod(number, self.n_rows)
        return int(self._order(epoch)[index])

    def address(self, number: int) -> int:
        """Return the position of row `number`'s example in the selection, which is sorted."""
        return int(np.searchsorted(self.selection, self.index(number)))

    def _shuffled(self, epoch: int) -> Ints:
        if not self.shuffle:
            return self.selection
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.selection)
        cost = self.lengths[order]
        bucket = 64 * self.batch_size
        order = np.concatenate(
            [
                order[start : start + bucket][np.argsort(cost[start : start + bucket], kind="stable")]
                for start in range(0, len(order), bucket)
            ]
        )
        # Shuffle whole batches, so that training does not go from short to long; the incomplete one stays last.
        n_whole = len(order) // self.batch_size * self.batch_size
        batches = order[:n_whole].reshape(-1, self.batch_size)
        return np.concatenate([rng.permutation(batches, axis=0).reshape(-1), order[n_whole:]])


class PackedExamples:
    """Whole examples packed into rows of at most `seq_len` positions; every epoch has its own row order.

    Examples are assigned to rows once, by best-fit decreasing (longest first, each into the fullest row with room), so
    that every epoch has the same number of rows.
    """

    def __init__(self, lengths: Ints, selection: Ints, *, seq_len: int, seed: int, shuffle: bool = True) -> None:
        self.seed, self.shuffle = seed, shuffle
        self.rows = best_fit(lengths, np.asarray(selection, dtype=np.int64), seq_len)
        self.n_rows = len(self.rows)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def address(self, number: int) -> int:
        """Return the epoch-independent index of row `number`."""
        epoch, index = divmod(number, self.n_rows)
        return int(self._order(epoch)[index])

    def indexes(self, number: int) -> list[int]:
        """Return the indexes of the examples in row `number`."""
        return self.rows[self.address(number)]

    def _shuffled(self, epoch: int) -> Ints:
        order = np.arange(self.n_rows)
        return np.random.default_rng([self.seed, epoch]).permutation(order) if self.shuffle else order


def best_fit(lengths: Ints, selection: Ints, capacity: int) -> list[list[int]]:
    """Pack examples into rows of `capacity` positions by best-fit decreasing.

    An example longer than that gets its own row. Rows are ordered by their first example.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # rows by their free positions
    rows: list[list[int]] = []
    rooms = SortedRooms(capacity)
    for index in selection[np.argsort(-lengths[selection], kind="stable")].tolist():
        size = min(int(lengths[index]), capacity)
        room = rooms.smallest(size)  # best fit: the fullest row that still has room
        if room is None:
            row: list[int] = []
            rows.append(row)
            room = capacity
        else:
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.remove(room)
        row.append(index)
        if not by_room[room - size]:
            rooms.add(room - size)
        by_room[room - size].append(row)
    # Restore the selection's order, so that the result does not depend on the order of packing.
    positions = {int(index): position for position, index in enumerate(selection)}
    return sorted(([*sorted(row, key=positions.__getitem__)] for row in rows), key=lambda row: positions[row[0]])


class SortedRooms:
    """The distinct amounts of free positions among rows, sorted, for binary search."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rooms: list[int] = []

    def smallest(self, size: int) -> int | None:
        """Return the smallest amount that fits `size`, or None."""
        index = bisect_left(self.rooms, max(size, 1))
        return self.rooms[index] if index < len(self.rooms) else None

    def add(self, room: int) -> None:
        """Add an amount that a row now has."""
        insort(self.rooms, room)

    def remove(self, room: int) -> None:
        """Remove an amount that no row has any more."""
        del self.rooms[bisect_left(self.rooms, room)]


class PairRows:
    """Pairs of texts, ordered like `ExampleRows` by the sum of both lengths."""

    def __init__(
        self,
        sources: Documents,
        targets: Documents,
        selection: Ints,
        *,
        seed: int,
        batch_size: int,
        shuffle: bool = True,
    ) -> None:
        self.sources, self.targets = sources, targets
        lengths = sources.lengths + targets.lengths
        self.order = ExampleRows(lengths, selection, seed=seed, batch_size=batch_size, shuffle=shuffle)
        self.n_rows = self.order.n_rows

    def row(self, number: int) -> tuple[Ints, Ints]:
        """Return the source and target tokens of row `number`."""
        index = self.order.index(number)
        return self.sources.document(index).astype(np.int64), self.targets.document(index).astype(np.int64)
