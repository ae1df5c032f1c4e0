"""Evaluate on raw text: perplexity and bits per byte of a decoder, masked tokens of an encoder."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch

from llmctl.artifacts.load import Loaded
from llmctl.config import EvaluateConfig
from llmctl.data.masking import IGNORE, Masking, mask_tokens
from llmctl.errors import UsageError
from llmctl.evaluating.result import Measured
from llmctl.inference.encoding import longest_row, require_tokenizer
from llmctl.inference.likelihood import ScoredRow, likelihoods, token_losses
from llmctl.inference.rows import by_length, device_of, padded
from llmctl.metrics.figures import Sums

WINDOWS = 64
"""Windows prepared at a time, then sorted into batches by length."""


def evaluate_text(loaded: Loaded, texts: Iterable[str], config: EvaluateConfig) -> Measured:
    """Measure how well a decoder predicts texts, in windows of `seq_len` tokens that start `stride` tokens apart.

    A text is encoded as a whole, with a begin token if the model was trained with one, and without an end token. Every
    token is scored once, by the first window that contains it. The first token of a window has no context and cannot be
    scored by it, so adjacent windows (the default) leave out one token each, as in transformers' guide to the perplexity
    of fixed-length models. A stride below the window length scores all tokens but the first of a text, with more context.
    """
    width = longest_row(loaded, config.seq_len)
    stride = config.stride or width
    if not 1 <= stride <= width or width < 2:
        raise UsageError(f"`--stride {stride}` does not fit windows of {width} tokens", f"use 1 to {width}")
    tokenizer = require_tokenizer(loaded)
    bytes_V = tokenizer.token_bytes()
    total, n_rows, n_tokens = Sums(), 0, 0
    rows = islice(_windows(loaded, texts, width, stride), config.limit or None)
    # A bounded number of windows at a time: enough to sort them by length, few enough for any size of file.
    while batch := list(islice(rows, WINDOWS)):
        for row, scored in zip(batch, likelihoods(loaded, batch, config.batch_size), strict=True):
            n_bytes = int(bytes_V[row.ids[row.first :]].sum())
            total += Sums(scored.nats, scored.count, n_bytes, scored.n_correct)
        n_rows += len(batch)
        n_tokens += sum(len(row.ids) for row in batch)
    return Measured(_metrics(total, "the data contains no text to predict"), n_rows, n_tokens)


def _windows(loaded: Loaded, texts: Iterable[str], width: int, stride: int) -> Iterator[ScoredRow]:
    tokenizer = require_tokenizer(loaded)
    for text in texts:
        ids = [*loaded.frame.before, *tokenizer.encode(text)]
        for begin, first, end in windows(len(ids), width, stride):
            yield ScoredRow(ids[begin:end], first - begin)


def windows(n_tokens: int, width: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first scored token, end) of the windows over a text, skipping windows that score nothing."""
    done = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + width, n_tokens)
        # No context for a window's first token, and no second score for tokens of the window before.
        first = max(begin + 1, done)
        if first < end:
            yield begin, first, end
        done = end
        if end == n_tokens:
            return


def evaluate_mask(loaded: Loaded, texts: Iterable[str], config: EvaluateConfig) -> Measured:
    """Measure how well an encoder predicts masked tokens: `mask_frac` of each piece, masked as in BERT.

    A text is cut into pieces that fill the context, each between begin and end token. The masks depend only on the seed,
    the piece number and its ids, so that models with the same tokenizer get the same masks.
    """
    tokenizer, width = require_tokenizer(loaded), longest_row(loaded, config.seq_len)
    if tokenizer.mask_id is None:
        raise UsageError(
            f"`{loaded.artifact.path}` has no mask token", "`llmctl pretrain --objective mlm` trains a model with one"
        )
    bytes_V = tokenizer.token_bytes()
    masking = Masking(tokenizer.mask_id, config.mask_frac, bytes_V == 0)
    pieces = islice(_pieces(loaded, texts, width), config.limit or None)
    total, n_rows, n_tokens = Sums(), 0, 0
    while batch := list(islice(pieces, WINDOWS)):
        masked = []
        for number, piece in enumerate(batch, start=n_rows):
            # Seeded per piece, so that masks do not depend on `--batch-size` or `--limit`.
            rng = np.random.default_rng([config.seed, number])
            masked.append(mask_tokens(np.array(piece, dtype=np.int64), rng, masking))
        total += _masked_sums(loaded, masked, bytes_V, config.batch_size)
        n_rows += len(batch)
        n_tokens += sum(map(len, batch))
    figures = _metrics(total, "the data contains no text to mask")
    return Measured(figures, n_rows, n_tokens)


def _pieces(loaded: Loaded, texts: Iterable[str], width: int) -> Iterator[list[int]]:
    tokenizer = require_tokenizer(loaded)
    head, _, tail = loaded.frame
    room = width - len(head) - len(tail)
    if room < 1:
        raise UsageError(
            f"`--seq-len {width}` leaves no room for text between begin and end token",
            f"use `--seq-len {len(head) + len(tail) + 1}` or more",
        )
    for text in texts:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), room):
            yield [*head, *ids[start : start + room], *tail]


def _masked_sums(
    loaded: Loaded, rows: list[tuple[np.ndarray, np.ndarray]], bytes_V: np.ndarray, batch_size: int
) -> Sums:
    total = Sums()
    with torch.inference_mode():
        for numbers in by_length([len(inputs) for inputs, _ in rows], batch_size):
            ids_BT, documents_BT = padded([rows[number][0].tolist() for number in numbers], device_of(loaded))
            hidden_BTD = loaded.model.hidden(ids_BT, documents_BT=documents_BT)
            positions = [np.flatnonzero(rows[number][1] != IGNORE) for number in numbers]
            # Only masked positions reach the head, whose logits are the largest tensor.
            states_ND = torch.cat([hidden_BTD[n, torch.from_numpy(part)] for n, part in enumerate(positions)])
            labels = np.concatenate([rows[number][1][part] for number, part in zip(numbers, positions, strict=True)])
            nats_N, right_N = token_losses(loaded.model, states_ND, torch.from_numpy(labels).to(states_ND.device))
            total += Sums(float(nats_N.sum()), len(labels), int(bytes_V[labels].sum()), int(right_N.sum()))
    return total


def _metrics(total: Sums, message: str) -> dict[str, float]:
    if not total.count:
        raise UsageError(message, "use a file with more text")
    figures = total.figures()
    return {name: figures[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "n_labels", "n_bytes")}
