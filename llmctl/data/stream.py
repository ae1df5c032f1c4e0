"""Rows of tokens and pairs in an order that is a pure function of (seed, number of the row).

There is no position to lose: row number 12,345 is the same after a restart, on any number of processes, and with any
batch size. Knows nothing of objectives or models; tokens come from memory-mapped shards.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Documents(Protocol):
    """Token sequences by number: what a ShardSet is."""

    @property
    def lengths(self) -> Ints:
        """Tokens per document."""

    def document(self, index: int) -> NDArray[np.integer]:
        """Return the tokens of one document."""


@dataclass(frozen=True)
class Row:
    """A stretch of packed text: tokens, and the number of the document each belongs to (from 1; 0 is padding)."""

    tokens: Ints
    documents: Ints


class PackedRows:
    """Documents joined end to end in a shuffled order and cut into rows of `seq_len` (+ `overlap`) tokens.

    Every epoch has its own order of documents, its own offset of the cuts, and its own order of rows. Unshuffled rows
    cover every token once and pad the last row: that is how held-out text is measured. `fixed` rows are cut once, and
    only their order is drawn: what was computed of one belongs to its address in every epoch.
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
        # A shuffled epoch gives up at most two rows to the offset and the remainder, an unshuffled one nothing.
        self.n_rows = max(1, (usable - seq_len + 1) // seq_len if shuffle else -(-usable // seq_len))
        self._layout = lru_cache(maxsize=2)(self._lay_out)

    def row(self, number: int) -> Row:
        """Return row `number` of the endless sequence of epochs."""
        epoch, index = divmod(number, self.n_rows)
        order, starts, offset, rows = self._layout(epoch if self.shuffle else 0)
        start = offset + int(rows[index]) * self.seq_len
        return self._read(order, starts, start, start + self.seq_len + self.overlap)

    def address(self, number: int) -> int:
        """Return where row `number` lies among fixed rows; among others a number is its own address."""
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
            slack = self.n_tokens - self.overlap - self.n_rows * self.seq_len
            offset = int(rng.integers(max(1, min(self.seq_len, slack + 1))))
            rows = rng.permutation(rows)
        starts = np.concatenate([[0], np.cumsum(self.source.lengths[order])])
        return order, starts, offset, rows

    def _read(self, order: Ints, starts: Ints, start: int, stop: int) -> Row:
        tokens = np.zeros(stop - start, dtype=np.int64)
        documents = np.zeros(stop - start, dtype=np.int64)
        at = int(np.searchsorted(starts, start, side="right")) - 1
        number = 0
        while at < len(order) and starts[at] < stop:
            begin, end = max(start, int(starts[at])), min(stop, int(starts[at + 1]))
            if end > begin:
                number += 1
                piece = self.source.document(int(order[at]))[begin - starts[at] : end - starts[at]]
                tokens[begin - start : end - start] = piece
                documents[begin - start : end - start] = number if self.isolate else 1
            at += 1
        return Row(tokens, documents)


class ExampleRows:
    """Examples one by one in shuffled order, neighbors of similar length, so that a batch has little padding.

    The order is drawn per epoch; examples are sorted by length within windows of 64 batches only.
    """

    def __init__(self, lengths: Ints, selection: Ints, *, seed: int, batch_size: int, shuffle: bool = True) -> None:
        self.lengths, self.selection = lengths, np.asarray(selection, dtype=np.int64)
        self.seed, self.batch_size, self.shuffle = seed, batch_size, shuffle
        self.n_rows = len(self.selection)
        self._order = lru_cache(maxsize=2)(self._draw)

    def index(self, number: int) -> int:
        """Return which example is row `number` of the endless sequence of epochs."""
        epoch, index = divmod(number, self.n_rows)
        return int(self._order(epoch)[index])

    def address(self, number: int) -> int:
        """Return where the example of row `number` stands in the selection, which is sorted."""
        return int(np.searchsorted(self.selection, self.index(number)))

    def _draw(self, epoch: int) -> Ints:
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
        n_whole = len(order) // self.batch_size * self.batch_size
        batches = order[:n_whole].reshape(-1, self.batch_size)
        return np.concatenate([rng.permutation(batches, axis=0).reshape(-1), order[n_whole:]])


class PackedExamples:
    """Whole examples side by side in rows of at most `seq_len` positions, every epoch's rows in an order of its own.

    Which examples share a row is decided once: the longest first, each into the fullest row that has room (best fit
    decreasing), so that an epoch has the same number of rows as any other.
    """

    def __init__(self, lengths: Ints, selection: Ints, *, seq_len: int, seed: int, shuffle: bool = True) -> None:
        self.seed, self.shuffle = seed, shuffle
        self.rows = best_fit(lengths, np.asarray(selection, dtype=np.int64), seq_len)
        self.n_rows = len(self.rows)
        self._order = lru_cache(maxsize=2)(self._draw)

    def address(self, number: int) -> int:
        """Return where row `number` of the endless sequence of epochs lies among the rows."""
        epoch, index = divmod(number, self.n_rows)
        return int(self._order(epoch)[index])

    def indexes(self, number: int) -> list[int]:
        """Return which examples make up row `number` of the endless sequence of epochs."""
        return self.rows[self.address(number)]

    def _draw(self, epoch: int) -> Ints:
        order = np.arange(self.n_rows)
        return np.random.default_rng([self.seed, epoch]).permutation(order) if self.shuffle else order


def best_fit(lengths: Ints, selection: Ints, capacity: int) -> list[list[int]]:
    """Put examples into as few rows of `capacity` positions as the best-fit-decreasing rule finds.

    An example longer than that gets a row of its own. Rows stand in the order of their first example.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    rows: list[list[int]] = []
    roomy = SortedRooms(capacity)
    for index in selection[np.argsort(-lengths[selection], kind="stable")].tolist():
        size = min(int(lengths[index]), capacity)
        room = roomy.smallest(size)
        if room is None:
            row: list[int] = []
            rows.append(row)
            room = capacity
        else:
            row = by_room[room].pop()
            if not by_room[room]:
                roomy.remove(room)
        row.append(index)
        if not by_room[room - size]:
            roomy.add(room - size)
        by_room[room - size].append(row)
    places = {int(index): place for place, index in enumerate(selection)}
    return sorted(([*sorted(row, key=places.__getitem__)] for row in rows), key=lambda row: places[row[0]])


class SortedRooms:
    """The amounts of room that some row has, in order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rooms: list[int] = []

    def smallest(self, size: int) -> int | None:
        """Return the least room that holds `size`, or None."""
        place = bisect_left(self.rooms, max(size, 1))
        return self.rooms[place] if place < len(self.rooms) else None

    def add(self, room: int) -> None:
        """Note that a row has this much room."""
        insort(self.rooms, room)

    def remove(self, room: int) -> None:
        """Note that no row has this much room any more."""
        del self.rooms[bisect_left(self.rooms, room)]


class PairRows:
    """Pairs of texts, in the order of `ExampleRows` by both lengths together."""

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
        """Return pair `number` of the endless sequence of epochs: source tokens, target tokens."""
        chosen = self.order.index(number)
        return self.sources.document(chosen).astype(np.int64), self.targets.document(chosen).astype(np.int64)
