"""Probabilities that a server gave for the tokens of an answer, as targets for the tokens of a student.

The server's tokens and alternatives are aligned by bytes and written in the student's pieces, as in distilling/vocabulary_map.py:
an alternative stands for the first of its pieces. What the alternatives leave is one category more. Tokens of the student at
which no token of the server begins, and tokens that end the answer, are learned as the data has them.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.pieces import by_bytes, pieces_of

N_KEPT = 21
"""Tokens per target: 20 alternatives, as many as the protocol has, and the token itself."""

WHOLE = 65535
"""The integer that stands for probability 1."""

Targets = tuple[list[int], list[int]]
"""The ids and the probabilities, in parts of `WHOLE`, of N_KEPT tokens for each token of an example."""


class SoftTargets:
    """Makes the targets of examples for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._pieces: dict[bytes, tuple[int, ...]] = {}

    @cached_property
    def known(self) -> dict[bytes, int]:
        """The pieces by their bytes; most data has no probabilities and needs none."""
        return by_bytes(self.tokenizer)

    def pieces(self, data: bytes) -> tuple[int, ...]:
        """Return the student's pieces of a token of the server."""
        if data not in self._pieces:
            self._pieces[data] = pieces_of(data, self.tokenizer, self.known)
        return self._pieces[data]

    def make(self, ids: Sequence[int], trained: Sequence[bool], logprobs: Sequence[Mapping[str, Any]]) -> Targets:
        """Return the targets of an example whose last answer has log-probabilities, in the form of server_answers.py."""
        found_ids = [index for index in ids for _ in range(N_KEPT)]
        found = [WHOLE if place == 0 else 0 for _ in ids for place in range(N_KEPT)]
        last = max((index for index, flag in enumerate(trained) if flag), default=-1)
        first = last
        while first > 0 and trained[first - 1]:
            first -= 1
        starts: dict[int, Mapping[str, Any]] = {}
        at = 0
        for token in logprobs:
            starts[at] = token
            at += len(token["bytes"])
        written = b"".join(bytes(token["bytes"]) for token in logprobs)
        own = [self.tokenizer.piece_bytes(index) for index in ids[first : last + 1]]
        text = b"".join(own)
        # The space that some tokenizers add before a text is none of it.
        added = int(text.startswith(b" ") and not written.startswith(b" "))
        begin = -added
        for place, data in enumerate(own, start=first):
            if data and begin in starts and written[:begin] == text[added : added + begin]:
                self._fill(found_ids, found, place, ids[place], starts[begin])
            begin += len(data)
        return found_ids, found

    def _fill(self, ids: list[int], shares: list[int], place: int, label: int, token: Mapping[str, Any]) -> None:
        """Write the target of one token."""
        actual = bytes(token["bytes"])
        probabilities = {bytes(data): math.exp(min(0.0, logprob)) for data, logprob in token["top"]}
        probabilities.setdefault(actual, math.exp(min(0.0, token["logprob"])))
        total = max(1.0, sum(probabilities.values()))
        mass: defaultdict[int, float] = defaultdict(float)
        for data, probability in probabilities.items():
            pieces = self.pieces(data)
            goes_on = data == actual and len(pieces) == 1 and self.tokenizer.piece_bytes(label).startswith(data)
            if goes_on:  # the label goes on beyond the server's token: it says nothing of another piece
                mass[label] += probability / total
            elif pieces:
                mass[pieces[0]] += probability / total
        kept = sorted(mass.items(), key=lambda pair: (-pair[1], pair[0]))[:N_KEPT]
        for column in range(N_KEPT):
            index, probability = kept[column] if column < len(kept) else (kept[0][0] if kept else label, 0.0)
            ids[place * N_KEPT + column] = index
            shares[place * N_KEPT + column] = round(probability * WHOLE)


def checked_logprobs(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the log-probabilities of a row, or none if they are not of this form."""
    if not isinstance(value, list):
        return ()
    for token in value:
        if not isinstance(token, dict) or not is_token(token.get("bytes"), token.get("logprob")):
            return ()
        top = token.get("top")
        if not isinstance(top, list) or not all(
            isinstance(one, list) and len(one) == 2 and is_token(*one) for one in top
        ):
            return ()
    return tuple(value)


def is_token(data: Any, logprob: Any) -> bool:
    """Tell whether a value is the bytes of a token with a log-probability."""
    is_bytes = isinstance(data, list) and all(isinstance(one, int) and 0 <= one < 256 for one in data)
    return is_bytes and isinstance(logprob, (int, float)) and math.isfinite(logprob)
