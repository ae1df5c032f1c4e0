"""Check what a `tokenizer.json` or `vocab.json` says before a library believes it.

The Rust library allocates by the ids it reads, runs any regular expression, and aborts or panics on some values. The
checks here are of sizes, ids, expressions and growth; whether the tokenizer is a good one is not their concern.
"""

import os
import sys
import tempfile
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.tokenizer.patterns import EndlessPatternError, check_pattern

MAX_VOCAB_SIZE = 1 << 24
"""Larger ids mean a damaged file: no vocabulary comes near, and memory is allocated for every id below."""
MAX_STEPS = 1000
MAX_NESTING = 32
MAX_GROWTH = 100
"""Characters that one character may become: NFKC makes up to 18 of one."""
HINT = "download the tokenizer again"
OTHER = "\ufdd0"
"""Stands for every character that no step names: a noncharacter."""


def check_ids(ids: Mapping[str, Any], name: str) -> None:
    """Check the ids of a vocabulary.

    Raises: ArtifactError naming the first that is no id, or is one of two tokens.
    """
    taken: dict[int, str] = {}
    for piece, index in ids.items():
        if type(index) is not int or not 0 <= index < MAX_VOCAB_SIZE:
            raise ArtifactError(
                f"`{name}` has the id {str(index)[:40]} for `{piece[:40]}`, not one from 0 to {MAX_VOCAB_SIZE - 1}",
                HINT,
            )
        if index in taken:
            raise ArtifactError(f"`{name}` gives the id {index} to `{taken[index][:40]}` and to `{piece[:40]}`", HINT)
        taken[index] = piece


def check_tokenizer(content: Any) -> None:
    """Check a parsed `tokenizer.json`.

    Raises: ArtifactError naming what is wrong.
    """
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ArtifactError("`tokenizer.json` has no `model`", HINT)
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        check_ids(vocabulary, "tokenizer.json")
    elif isinstance(vocabulary, list):
        check_scores(vocabulary, content["model"].get("unk_id"))
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(is_added(token) for token in added):
        raise ArtifactError("`added_tokens` in `tokenizer.json` is not a list of tokens with `content` and `id`", HINT)
    if not vocabulary and not added:
        raise ArtifactError("`tokenizer.json` has no tokens", HINT)
    # The library itself leaves out an added token whose text is in the vocabulary.
    check_ids({token["content"]: token["id"] for token in added}, "tokenizer.json")
    for part in ("normalizer", "decoder", "pre_tokenizer", "post_processor"):
        steps = list(steps_of(content.get(part), part))
        for step in steps:
            check_step(step, part)
        if part in ("normalizer", "decoder"):
            check_growth(steps, part)


def check_scores(vocabulary: list[Any], unknown: Any) -> None:
    """Check a unigram vocabulary: pairs of a piece and a score.

    Raises: ArtifactError.
    """
    if len(vocabulary) > MAX_VOCAB_SIZE or not all(
        isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], (int, float))
        for row in vocabulary
    ):
        raise ArtifactError("`model.vocab` in `tokenizer.json` is not a list of pieces with scores", HINT)
    if unknown is not None and (type(unknown) is not int or not 0 <= unknown < len(vocabulary)):
        raise ArtifactError(f"`model.unk_id` in `tokenizer.json` is {str(unknown)[:40]}, which is no piece", HINT)


def is_added(token: Any) -> bool:
    """Tell whether this describes an added token."""
    return isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token


def steps_of(part: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder in order, those of sequences too.

    Raises: ArtifactError if they are too many or nested too deeply.
    """
    waiting, n_steps = [(part, 0)], 0
    while waiting:
        step, depth = waiting.pop()
        n_steps += 1
        if depth > MAX_NESTING or n_steps > MAX_STEPS:
            raise ArtifactError(f"`{name}` in `tokenizer.json` has too many steps, or nests them too deeply", HINT)
        if not isinstance(step, dict):
            continue
        inner = [step.get(key) for key in ("normalizers", "pretokenizers", "decoders", "processors")]
        for steps in inner:
            if isinstance(steps, list):
                waiting += [(each, depth + 1) for each in reversed(steps)]
        yield step


def check_step(step: Mapping[str, Any], part: str) -> None:
    """Check one step: its expression, its numbers, its table.

    Raises: ArtifactError.
    """
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        expression = pattern["Regex"]
        try:
            check_pattern(expression, f"`{part}` in `tokenizer.json`")
        except EndlessPatternError:
            if not ends(expression):
                raise
    if step.get("type") == "FixedLength" and step.get("length") == 0:
        raise ArtifactError(f"`{part}` in `tokenizer.json` cuts a text into pieces of length 0", HINT)


def ends(pattern: str) -> bool:
    r"""Tell whether a pattern that looks endless ends on the texts that would make it so.

    `(\p{L}\p{M}*)+` has one way to match, since no letter is a mark. Oniguruma gives up after ten million steps.
    """
    import tokenizers

    signs = sorted({sign for sign in pattern if sign.isalnum()})[:48] + list("a0 \n\t!-é猫\u0301")
    # Every character comes last: the engine looks for those that must be there before it tries anything.
    texts = [sign * 48 + end + "".join(signs) for sign in signs for end in ("", "!", "\x01", "a", "0")]
    texts += [(one + two) * 24 + "\x01" + "".join(signs) for one in signs[-9:] for two in signs[:24]]
    try:
        with quiet():
            split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
            for text in texts:
                split.pre_tokenize_str(text)
    except BaseException as error:  # noqa: BLE001 - a panic of Rust code is no Exception
        raise_interrupts(error)
        return False
    return True


def check_growth(steps: list[dict[str, Any]], part: str) -> None:
    """Check how many characters one character can become in all steps.

    A step that replaces `a` by `aa` doubles a text; thirty of them make a billion characters of one.
    Raises: ArtifactError.
    """
    changes = [change for step in steps if (change := change_of(step, part)) is not None]
    for sign in {sign for change in changes for sign in change.old} | {OTHER}:
        known, unknown = Counter({sign: 1}), 0.0
        for change in changes:
            known, unknown = change.grown(known, unknown)
            if known.total() + unknown > MAX_GROWTH:
                raise ArtifactError(
                    f"`{part}` in `tokenizer.json` makes more than {MAX_GROWTH} characters of one", HINT
                )


@dataclass(frozen=True)
class Change:
    """A step that replaces `old`, or (if empty) what an expression matches with at least `shortest` characters."""

    old: str
    shortest: int
    new: str

    def grown(self, known: Counter[str], unknown: float) -> tuple[Counter[str], float]:
        """Return upper bounds of the characters after this step: by character, and of those that may be any."""
        length = len(self.new)
        if not self.old:
            total = known.total() + unknown
            return Counter(), total * max(1, length / self.shortest) if self.shortest else total + (total + 1) * length
        after = Counter(known)
        n_matches = after.pop(self.old) if self.old in after else after[self.old[0]]
        after.update({sign: n_matches * count for sign, count in Counter(self.new).items()})
        return after, unknown * max(1, length / len(self.old))


def change_of(step: Mapping[str, Any], part: str) -> Change | None:
    """Return what a step replaces by what, None if it does nothing of the kind."""
    if step.get("type") == "Precompiled":
        return Change("", 1, OTHER * longest_replacement(step.get("precompiled_charsmap"), part))
    pattern, new = step.get("pattern"), step.get("content")
    if step.get("type") != "Replace" or not isinstance(pattern, dict) or not isinstance(new, str):
        return None
    old = pattern.get("String")
    if isinstance(old, str):
        return Change(old, len(old), new)
    return Change("", shortest_match(pattern.get("Regex"), part), new)


def shortest_match(pattern: Any, part: str) -> int:
    """Return the length of the shortest match of an expression that has been checked, 0 if it looks endless."""
    with suppress(EndlessPatternError):
        return check_pattern(pattern, part) if isinstance(pattern, str) else 0
    return 0


def longest_replacement(table: Any, part: str) -> int:
    """Return the length of the longest replacement in a table of sentencepiece.

    It is the size of a trie, the trie, and the replacements, each ended by NUL.
    Raises: ArtifactError for a table that is none.
    """
    if not table:
        return 1
    try:
        data = b64decode(table, validate=True)
    except (ValueError, TypeError):
        data = b""
    longest = longest_text(data)
    if longest is None:
        raise ArtifactError(f"`precompiled_charsmap` of `{part}` in `tokenizer.json` is damaged", HINT)
    return longest


def longest_text(data: bytes) -> int | None:
    """Return the length of the longest replacement in a decoded table, None if it is damaged."""
    size = int.from_bytes(data[:4], "little")
    texts = data[4 + size :]
    if len(data) < 4 or size % 4 or size < 4 or len(data) < 4 + size or not texts.endswith(b"\0"):
        return None
    return max(len(text.decode(errors="replace")) for text in texts.split(b"\0"))


def raise_interrupts(error: BaseException) -> None:
    """Raise what is no error of a library again: Ctrl-C, exits, exhausted memory."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
        raise error


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what native code writes to stderr, and drop it if the block fails.

    Rust's panics print a message and a stack trace before Python sees an exception.
    """
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, ValueError, AttributeError):  # no stderr to protect
        yield
        return
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)
            held.seek(0)
            os.write(2, held.read())
    finally:
        os.close(saved)
