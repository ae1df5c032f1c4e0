"""Texts to rows of token ids: what stands before and after them, and where they are cut."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from llmctl.artifacts.load import Loaded
from llmctl.errors import UsageError
from llmctl.tokenizer.base import Tokenizer


def encode_around(tokenizer: Tokenizer, text: str, specials: Mapping[str, int]) -> list[int]:
    """Return a text's ids with the given words as their special tokens; all else is literal.

    The space before such a word belongs to what the word stands for, where tokens carry their space.
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
    """Return what stands before, between and after the given words, and at the odd places the words themselves."""
    pattern = "|".join(re.escape(word) for word in words)
    return re.split(f"({pattern})", text) if words else [text]


def carries_spaces(tokenizer: Tokenizer) -> bool:
    """Tell whether there are tokens such as ` word`; a vocabulary of single characters has none."""
    pieces = (tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size))
    return any(data[:1] == b" " and data.strip() for data in pieces)


def encode_prompt(loaded: Loaded, text: str) -> list[int]:
    """Return a prompt's ids as the model was trained to see the beginning of a text, or a whole source.

    In a source `<extra_id_0>`, `<extra_id_1>`, ... are the gaps to fill of a model trained on spans.
    Raises: UsageError for a model without a tokenizer.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UsageError(f"`{loaded.artifact.path}` has no tokenizer", "--ids takes and gives token ids")
    if loaded.model.config.family == "encoder_decoder":
        sentinels = {f"<extra_id_{n}>": index for n, index in enumerate(tokenizer.sentinel_ids())}
        return [*encode_around(tokenizer, text, sentinels), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
    ids = tokenizer.encode(text, bos=loaded.begins_with_bos)
    if not ids and tokenizer.eos_id is not None:  # an empty prompt still needs something to go on from
        return [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    return ids


@dataclass(frozen=True)
class Row:
    """The ids of a text or a pair of texts, which part each belongs to (0 or 1), and how many ids were cut off."""

    ids: list[int]
    types: list[int] = field(default_factory=list)
    n_cut: int = 0


def require_tokenizer(loaded: Loaded) -> Tokenizer:
    """Return the tokenizer of a model.

    Raises: UsageError when it has none.
    """
    if loaded.tokenizer is None:
        raise UsageError(f"`{loaded.artifact.path}` has no tokenizer", "import the model with its tokenizer files")
    return loaded.tokenizer


def longest_row(loaded: Loaded, seq_len: int = 0) -> int:
    """Return how many tokens a row may have: the model's context, or less where that is asked for.

    Raises: UsageError for more than the context.
    """
    limit = loaded.model.config.max_positions
    if seq_len > limit:
        raise UsageError(f"--seq-len {seq_len} is more than the context of `{loaded.artifact.path}`, {limit} tokens")
    return seq_len or limit


def encode_rows(loaded: Loaded, texts: Sequence[tuple[str, ...]], limit: int) -> list[Row]:
    """Return the rows of texts, or of pairs of them, for a model that reads them whole.

    An encoder reads `<bos> a <eos> b <eos>` (BERT's [CLS] a [SEP] b [SEP]), an encoder-decoder `a <eos> b <eos>`, a
    decoder `<bos> a`, with a new line between two texts. What is too long is cut at the end, of a pair the longer
    text first.
    """
    tokenizer, family = require_tokenizer(loaded), loaded.model.config.family
    if family == "decoder":
        texts = [("\n".join(parts),) for parts in texts]
    bos = tokenizer.bos_id if family == "encoder" or (family == "decoder" and loaded.begins_with_bos) else None
    eos = None if family == "decoder" else tokenizer.eos_id
    flat = tokenizer.encode_batch([part for parts in texts for part in parts])
    rows, at = [], 0
    for parts in texts:
        rows.append(_joined(flat[at : at + len(parts)], bos, eos, limit))
        at += len(parts)
    return [row if row.ids else Row([_something(tokenizer)], [0]) for row in rows]


def _joined(parts: Sequence[list[int]], bos: int | None, eos: int | None, limit: int) -> Row:
    room = limit - (bos is not None) - len(parts) * (eos is not None)
    kept = cut_longest([len(part) for part in parts], max(room, 0))
    ids = [] if bos is None else [bos]
    types = [0] * len(ids)
    for number, (part, length) in enumerate(zip(parts, kept, strict=True)):
        new = part[:length] + ([] if eos is None else [eos])
        ids += new
        types += [min(number, 1)] * len(new)
    return Row(ids, types, sum(map(len, parts)) - sum(kept))


def cut_longest(lengths: Sequence[int], room: int) -> list[int]:
    """Return the lengths after the longest are cut, one at a time, until all fit into `room`.

    What transformers calls `longest_first`; the later of two that are as long is cut first.
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


def _something(tokenizer: Tokenizer) -> int:
    """Return a token for an empty text to be read at all."""
    return next((index for index in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if index is not None), 0)
