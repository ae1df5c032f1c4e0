"""Keys and values of past positions, preallocated, so that decoding a token never reallocates."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmctl.config import ModelConfig
from llmctl.model.shapes import cached_layers, kv_width
from llmctl.quant.int8 import quantize_rows


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
        self.buffers = [self.keys, self.values]
        self.documents_BS = torch.ones(batch, max_len, dtype=torch.long, device=device)
        self.ragged = False
        self.cross: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self.length = 0
        self.max_len = max_len

    @property
    def n_bytes(self) -> int:
        """What keys and values of all positions take, those of cross-attention left out."""
        return sum(buffer.nbytes for kind in self.buffers for buffer in kind)

    def append(self, layer: int, keys_BKTH: Tensor, values_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions of a layer and return all positions so far, the new ones included."""
        self.write(layer, keys_BKTH, values_BKTH)
        return self.read(layer, 0, self.length + keys_BKTH.shape[2])

    def write(self, layer: int, keys_BKTH: Tensor, values_BKTH: Tensor) -> None:
        """Store T new positions of a layer."""
        n_new = keys_BKTH.shape[2]
        self.keys[layer].narrow(2, self.length, n_new).copy_(keys_BKTH)
        self.values[layer].narrow(2, self.length, n_new).copy_(values_BKTH)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a range of positions."""
        return self.keys[layer].narrow(2, start, stop - start), self.values[layer].narrow(2, start, stop - start)

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
        """Return copies of the first positions of the first row, of every buffer, for `put`."""
        return [buffer[0, :, :n_positions].clone() for kind in self.buffers for buffer in kind]

    def put(self, parts: Sequence[Tensor], row: int, start: int, n_positions: int) -> None:
        """Write the first positions of what was taken into a row, from `start` on; the write position stays."""
        for buffer, part in zip((buffer for kind in self.buffers for buffer in kind), parts, strict=True):
            buffer[row, :, start : start + n_positions] = part[:, :n_positions]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in this order; a row may repeat (beam search)."""
        for kind in self.buffers:
            for layer, buffer in enumerate(kind):
                kind[layer] = buffer[rows]
        self.documents_BS = self.documents_BS[rows]
        self.cross = [pair if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.cross]


class Int8KVCache(KVCache):
    """Keys and values in 8 bits with a scale per position and head; those of cross-attention stay as they are.

    A position has scales of its own, so that it is written without its neighbors, and rows are chosen and moved as before.
    Everything that is attended to is read back, the positions being written too: what follows does not depend on how a
    text was cut. KIVI (Liu et al. 2024, arXiv:2402.02750, section 3) finds keys with a few large channels and gives each
    channel its scale, which 2 bits need; in 8 the small channels keep enough.

    Shapes: codes (B, K, S, H), scales (B, K, S, 1) float32, per layer.
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
        super().__init__(config, batch, max_len, dtype=torch.int8, device=device)
        self.dtype = dtype
        self.key_scales = [codes.new_zeros((*codes.shape[:3], 1), dtype=torch.float32) for codes in self.keys]
        self.value_scales = [torch.zeros_like(scales) for scales in self.key_scales]
        self.buffers += [self.key_scales, self.value_scales]

    def write(self, layer: int, keys_BKTH: Tensor, values_BKTH: Tensor) -> None:
        """Round T new positions of a layer."""
        codes, scales = quantize_rows(torch.stack([keys_BKTH, values_BKTH]))
        super().write(layer, *codes)
        for buffers, part_BKT1 in zip((self.key_scales, self.value_scales), scales, strict=True):
            buffers[layer].narrow(2, self.length, part_BKT1.shape[2]).copy_(part_BKT1)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return what the codes of a range of positions mean, in the precision of the model."""
        keys, key_scales, values, value_scales = self.coded(layer, start, stop)
        return keys.float().mul_(key_scales).to(self.dtype), values.float().mul_(value_scales).to(self.dtype)

    def coded(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the codes of keys, their scales, and both of values, of a range of positions."""
        kinds = (self.keys, self.key_scales, self.values, self.value_scales)
        keys, key_scales, values, value_scales = (kind[layer].narrow(2, start, stop - start) for kind in kinds)
        return keys, key_scales, values, value_scales


CACHES: Mapping[str, type[KVCache]] = {"float": KVCache, "int8": Int8KVCache}
"""How keys and values are held: in the model's precision, or in 8 bits."""
