"""Conversations that student and teacher read in their own chat templates, aligned in their answers.

The text around the answers differs, and nothing is learned there. The answers are the same text: their tokens are aligned by
bytes, counted from the beginning of each answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.data.batches import AnswerBatches, stack
from llmctl.data.shards import ShardSet
from llmctl.distilling.alignment import Aligned, Aligner, Row, aligned_rows
from llmctl.distilling.teacher import READ
from llmctl.losses.base import IGNORE
from llmctl.training.batch import Batch

Ints = NDArray[np.int64]
BETWEEN, OTHER_BETWEEN = 0.25, 0.5
"""Added to the ends of the student's and the teacher's tokens that are the end of no token of the other side."""


class AnswersInTwo:
    """The batches of a source with the same conversations in the teacher's tokens."""

    def __init__(self, source: AnswerBatches, tokens: ShardSet, trained: ShardSet, max_tokens: int) -> None:
        self.source, self.tokens, self.trained, self.max_tokens = source, tokens, trained, max_tokens
        self.n_rows = source.n_rows

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers."""
        rows: dict[str, list[Ints]] = {name: [] for name in READ}
        for number in numbers:
            parts = [
                [shards.document(index).astype(np.int64)[: self.max_tokens] for shards in (self.tokens, self.trained)]
                for index in self.source.indexes(number)
            ]
            rows[READ[0]].append(np.concatenate([ids for ids, _ in parts]))
            rows[READ[1]].append(np.concatenate([trained for _, trained in parts]))
            rows[READ[2]].append(np.repeat(np.arange(1, len(parts) + 1), [len(ids) for ids, _ in parts]))
        return self.source.batch(numbers) | {name: stack(own, 0) for name, own in rows.items()}


def align_answers(aligner: Aligner, batch: Mapping[str, Any]) -> Aligned:
    """Align the answers of a batch with the arrays of `READ`; all arrays are NumPy's."""
    ids_BT, labels_BT = batch["input_ids_BT"], batch["labels"]
    documents_BT = batch.get("documents_BT", np.ones_like(ids_BT))
    found = []
    for row in range(len(ids_BT)):
        given = [batch[name][row] for name in READ]
        n_other = int((given[2] != 0).sum())
        other, trained, numbers = (array[:n_other] for array in given)
        own_ends = np.full(len(ids_BT[row]), -1.0)
        ends = np.full(n_other, -1.0)
        hidden: set[int] = set()
        at = 0
        for document in range(1, int(numbers.max(initial=0)) + 1):
            # Positions with labels: the token after each is a part of an answer.
            mine = runs((labels_BT[row] != IGNORE) & (documents_BT[row] == document))
            theirs = runs((trained != 0) & (numbers == document))
            for (begin, end), (first, last) in zip(mine, theirs, strict=False):
                if first == 0:
                    continue
                own = [aligner.student_bytes[int(index)] or b"\0" for index in labels_BT[row][begin:end]]
                others = [aligner.teacher_bytes[int(index)] or b"\0" for index in other[first:last]]
                sizes, other_sizes, differs = common_ends(own, others)
                if differs:  # one of them has a space before the answer
                    hidden.add(begin)
                # Before the first token, and after each but the last, which predicts what is no answer.
                own_ends[begin:end] = [at, *(at + size for size in sizes[:-1])]
                ends[first - 1 : last - 1] = [at, *(at + size for size in other_sizes[:-1])]
                at += int(max(sizes[-1], other_sizes[-1])) + 2
        found.append(
            Row(
                other.tolist(),
                filled(ends, OTHER_BETWEEN).tolist(),
                numbers.tolist(),
                filled(own_ends, BETWEEN).tolist(),
                hidden,
            )
        )
    return aligned_rows(ids_BT, found, aligner.max_tokens)


def runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the stretches of true values, each from its first to after its last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def common_ends(own: Sequence[bytes], other: Sequence[bytes]) -> tuple[list[float], list[float], bool]:
    """Return where the tokens of two sides end in their common text, and whether only one side begins with a space.

    Where the texts differ, the ends do not match either.
    """
    whole = [b"".join(own), b"".join(other)]
    dropped = [0, 0]
    spaces = [text.startswith(b" ") for text in whole]
    if spaces[0] != spaces[1]:
        dropped[spaces.index(True)] = 1
    texts = [text[skipped:] for text, skipped in zip(whole, dropped, strict=True)]
    pairs = zip(*texts, strict=False)
    shared = next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), min(map(len, texts)))
    found = []
    for parts, skipped, between in zip((own, other), dropped, (BETWEEN, OTHER_BETWEEN), strict=True):
        ends = np.maximum(np.cumsum([len(part) for part in parts]) - skipped, 0).astype(np.float64)
        found.append(np.where(ends <= shared, ends, shared + between).tolist())
    return found[0], found[1], any(dropped)


def filled(ends: NDArray[np.float64], between: float) -> NDArray[np.float64]:
    """Return ends in which tokens outside of answers end between those of the answers before and after them."""
    found = ends.copy()
    last = -1.0
    for index, end in enumerate(ends.tolist()):
        last = end if end >= 0 else np.floor(last) + between
        found[index] = last
    return found
