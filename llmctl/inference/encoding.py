"""Encode texts as model inputs: special tokens around them, and truncation to the context."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from llmctl.artifacts.load import Loaded
from llmctl.errors import UsageError
from llmctl.tokenizer.base import Frame, Tokenizer


def encode_around(tokenizer: Tokenizer, text: str, specials: Mapping[str, int]) -> list[int]:
    """Encode a text, replacing the words in `specials` by their token ids; everything else is literal.

    The space before such a word is dropped if the vocabulary has tokens with a leading space: the replacement has it.
    """
    parts = split_at(specials, text)
    carried = len(parts) > 1 and carries_spaces(tokenizer)
    ids = []
    for number, part in enumerate(parts):
        if number % 2:
            ids.append(specials[part])
        else:
            ids += tokenizer.encode(part.removesuffix(" ") if carried and number < len(parts) - 1 else part)
    return ids


def split_at(words: Collection[str], text: str) -> list[str]:
    """Split a text at the given words; the words themselves are at the odd indices of the result."""
    pattern = "|".join(re.escape(word) for word in words)
    return re.split(f"({pattern})", text) if words else [text]


def carries_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether the vocabulary has tokens with a leading space; one of single characters has none."""
    pieces = (tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size))
    return any(data[:1] == b" " and data.strip() for data in pieces)


def encode_prompt(loaded: Loaded, text: str) -> list[int]:
    """Encode a prompt as in training: the beginning of a text, or a whole source (encoder-decoder).

    In a source `<extra_id_0>`, `<extra_id_1>`, ... are the sentinels of span corruption.
    Raises: UsageError for a model without a tokenizer.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UsageError(f"`{loaded.artifact.path}` has no tokenizer", "`--ids` reads and prints token ids")
    if loaded.model.config.family == "encoder_decoder":
        sentinels = {f"<extra_id_{n}>": index for n, index in enumerate(tokenizer.sentinel_ids())}
        before, _, after = loaded.frame
        return [*before, *encode_around(tokenizer, text, sentinels), *after]
    ids = [*loaded.frame.before, *tokenizer.encode(text)]
    if not ids and tokenizer.eos_id is not None:  # an empty prompt still needs one token to continue from
        return [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    return ids


def encode_target(loaded: Loaded, text: str) -> list[int]:
    """Encode the target of an encoder-decoder without its end token.

    What stands before a source does so here too, in the language of the targets.
    """
    tokenizer = require_tokenizer(loaded).for_target
    return [*tokenizer.frame(loaded.model.config.family).before, *tokenizer.encode(text)]


@dataclass(frozen=True)
class Row:
    """The ids of a text or a pair, the token types (0 or 1), and the number of truncated ids."""

    ids: list[int]
    types: list[int] = field(default_factory=list)
    n_cut: int = 0


def require_tokenizer(loaded: Loaded) -> Tokenizer:
    """Return the tokenizer of a model.

    Raises: UsageError if it has none.
    """
    if loaded.tokenizer is None:
        raise UsageError(f"`{loaded.artifact.path}` has no tokenizer", "import the model with its tokenizer files")
    return loaded.tokenizer


def longest_row(loaded: Loaded, seq_len: int = 0) -> int:
    """Return the maximum tokens per row: `seq_len` if given, else the model's context.

    Raises: UsageError for more than the context.
    """
    limit = loaded.model.config.max_positions
    if seq_len > limit:
        raise UsageError(
            f"`--seq-len {seq_len}` exceeds the context of `{loaded.artifact.path}`, {limit} tokens",
            f"use `--seq-len {limit}` or less",
        )
    return seq_len or limit


def encode_rows(loaded: Loaded, texts: Sequence[tuple[str, ...]], limit: int) -> list[Row]:
    """Encode texts or pairs of texts for classification and pooling.

    The special tokens around them are those of the tokenizer: BERT's `[CLS] a [SEP] b [SEP]`, for example. A decoder gets
    `<bos> a`, with a newline between two texts. Long texts are truncated at the end, the longer of a pair first.
    """
    tokenizer, frame = require_tokenizer(loaded), loaded.frame
    if loaded.model.config.family == "decoder":
        texts = [("\n".join(parts),) for parts in texts]
        frame = Frame(frame.before)
    flat = tokenizer.encode_batch([part for parts in texts for part in parts])
    rows, at = [], 0
    for parts in texts:
        rows.append(joined(flat[at : at + len(parts)], frame, limit))
        at += len(parts)
    return [row if row.ids else Row([_empty_token(tokenizer)], [0]) for row in rows]


def joined(parts: Sequence[list[int]], frame: Frame, limit: int) -> Row:
    """Return a text or a pair with the special tokens around it, truncated to `limit` tokens."""
    ends = [frame.between] * (len(parts) - 1) + [frame.after]
    room = limit - len(frame.before) - sum(map(len, ends))
    kept = cut_longest([len(part) for part in parts], max(room, 0))
    ids = list(frame.before)
    types = [0] * len(ids)
    for number, (part, length, end) in enumerate(zip(parts, kept, ends, strict=True)):
        new = [*part[:length], *end]
        ids += new
        types += [min(number, 1)] * len(new)
    return Row(ids, types, sum(map(len, parts)) - sum(kept))


def cut_longest(lengths: Sequence[int], room: int) -> list[int]:
    """Return the lengths after truncating the longest, token by token, until all fit into `room`.

    The `longest_first` strategy of transformers; of two equal lengths the later is cut first.
    """
    kept = list(lengths)
    excess = sum(kept) - room
    while excess > 0:
        order = sorted(range(len(kept)), key=lambda index: (-kept[index], -index))
        longest = order[0]
        second = kept[order[1]] if len(order) > 1 else 0
        step = min(excess, max(kept[longest] - second, 1))
        kept[longest] -= step
        excess -= step
    return kept


def _empty_token(tokenizer: Tokenizer) -> int:
    """Return a token that stands for an empty text: a row needs at least one."""
    return next((index for index in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if index is not None), 0)
