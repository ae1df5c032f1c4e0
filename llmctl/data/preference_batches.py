"""Batches of preferences: every answer after its own copy of the prompt, isolated from the others of the row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.data.batches import Batch, Ids, Ints, join, stack
from llmctl.data.masking import IGNORE
from llmctl.data.stream import Documents, ExampleRows, PackedExamples

SLOTS = 2
"""Answers of a preference."""


class PreferenceBatches:
    """Preferences as rows of answers.

    The answers of a preference are documents 2p + 1 and 2p + 2 of its row, p = 0, 1, ...; the second is missing for single
    answers. `labels` only counts preferences, or answers if `counts_answers`; `answers_BT` has the trained tokens shifted by
    one. first_lengths: tokens of the first answer with its prompt. is_desirable: of the first answer. mismatched: add the
    answers of other preferences to the prompts (`other_...`), to estimate a divergence.
    """

    def __init__(
        self,
        tokens: Documents,
        trained: Documents,
        first_lengths: Ints,
        is_desirable: NDArray[np.bool_],
        rows: PackedExamples | ExampleRows,
        ids: Ids,
        *,
        counts_answers: bool = False,
        mismatched: Ints | None = None,
        reference: NDArray[np.float64] | None = None,
    ) -> None:
        self.tokens, self.trained, self.first_lengths, self.is_desirable = tokens, trained, first_lengths, is_desirable
        self.rows, self.ids, self.n_rows = rows, ids, rows.n_rows
        self.counts_answers, self.mismatched, self.reference = counts_answers, mismatched, reference

    def indexes(self, number: int) -> list[int]:
        """Return the preferences of row `number`."""
        return self.rows.indexes(number) if isinstance(self.rows, PackedExamples) else [self.rows.index(number)]

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers."""
        rows = [self.indexes(number) for number in numbers]
        width = max(map(len, rows))
        kinds = np.full((len(rows), SLOTS * width), -1)  # 1: desirable, 0: not, -1: no answer
        for row, indexes in enumerate(rows):
            for place, index in enumerate(indexes):
                for slot in range(len(self.sides(index))):
                    kinds[row, SLOTS * place + slot] = int(self.is_desirable[index] ^ bool(slot))
        counted = kinds if self.counts_answers else kinds[:, ::SLOTS]
        batch: dict[str, Any] = {
            **layout([[self.sides(index) for index in indexes] for indexes in rows], self.ids.pad),
            "labels": np.where(counted >= 0, 0, IGNORE),
            "kinds_BS": kinds,
        }
        if self.mismatched is not None:
            others = [[[self.mixed(index)] for index in indexes] for indexes in rows]
            batch |= {f"other_{name}": array for name, array in layout(others, self.ids.pad).items()}
        if self.reference is not None:
            batch["reference_BS"] = self._of_slots(rows, width, self.reference[:, :SLOTS])
            if self.mismatched is not None:
                batch["other_reference_BS"] = self._of_slots(rows, width, self.reference[:, SLOTS:])
        return batch

    def sides(self, index: int) -> list[tuple[Ints, Ints]]:
        """Return ids and labels of the answers of a preference, each with its prompt."""
        ids = self.tokens.document(index).astype(np.int64)
        trained = self.trained.document(index).astype(bool)
        first = int(self.first_lengths[index])
        parts = [slice(0, first), slice(first, len(ids))] if first < len(ids) else [slice(0, first)]
        return [labeled(ids[part], trained[part]) for part in parts]

    def mixed(self, index: int) -> tuple[Ints, Ints]:
        """Return ids and labels of a prompt with the first answer of another preference."""
        assert self.mismatched is not None
        found = []
        for one in (index, int(self.mismatched[index])):
            first = int(self.first_lengths[one])
            ids = self.tokens.document(one).astype(np.int64)[:first]
            found.append((ids, int(self.trained.document(one).astype(bool)[:first].argmax())))
        (prompt, own), (other, begins) = found
        ids = np.concatenate([prompt[:own], other[begins:]])
        return labeled(ids, np.arange(len(ids)) >= own)

    def _of_slots(self, rows: Sequence[Sequence[int]], width: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values of the preferences of each row, in the order of their answers."""
        found = np.zeros((len(rows), SLOTS * width))
        for row, indexes in enumerate(rows):
            for place, index in enumerate(indexes):
                found[row, SLOTS * place : SLOTS * place + values.shape[1]] = values[index]
        return found


def labeled(ids: Ints, is_trained: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Return inputs and labels, shifted by one."""
    return ids[:-1], np.where(is_trained[1:], ids[1:], IGNORE)


def layout(rows: Sequence[Sequence[Sequence[tuple[Ints, Ints]]]], pad: int) -> Batch:
    """Lay out rows of preferences, each with one or two answers."""
    tokens, labels, documents = [], [], []
    for preferences in rows:
        answers = [
            (SLOTS * place + slot + 1, *answer)
            for place, sides in enumerate(preferences)
            for slot, answer in enumerate(sides)
        ]
        tokens.append(join([ids for _, ids, _ in answers]))
        labels.append(join([own for _, _, own in answers]))
        documents.append(join([np.full(len(ids), number) for number, ids, _ in answers]))
    return {
        "input_ids_BT": stack(tokens, pad),
        "documents_BT": stack(documents, 0),
        "answers_BT": stack(labels, IGNORE),
    }
