"""Batches of the training loop: arrays by name, including `labels`, made from row numbers."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmctl.losses.base import IGNORE

Batch = dict[str, np.ndarray]


class BatchSource(Protocol):
    """Batches by row number, of the endless training stream or of a validation set."""

    @property
    def n_rows(self) -> int:
        """Number of rows in an epoch."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the arrays of these rows, including `labels`."""


def to_device(batch: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Return the arrays as tensors on a device."""
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def positions(batch: Batch) -> int:
    """Return the number of positions in a batch; of a pair, those of the decoder."""
    return int(batch.get("decoder_input_ids_BT", batch["input_ids_BT"]).size)


def idle(batch: Batch) -> Batch:
    """Return the batch without labels: a pass over it joins the collective operations and adds nothing."""
    return batch | {"labels": np.full_like(batch["labels"], IGNORE)}
