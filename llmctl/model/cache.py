"""Keys and values of past positions, preallocated, so that decoding a token never reallocates."""

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

    def mark(self, documents_BT: Tensor) -> None:
        """Say which of the next T positions are padding (0), before they are appended."""
        self.documents_BS[:, self.length : self.length + documents_BT.shape[1]] = documents_BT
        self.ragged = self.ragged or bool((documents_BT == 0).any())

    def advance(self, n_positions: int) -> None:
        """Move the write position on, after every layer has appended."""
        self.length += n_positions

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in this order; a row may repeat (beam search)."""
        self.keys = [buffer[rows] for buffer in self.keys]
        self.values = [buffer[rows] for buffer in self.values]
        self.documents_BS = self.documents_BS[rows]
        self.cross = [pair if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.cross]
