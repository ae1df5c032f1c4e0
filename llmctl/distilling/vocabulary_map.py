"""Map the vocabularies of a teacher and a student onto events of which both have probabilities.

Where both have read the same text, a token of the teacher says which token of the student comes next: the first of those that
its bytes consist of. So the teacher's distribution over its tokens becomes one over the student's. Tokens of the student that
no token of the teacher begins with, because the teacher writes them in several pieces, share an event with the piece that
those begin with. For equal vocabularies in another order this is the reordering, and nothing is lost.

Inside a token of the teacher, where the student has already written a part of it, the tokens that continue this part give the
distribution of the student's next one.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.pieces import by_bytes, pieces_of

Ints = NDArray[np.int64]
NOTHING = -1


@dataclass
class VocabularyMap:
    """The events of two vocabularies.

    student_event (V): the event of each token of the student. teacher_event (W): of the teacher, -1 for one that the student
    cannot write. pieces: the student's tokens of each of the teacher's.
    """

    student_event: Ints
    teacher_event: Ints
    n_events: int
    pieces: list[tuple[int, ...]]
    student_bytes: list[bytes]
    _sorted: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    _known: dict[tuple[int, ...], tuple[Ints, Ints]] = field(default_factory=dict)

    def continuations(self, written: tuple[int, ...]) -> tuple[Ints, Ints]:
        """Return the teacher's tokens that begin with pieces which the student has written, and the event of the next piece.

        It is -1 for the token that ends with them: what comes next, this prediction does not tell.
        """
        if written not in self._known:
            self._sorted = self._sorted or sorted((own, index) for index, own in enumerate(self.pieces) if own)
            begin = bisect_left(self._sorted, (written, -1))
            end = bisect_left(self._sorted, ((*written[:-1], written[-1] + 1), -1))
            some = self._sorted[begin:end]
            after = [own[len(written)] if len(own) > len(written) else NOTHING for own, _ in some]
            events = [NOTHING if one == NOTHING else int(self.student_event[one]) for one in after]
            found = np.array([index for _, index in some], dtype=np.int64), np.array(events, dtype=np.int64)
            self._known[written] = found
        return self._known[written]

    def beyond(self, token: int, written: tuple[int, ...], label: int) -> tuple[int, int]:
        """Return a token of the teacher and its event, where the student's next piece goes on beyond it; else -1, -1."""
        own, n_written = self.pieces[token], len(written)
        if len(own) != n_written + 1 or own[:n_written] != written or own[-1] == label:
            return NOTHING, NOTHING
        last, longer = self.student_bytes[own[-1]], self.student_bytes[label]
        event = int(self.student_event[own[-1]])
        if not last or not longer.startswith(last) or event == self.student_event[label]:
            return NOTHING, NOTHING
        return token, event


def map_vocabularies(student: Tokenizer, teacher: Tokenizer, specials: Mapping[int, int]) -> VocabularyMap:
    """Return the events of two tokenizers; specials: the teacher's id of special tokens of the student."""
    own, other = by_bytes(student), by_bytes(teacher)
    names = {student.piece(index): index for index in range(student.vocab_size)}
    pieces = [in_pieces(index, student, teacher, own, names) for index in range(teacher.vocab_size)]
    for mine, theirs in specials.items():
        # A token of the teacher may have two roles: the first one is meant, the end of a text rather than padding.
        pieces[theirs] = pieces[theirs] or (mine,)
    reached = {found[0] for found in pieces if found}
    event_of: dict[int, int] = {}
    for index in range(student.vocab_size):
        if index in reached:
            event_of[index] = len(event_of)
    n_events = len(event_of)
    for index in range(student.vocab_size):
        if index in event_of:
            continue
        first = pieces_of(student.piece_bytes(index), teacher, other)[:1]
        shared = pieces[first[0]] if first else ()
        if shared:
            event_of[index] = event_of[shared[0]]
        else:  # nothing of the teacher begins with it: an event of probability 0
            event_of[index] = n_events
            n_events += 1
    return VocabularyMap(
        np.array([event_of[index] for index in range(student.vocab_size)], dtype=np.int64),
        np.array([event_of[found[0]] if found else NOTHING for found in pieces], dtype=np.int64),
        n_events,
        pieces,
        [student.piece_bytes(index) for index in range(student.vocab_size)],
    )


def in_pieces(
    index: int, student: Tokenizer, teacher: Tokenizer, own: dict[bytes, int], names: dict[str, int]
) -> tuple[int, ...]:
    """Return the student's tokens of one of the teacher's inside a text; none for a special token."""
    data = teacher.piece_bytes(index)
    if not data:
        return ()
    same = own.get(data)
    if same is not None:
        # Two pieces may have the same bytes, as `A` and `<0x41>`: the one of the same name is meant.
        named = names.get(teacher.piece(index))
        return (same if named is None or student.piece_bytes(named) != data else named,)
    return pieces_of(data, student, own)
