"""Build the input arrays of one forward pass from rows of tokens, one builder per objective.

Random choices for a row (masks, spans) come from a generator seeded by (seed, address of the row), so they do not
depend on the number of processes. Knows no model and no tokenizer: special ids are passed in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.data.masking import IGNORE, Masking, mask_tokens, remove_spans
from llmctl.data.stream import Documents, ExampleRows, PackedExamples, PackedRows, PairRows, Row

Ints = NDArray[np.int64]
Batch = dict[str, Ints]
"""The arrays of one forward pass: `labels` and the inputs of `LanguageModel.hidden`, all (B, T), int64."""


@dataclass(frozen=True)
class Ids:
    """The special token ids that builders insert; `special` (V,) marks all special tokens.

    source_end: what ends the sources of an encoder-decoder if it is more than end-of-text, as mBART's language.
    """

    pad: int
    eos: int
    decoder_start: int
    special: NDArray[np.bool_]
    sentinels: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    source_end: tuple[int, ...] = ()


def stack(rows: Sequence[Ints], fill: int) -> Ints:
    """Right-pad rows to the longest and stack them: (B, longest)."""
    out = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


class CausalBatches:
    """Next-token prediction: the label of a position is the next token of the same document."""

    def __init__(self, rows: PackedRows, ids: Ids) -> None:
        self.rows, self.ids, self.n_rows = rows, ids, rows.n_rows

    def address(self, number: int) -> int:
        """Return the address of row `number` among fixed rows."""
        return self.rows.address(number)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers."""
        rows = [self.rows.row(number) for number in numbers]
        tokens, documents = np.stack([row.tokens for row in rows]), np.stack([row.documents for row in rows])
        # The last token of a document has no label: its successor is in another document or padding.
        follows = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] != 0)
        batch = {"input_ids_BT": tokens[:, :-1], "labels": np.where(follows, tokens[:, 1:], IGNORE)}
        # With one document per row the mask is redundant, and attention is faster without it.
        if (documents[:, :-1] != 1).any():
            batch["documents_BT"] = documents[:, :-1]
        return batch


class MaskedBatches:
    """Masked-token prediction over packed rows."""

    def __init__(self, rows: PackedRows, ids: Ids, masking: Masking, seed: int) -> None:
        self.rows, self.ids, self.masking, self.seed, self.n_rows = rows, ids, masking, seed, rows.n_rows

    def address(self, number: int) -> int:
        """Return the address of row `number` among fixed rows."""
        return self.rows.address(number)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers."""
        inputs, labels, documents = [], [], []
        for number in numbers:
            row = self.rows.row(number)
            real = row.documents != 0
            # Seeded by address: fixed rows get the same masks in every epoch, for cached teacher outputs to match.
            rng = np.random.default_rng([self.seed, self.rows.address(number)])
            hidden, predicted = mask_tokens(row.tokens[real], rng, self.masking)
            inputs.append(hidden)
            labels.append(predicted)
            documents.append(row.documents[real])
        return {
            "input_ids_BT": stack(inputs, self.ids.pad),
            "labels": stack(labels, IGNORE),
            "documents_BT": stack(documents, 0),
        }


class SpanBatches:
    """Span corruption over packed rows: every document of a row is corrupted and decoded separately."""

    def __init__(self, rows: PackedRows, ids: Ids, *, frac: float, mean_span_tokens: float, seed: int) -> None:
        self.rows, self.ids, self.frac, self.mean, self.seed = rows, ids, frac, mean_span_tokens, seed
        self.n_rows = rows.n_rows

    def address(self, number: int) -> int:
        """Return the address of row `number` among fixed rows."""
        return self.rows.address(number)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers."""
        pairs = [
            self._corrupt(self.rows.row(number), np.random.default_rng([self.seed, self.rows.address(number)]))
            for number in numbers
        ]
        return encoder_decoder_batch(pairs, self.ids)

    def _corrupt(self, row: Row, rng: np.random.Generator) -> list[tuple[Ints, Ints]]:
        pairs = []
        for document in range(1, int(row.documents.max(initial=0)) + 1):
            tokens = row.tokens[row.documents == document]
            tokens = tokens[~self.ids.special[tokens]]  # a sentinel or end-of-text in the input would be ambiguous
            if len(tokens):
                pairs.append(
                    remove_spans(tokens, rng, sentinels=self.ids.sentinels, frac=self.frac, mean_span_tokens=self.mean)
                )
        return pairs


class PairBatches:
    """Supervised pairs; a side longer than `max_tokens` is truncated (the caller reports how many)."""

    def __init__(self, rows: PairRows, ids: Ids, max_tokens: int) -> None:
        self.rows, self.ids, self.max_tokens, self.n_rows = rows, ids, max_tokens, rows.n_rows

    def address(self, number: int) -> int:
        """Return the address of the pair in row `number`."""
        return self.rows.order.address(number)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the pairs with these numbers."""
        limit = self.max_tokens - 1  # one position is for the end-of-text token
        source_limit = self.max_tokens - max(len(self.ids.source_end), 1)
        pairs = [self.rows.row(number) for number in numbers]
        return encoder_decoder_batch([[(source[:source_limit], target[:limit])] for source, target in pairs], self.ids)


class AnswerBatches:
    """Prompts with answers for a decoder: only tokens marked as trained become labels, and examples are isolated."""

    def __init__(
        self, tokens: Documents, trained: Documents, rows: PackedExamples | ExampleRows, ids: Ids, max_tokens: int
    ) -> None:
        self.tokens, self.trained, self.rows, self.ids = tokens, trained, rows, ids
        self.max_tokens, self.n_rows = max_tokens, rows.n_rows

    def address(self, number: int) -> int:
        """Return the address of row `number`: a packed row or a single example."""
        return self.rows.address(number)

    def indexes(self, number: int) -> list[int]:
        """Return the indexes of the examples in row `number`."""
        return self.rows.indexes(number) if isinstance(self.rows, PackedExamples) else [self.rows.index(number)]

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers."""
        rows = [self._row(number) for number in numbers]
        batch = {
            "input_ids_BT": stack([tokens for tokens, _, _ in rows], self.ids.pad),
            "labels": stack([labels for _, labels, _ in rows], IGNORE),
        }
        documents = stack([documents for _, _, documents in rows], 0)
        if (documents != 1).any():
            batch["documents_BT"] = documents
        return batch

    def _row(self, number: int) -> tuple[Ints, Ints, Ints]:
        tokens, labels, documents = [], [], []
        for document, index in enumerate(self.indexes(number), start=1):
            # One token more than the row has positions: labels are shifted by one.
            ids = self.tokens.document(index).astype(np.int64)[: self.max_tokens + 1]
            is_trained = self.trained.document(index).astype(bool)[: self.max_tokens + 1]
            tokens.append(ids[:-1])
            labels.append(np.where(is_trained[1:], ids[1:], IGNORE))
            documents.append(np.full(len(ids) - 1, document))
        return join(tokens), join(labels), join(documents)


class ClassBatches:
    """Classification and regression: texts with targets; `first_lengths` is where a pair's second text starts."""

    def __init__(
        self, tokens: Documents, values: NDArray[np.float64], first_lengths: Ints | None, rows: ExampleRows, ids: Ids
    ) -> None:
        self.tokens, self.values, self.first_lengths, self.rows, self.ids = tokens, values, first_lengths, rows, ids
        self.n_rows = rows.n_rows

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers; `labels` (B, 1) only counts them, `targets` has the values."""
        indexes = [self.rows.index(number) for number in numbers]
        texts = [self.tokens.document(index).astype(np.int64) for index in indexes]
        batch: dict[str, Any] = {
            "input_ids_BT": stack(texts, self.ids.pad),
            "labels": np.zeros((len(indexes), 1), dtype=np.int64),
            "targets": self.values[indexes],
        }
        documents = stack([np.ones(len(text), dtype=np.int64) for text in texts], 0)
        if (documents == 0).any():
            batch["documents_BT"] = documents
        if self.first_lengths is not None:
            batch["token_types_BT"] = stack(
                [
                    (np.arange(len(text)) >= self.first_lengths[index]).astype(np.int64)
                    for text, index in zip(texts, indexes, strict=True)
                ],
                0,
            )
        return batch


def encoder_decoder_batch(rows: Sequence[Sequence[tuple[Ints, Ints]]], ids: Ids) -> Batch:
    """Lay out rows of (source, target) pairs for an encoder-decoder, with end-of-text appended to both sides.

    Pairs of one row are packed and isolated by document numbers. The decoder's input is its target shifted right by
    one, starting with the decoder's start token.
    """
    eos, start = np.array([ids.eos]), np.array([ids.decoder_start])
    source_end = np.array(ids.source_end) if ids.source_end else eos
    sources, targets, inputs, source_documents, target_documents = [], [], [], [], []
    for pairs in rows:
        ended = [(np.concatenate([source, source_end]), np.concatenate([target, eos])) for source, target in pairs]
        sources.append(join([source for source, _ in ended]))
        targets.append(join([target for _, target in ended]))
        inputs.append(join([np.concatenate([start, target[:-1]]) for _, target in ended]))
        source_documents.append(join([np.full(len(s), n + 1) for n, (s, _) in enumerate(ended)]))
        target_documents.append(join([np.full(len(t), n + 1) for n, (_, t) in enumerate(ended)]))
    return {
        "input_ids_BT": stack(sources, ids.pad),
        "documents_BT": stack(source_documents, 0),
        "decoder_input_ids_BT": stack(inputs, ids.pad),
        "decoder_documents_BT": stack(target_documents, 0),
        "labels": stack(targets, IGNORE),
    }


def join(parts: Sequence[Ints]) -> Ints:
    """Concatenate arrays; an empty list gives an empty array, which np.concatenate refuses."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


Batches = CausalBatches | MaskedBatches | SpanBatches | PairBatches
BatchMaker = Callable[[Sequence[int]], Batch]
