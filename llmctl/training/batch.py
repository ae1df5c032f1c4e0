"""Batches as the loop knows them: arrays by name, `labels` among them, made from row numbers."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmctl.losses.base import IGNORE

Batch = dict[str, np.ndarray]


class BatchSource(Protocol):
    """Batches by row number: the endless training stream, or the rows of a held-out set."""

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the arrays of these rows; `labels` among them."""


def to_device(batch: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Return the arrays as tensors on a device."""
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def positions(batch: Batch) -> int:
    """Return how many positions a batch has where tokens are predicted or pooled: the decoder's of a pair."""
    return int(batch.get("decoder_input_ids_BT", batch["input_ids_BT"]).size)


def idle(batch: Batch) -> Batch:
    """Return a batch without a label: a pass over it takes part in the exchanges and adds nothing."""
    return batch | {"labels": np.full_like(batch["labels"], IGNORE)}
