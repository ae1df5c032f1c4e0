"""Trim a vocabulary to the pieces of a corpus, and measure on held-out text what that changes. Does not import torch."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmctl.errors import UsageError
from llmctl.preparing.tokenize import batched
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.trim import Trimmed, trim

PASSAGE = 400
"""Least characters of the passages that a document is split into, at line ends."""

HELD_OUT_EVERY, MOST_HELD_OUT = 20, 100_000
"""One passage in so many is held out, up to a number."""

SCRIPTS = {"han": ("CJK", "KANGXI"), "kana": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")}
"""Scripts by the first word of the Unicode names of their letters, where it is not their own name."""

NAMES = {word: name for name, words in SCRIPTS.items() for word in words}
MOST_NAMED = 12
"""Scripts that an error names."""


@dataclass(frozen=True)
class Figures:
    """What a changed vocabulary brings, for a report."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers by name, rates to six digits."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """Return the same as text."""
        return [f"{name}: {value}" for name, value in self.to_dict().items()]


@dataclass(frozen=True)
class Comparison(Figures):
    """What a trimmed vocabulary changes on passages; is_held_out: of which its pieces were not counted.

    equal_texts, equal_tokens: the shares of passages with the same pieces as before, and of earlier tokens that were kept.
    """

    vocab_size_before: int
    vocab_size: int
    n_texts: int
    is_held_out: bool
    equal_texts: float
    equal_tokens: float
    bytes_per_token_before: float
    bytes_per_token: float


@dataclass
class Usage:
    """How often a corpus uses each id, and passages to compare tokenizers on; is_held_out: which were not counted."""

    counts: Counter[int]
    texts: list[str]
    is_held_out: bool = True

    @property
    def ranked(self) -> list[int]:
        """The ids that are used, the most frequent first."""
        return sorted(self.counts, key=lambda index: (-self.counts[index], index))


def passages(documents: Iterable[str]) -> Iterator[str]:
    """Split documents at line ends into passages of at least `PASSAGE` characters."""
    for document in documents:
        lines: list[str] = []
        for line in document.splitlines(keepends=True):
            lines.append(line)
            if sum(map(len, lines)) >= PASSAGE:
                yield "".join(lines)
                lines = []
        if lines:
            yield "".join(lines)


def count(tokenizer: Tokenizer, documents: Iterable[str]) -> Usage:
    """Count the ids of a corpus; a target vocabulary's too, where targets are encoded in another way.

    Of a corpus with fewer than `HELD_OUT_EVERY` passages none is held out of the count.
    """
    usage = Usage(Counter(), [])
    encoders = {id(one): one for one in (tokenizer, tokenizer.for_target)}.values()
    number, few = 0, list[str]()
    for batch in batched(passages(documents)):
        counted = []
        for text in batch:
            number += 1
            if number < HELD_OUT_EVERY:
                few.append(text)
            if number % HELD_OUT_EVERY == 0 and len(usage.texts) < MOST_HELD_OUT:
                usage.texts.append(text)
            else:
                counted.append(text)
        for encoder in encoders:
            for ids in encoder.encode_batch(counted):
                usage.counts.update(ids)
    return usage if usage.texts else Usage(usage.counts, few, is_held_out=False)


def of_scripts(tokenizer: Tokenizer, names: Sequence[str]) -> Iterator[int]:
    """Yield the ids of the pieces whose letters are all of some scripts, and of those without letters.

    Raises: UsageError for a script of which the vocabulary has no letter.
    """
    wanted = {first for name in names for first in SCRIPTS.get(name.lower(), (name.upper(),))}
    found: Counter[str] = Counter()
    for index in range(tokenizer.vocab_size):
        try:
            text = tokenizer.piece_bytes(index).decode()
        except UnicodeDecodeError:  # a part of a character: kept with those that are merged from it
            continue
        scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha()}
        found.update(scripts)
        if text and scripts <= wanted:
            yield index
    for name in names:
        if not found.keys() & set(SCRIPTS.get(name.lower(), (name.upper(),))):
            common = dict.fromkeys(NAMES.get(script, script.lower()) for script, _ in found.most_common(MOST_NAMED))
            raise UsageError(
                f"`--keep-chars {name}`: the vocabulary has no letter of this script",
                f"most of its letters are of: {', '.join(common)}",
            )


def trimmed(
    tokenizer: Tokenizer,
    files: Mapping[str, bytes],
    usage: Usage,
    *,
    more: Iterable[int] = (),
    most: int = 0,
    always: Iterable[int] = (),
) -> Trimmed:
    """Return a tokenizer with the pieces that a corpus uses, and more after them; at most `most`.

    always: ids that a model needs for other reasons.
    """
    ranked = dict.fromkeys([*always, *usage.ranked, *more])
    return trim(tokenizer, files, list(ranked), most)


def compare(tokenizer: Tokenizer, result: Trimmed, usage: Usage) -> tuple[Comparison, list[list[int]]]:
    """Return what a trimmed vocabulary changes on texts of a corpus, and the earlier ids of those that it does not change."""
    texts = usage.texts
    kept, equal = set(result.kept), list[list[int]]()
    n_before = n_after = n_same = n_bytes = 0
    for batch in batched(texts):
        before, after = tokenizer.encode_batch(batch), result.tokenizer.encode_batch(batch)
        for text, old, new in zip(batch, before, after, strict=True):
            n_bytes += len(text.encode(errors="replace"))
            n_before, n_after = n_before + len(old), n_after + len(new)
            n_same += sum(index in kept for index in old)
            if [result.kept[index] for index in new] == old:
                equal.append(old)
    comparison = Comparison(
        tokenizer.vocab_size,
        result.tokenizer.vocab_size,
        len(texts),
        usage.is_held_out,
        len(equal) / max(len(texts), 1),
        n_same / max(n_before, 1),
        n_bytes / max(n_before, 1),
        n_bytes / max(n_after, 1),
    )
    return comparison, equal
