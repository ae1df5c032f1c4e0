"""Texts for heads over tokens: every token with the characters that it stands for, in windows that fit the context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmctl.artifacts.load import Loaded
from llmctl.inference.encoding import Row, joined, require_tokenizer
from llmctl.tokenizer.base import Span

LARGEST_OVERLAP = 128
"""Tokens that neighboring windows share, at most half of what fits (Devlin et al. 2019's script for SQuAD)."""


@dataclass(frozen=True)
class Window:
    """A part of a text as input of a model.

    text: the number of the text. row: what the model reads. first: where the part's tokens begin in the row. spans: the
    characters of these tokens in the text.
    """

    text: int
    row: Row
    first: int
    spans: list[Span]


def windows(
    loaded: Loaded, texts: Sequence[str], limit: int, prompts: Sequence[str] = ()
) -> tuple[list[Window], set[int]]:
    """Return the windows of texts, in order, and the numbers of the texts whose prompts were truncated.

    prompts: a text that stands before every window of a text, such as the question to which the text holds the answer;
    truncated to half of the limit.
    """
    tokenizer, frame = require_tokenizer(loaded), loaded.frame
    before = tokenizer.encode_batch(list(prompts))
    found, cut = [], set()
    for number, (ids, spans) in enumerate(tokenizer.encode_with_spans(texts)):
        room = limit - len(frame.before) - len(frame.after)
        parts: list[list[int]] = []
        if prompts:
            room -= len(frame.between)
            prompt = before[number][: max(room, 2) // 2]
            if len(prompt) < len(before[number]):
                cut.add(number)
            parts, room = [prompt], room - len(prompt)
        room = max(room, 1)
        first = len(frame.before) + sum(len(part) + len(frame.between) for part in parts)
        for begin, end in ranges(len(ids), room, min(limit // 2, room // 2, LARGEST_OVERLAP)):
            row = joined([*parts, ids[begin:end]], frame, max(limit, first + 1 + len(frame.after)))
            found.append(Window(number, row, first, spans[begin:end]))
    return found, cut


def ranges(length: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of windows of `size` that cover a length, each sharing `overlap` with the one before."""
    begin = 0
    while True:
        end = min(begin + size, length)
        yield begin, end
        if end == length:
            return
        begin += size - overlap
