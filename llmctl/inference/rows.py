"""Batch rows of ids by length, pad them, and return classification outputs or pooled states.

Classification and evaluation share this code, so that both see the same ids.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded
from llmctl.data.batches import stack
from llmctl.inference.encoding import Row

BATCH_TOKENS = 16384
"""Maximum positions per forward pass, padding included, for any batch size: bounds the memory."""


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield row indices in batches of similar lengths, longest first, so that out-of-memory errors come first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    at = 0
    while at < len(order):
        size = max(1, min(batch_size, BATCH_TOKENS // max(lengths[order[at]], 1)))
        yield order[at : at + size]
        at += size


def padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """Return right-padded ids (B, T), and documents (B, T) with 0 for padding, or None if nothing is padded."""
    ids_BT = stack([np.array(row, dtype=np.int64) for row in rows], 0)
    if len({len(row) for row in rows}) == 1:
        return torch.from_numpy(ids_BT).to(device), None
    documents_BT = stack([np.ones(len(row), dtype=np.int64) for row in rows], 0)
    return torch.from_numpy(ids_BT).to(device), torch.from_numpy(documents_BT).to(device)


def device_of(loaded: Loaded) -> torch.device:
    """Return the device of a model's weights."""
    return loaded.model.device


def row_outputs(loaded: Loaded, rows: Sequence[Row], batch_size: int, pooling: str = "") -> Tensor:
    """Return the classification outputs of every row, or its pooled state if `pooling` is set; float32, on the CPU.

    Shapes: (N, n_labels), or (N, D).
    """
    model = loaded.model
    compute = partial(model.pooled, pooling=pooling) if pooling else model.classify
    return torch.stack(_computed(loaded, rows, batch_size, compute))


def token_outputs(loaded: Loaded, rows: Sequence[Row], batch_size: int) -> list[Tensor]:
    """Return the outputs (T, n_labels) of a head over tokens for every row; float32, on the CPU."""
    outputs = _computed(loaded, rows, batch_size, loaded.model.label_tokens)
    return [outputs_TL[: len(row.ids)] for row, outputs_TL in zip(rows, outputs, strict=True)]


def _computed(loaded: Loaded, rows: Sequence[Row], batch_size: int, compute: Callable[..., Tensor]) -> list[Tensor]:
    """Return what a function of padded batches gives for every row."""
    results: dict[int, Tensor] = {}
    has_types = loaded.model.config.n_token_types > 1  # RoBERTa has a single one, for both texts of a pair
    with torch.inference_mode():
        for numbers in by_length([len(row.ids) for row in rows], batch_size):
            ids_BT, documents_BT = padded([rows[n].ids for n in numbers], device_of(loaded))
            types_BT = padded([rows[n].types for n in numbers], device_of(loaded))[0] if has_types else None
            outputs = compute(ids_BT, documents_BT=documents_BT, token_types_BT=types_BT)
            results |= dict(zip(numbers, outputs.float().cpu(), strict=True))
    return [results[number] for number in range(len(rows))]
