"""Keys and values of past positions, preallocated, so that decoding a token never reallocates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmctl.config import ModelConfig
from llmctl.model.shapes import cached_layers, kv_width


class KVCache:
    """One buffer per layer, written in place; all rows of the batch share one write position.

    Rows of unequal length are padded on the left, and `documents_BS` marks their padding with 0. Cross-attention
    stores its keys and values once, when the encoder's output is first seen.

    Shapes: keys and values (B, K, S, H) per layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        heads, width = kv_width(config)
        shape = (batch, heads, max_len, width)
        n_layers = cached_layers(config)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.documents_BS = torch.ones(batch, max_len, dtype=torch.long, device=device)
        self.ragged = False
        self.cross: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self.length = 0
        self.max_len = max_len

    def append(self, layer: int, keys_BKTH: Tensor, values_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions of a layer and return views of all positions so far, the new ones included."""
        start, stop = self.length, self.length + keys_BKTH.shape[2]
        self.keys[layer][:, :, start:stop] = keys_BKTH
        self.values[layer][:, :, start:stop] = values_BKTH
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def mark(self, n_positions: int, documents_BT: Tensor | None) -> Tensor | None:
        """Note the documents of the next positions, before they are appended; padding is 0.

        What comes later belongs to the last document named. Returns the documents of all positions so far, the next
        ones included (B, S), or None while all of them are one document without padding.
        """
        stop = self.length + n_positions
        if documents_BT is not None:
            self.documents_BS[:, self.length : stop] = documents_BT
            self.documents_BS[:, stop:] = documents_BT[:, -1:].clamp(min=1)
            self.ragged = self.ragged or bool((documents_BT != 1).any())
        return self.documents_BS[:, :stop] if self.ragged else None

    def advance(self, n_positions: int) -> None:
        """Move the write position on, after every layer has appended."""
        self.length += n_positions

    def taken(self, n_positions: int) -> list[Tensor]:
        """Return copies of the first positions of the first row, keys and values of every layer, for `put`."""
        return [buffer[0, :, :n_positions].clone() for buffer in (*self.keys, *self.values)]

    def put(self, parts: Sequence[Tensor], row: int, start: int, n_positions: int) -> None:
        """Write the first positions of what was taken into a row, from `start` on; the write position stays."""
        for buffer, part in zip((*self.keys, *self.values), parts, strict=True):
            buffer[row, :, start : start + n_positions] = part[:, :n_positions]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in this order; a row may repeat (beam search)."""
        self.keys = [buffer[rows] for buffer in self.keys]
        self.values = [buffer[rows] for buffer in self.values]
        self.documents_BS = self.documents_BS[rows]
        self.cross = [pair if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.cross]
