"""Encode long texts in parts: sentencepiece takes three times as long for a document as for its lines.

A text is cut only after line ends, and only if tests show that this changes no ids of this tokenizer. Two things could:
a piece that spans a cut, so every piece with white space inside is encoded whole and cut; and rules that look at what is
around a line end (normalization, the space before the first word, patterns that split words), for which there are texts
with all kinds of characters around all kinds of line ends.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain, product

Encode = Callable[[Sequence[str]], list[list[int]]]

PART_CHARACTERS = 400
"""The size of a part. Larger ones are encoded more slowly, smaller ones add calls."""

LONG_CHARACTERS = 2048
"""Shorter texts are not cut: there is little to gain."""

RULES = tuple(map(re.compile, (r"\n(?= ?\S)", r"(?<=\S)\n(?= ?\S)|\n(?= \S)", r"\n(?=\S)", r"(?<=\S)\n(?=\S)")))
"""After which line ends to cut: the first rule that passes the tests. The second is for GPT-2, which takes the last of
several line ends before a word as a token of its own."""

KINDS = ("bpe", "wordpiece")
"""The algorithms whose choices depend on what is near."""

INNER = re.compile("(?s).[\\s\u2581\u0120\u010a]|[\n\u010a].")
"""Pieces that could span a cut: with a space or line end inside, also as sentencepiece and byte-level BPE write them."""

MOST_PROBES = 50_000
"""With more such pieces, texts are not cut."""

LEFT = ("a", "a ", "a  ", "a\t", "a.", "a-", "\u4e2d", "\ue000", "1", "e\u0301", "\u2581", "<s>", "\n", "")
ENDS = ("\n", "\n\n", "\r\n", "\r\n\r\n", "\n \n", "\n\t\n", "\n  \n\n", "\x0b\n", "\u2028\n", "\u3000\n", "\u200b\n")
RIGHT = (
    *("b", " b", "  b", "\tb", "B", " B", "\u4e2d", " \u4e2d", "\ue000", " \ue000", "2", "'s", ".", " = b =", "##b"),
    *("\u0301b", "\u200bb", "\u3000b", "\ufeffb", "\u2581b", " \u2581b", "\ufb01b", "</s>", "<0x0A>"),
)
SURROUNDINGS = tuple(map("".join, product(LEFT, ENDS, RIGHT)))
"""Spaces, tabs, CRLF, Chinese, unknown and combining characters, special tokens around line ends."""


class LongTexts:
    """Encodes texts, those that are long in parts.

    encode: encodes a text. later: other ways to encode a part that is not the first, such as without a dummy space.
    probes: texts that contain what may go wrong in this tokenizer. kind: its algorithm; unigram models are not slower on
    long texts, but add up scores in float32 and choose other pieces of a word when the sum is large.
    """

    def __init__(
        self, kind: str, encode: Encode, later: Callable[[], Sequence[Encode]], probes: Callable[[], Iterable[str]]
    ) -> None:
        self._kind, self._encode, self._later, self._probes = kind, encode, later, probes

    @cached_property
    def way(self) -> tuple[re.Pattern[str], Encode] | None:
        """The rule and the way to encode later parts that change no ids; None if there are none."""
        if self._kind not in KINDS:
            return None
        texts = [*SURROUNDINGS, "\n".join(SURROUNDINGS)]
        for text in self._probes():
            texts.append(text)
            if len(texts) > MOST_PROBES:
                return None
        whole = self._encode(texts)
        ways = ((rule, later) for rule in RULES for later in (self._encode, *self._later()))
        return next((way for way in ways if self._is_right(way, texts, whole)), None)

    def _is_right(self, way: tuple[re.Pattern[str], Encode], texts: Sequence[str], whole: list[list[int]]) -> bool:
        rule, later = way
        cut = [index for index, text in enumerate(texts) if rule.search(text)]
        return self._joined([parts_of(texts[index], rule, 0) for index in cut], later) == [whole[i] for i in cut]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text."""
        if all(len(text) < LONG_CHARACTERS for text in texts) or self.way is None:
            return self._encode(texts)
        rule, later = self.way
        return self._joined(
            [parts_of(text, rule, PART_CHARACTERS) if len(text) >= LONG_CHARACTERS else [text] for text in texts], later
        )

    def cut(self, text: str, n_characters: int) -> list[str]:
        """Return parts of at least so many characters that are encoded as texts of their own; their ids are joined."""
        if len(text) <= n_characters or self.way is None or self.way[1] is not self._encode:
            return [text]
        return parts_of(text, self.way[0], n_characters)

    def _joined(self, cut: Sequence[list[str]], later: Encode) -> list[list[int]]:
        if later is self._encode:
            ids = iter(self._encode(list(chain.from_iterable(cut))))
            return [join([next(ids) for _ in parts]) for parts in cut]
        first = self._encode([parts[0] for parts in cut])
        ids = iter(later(list(chain.from_iterable(parts[1:] for parts in cut))))
        return [
            join([ids_of_first, *(next(ids) for _ in parts[1:])])
            for ids_of_first, parts in zip(first, cut, strict=True)
        ]


def join(parts: Sequence[list[int]]) -> list[int]:
    """Return the ids of the parts in one list."""
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))


def parts_of(text: str, rule: re.Pattern[str], n_characters: int) -> list[str]:
    """Cut a text at the first place after every so many characters."""
    parts, start = [], 0
    while (match := rule.search(text, start + n_characters)) is not None:
        parts.append(text[start : match.end()])
        start = match.end()
    return [*parts, text[start:]]


def spanning(text: str) -> Iterable[str]:
    """Yield texts of a piece that `INNER` finds: as it is, and with a line end for each of its inner spaces."""
    yield text
    for index in range(1, len(text)):
        if text[index].isspace():
            yield f"{text[:index]}\n{text[index + 1 :]}"
