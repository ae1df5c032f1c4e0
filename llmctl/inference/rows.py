"""Texts as the rows that a model reads whole: special tokens around them, cut to its context, batched by length.

Training on labels and measuring them go through here, so that both see the same ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded
from llmctl.data.batches import stack
from llmctl.errors import UsageError
from llmctl.tokenizer.base import Tokenizer

BATCH_TOKENS = 16384
"""Positions in one forward pass at most, padding included, whatever the batch size: bounds the memory."""


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


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of rows in batches of like lengths, the longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    at = 0
    while at < len(order):
        size = max(1, min(batch_size, BATCH_TOKENS // max(lengths[order[at]], 1)))
        yield order[at : at + size]
        at += size


def padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """Return ids (B, T) padded on the right, and the documents (B, T) that say what is padding, None without any."""
    ids_BT = stack([np.array(row, dtype=np.int64) for row in rows], 0)
    if len({len(row) for row in rows}) == 1:
        return torch.from_numpy(ids_BT).to(device), None
    documents_BT = stack([np.ones(len(row), dtype=np.int64) for row in rows], 0)
    return torch.from_numpy(ids_BT).to(device), torch.from_numpy(documents_BT).to(device)


def device_of(loaded: Loaded) -> torch.device:
    """Return where a model's weights are."""
    return loaded.model.device


def row_outputs(loaded: Loaded, rows: Sequence[Row], batch_size: int, pooling: str = "") -> Tensor:
    """Return for every row the outputs of the classification head, or with `pooling` its pooled state; float32, CPU.

    Shapes: (N, n_labels), or (N, D).
    """
    model = loaded.model
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for numbers in by_length([len(row.ids) for row in rows], batch_size):
            ids_BT, documents_BT = padded([rows[n].ids for n in numbers], device_of(loaded))
            types_BT = padded([rows[n].types for n in numbers], device_of(loaded))[0]
            inputs = {"documents_BT": documents_BT, "token_types_BT": types_BT if model.config.n_token_types else None}
            outputs = model.pooled(ids_BT, **inputs, pooling=pooling) if pooling else model.classify(ids_BT, **inputs)
            found |= dict(zip(numbers, outputs.float().cpu(), strict=True))
    return torch.stack([found[number] for number in range(len(rows))])
