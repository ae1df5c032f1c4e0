"""KV caches: keys and values of past positions in preallocated buffers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmctl.config import ModelConfig
from llmctl.model.shapes import cached_layers, kv_width
from llmctl.quant.int8 import quantize_rows


class KVCache:
    """One buffer per layer, written in place; all rows of the batch share one write position.

    Rows of unequal length are left-padded; `documents_BS` is 0 at their padding. Cross-attention stores the keys and
    values of the encoder's output once, at the first call.

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
        self.ragged = False  # becomes True with padding or several documents: masks are then needed
        self._starts_B: Tensor | None = None  # see `starts`; set to None whenever rows or documents change
        self.cross: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self.length = 0
        self.max_len = max_len

    @property
    def n_bytes(self) -> int:
        """The size of the buffers, without cross-attention."""
        return sum(buffer.nbytes for kind in self.buffers for buffer in kind)

    def append(self, layer: int, keys_BKTH: Tensor, values_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions of a layer and return all positions so far, including the new ones."""
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

    def starts(self, n_new: int = 0) -> Tensor | None:
        """Return the first position of each row (B,), or None if one is not padding followed by a single document.

        n_new: positions that are marked, but not written yet.
        """
        if self._starts_B is None:
            n_positions = self.length + n_new
            documents_BS = self.documents_BS[:, :n_positions]
            starts_B = (documents_BS == 0).sum(dim=1)
            places_S = torch.arange(n_positions, device=starts_B.device)
            expected_BS = torch.where(places_S >= starts_B[:, None], documents_BS[:, -1:], 0)
            if self.ragged and not torch.equal(documents_BS, expected_BS):
                return None
            self._starts_B = starts_B
        return self._starts_B

    def mark(self, n_positions: int, documents_BT: Tensor | None) -> Tensor | None:
        """Record the documents of the next positions, before they are appended; padding is 0.

        Later positions belong to each row's last document. Returns the documents of all positions including the next
        ones (B, S), or None while every row is one document without padding.
        """
        stop = self.length + n_positions
        if documents_BT is not None:
            # Later tokens continue the last document; clamped, so that they are not padding after an empty row.
            self._starts_B = None
            self.documents_BS[:, self.length : stop] = documents_BT
            self.documents_BS[:, stop:] = documents_BT[:, -1:].clamp(min=1)
            self.ragged = self.ragged or bool((documents_BT != 1).any())
        return self.documents_BS[:, :stop] if self.ragged else None

    def advance(self, n_positions: int) -> None:
        """Advance the write position, after all layers have appended."""
        self.length += n_positions

    def taken(self, n_positions: int) -> list[Tensor]:
        """Copy the first positions of the first row from every buffer, for `put` (prefix caching)."""
        return [buffer[0, :, :n_positions].clone() for kind in self.buffers for buffer in kind]

    def put(self, parts: Sequence[Tensor], row: int, start: int, n_positions: int) -> None:
        """Write the first positions of copies from `taken` into a row at `start`, without advancing."""
        for buffer, part in zip((buffer for kind in self.buffers for buffer in kind), parts, strict=True):
            buffer[row, :, start : start + n_positions] = part[:, :n_positions]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may repeat (beam search)."""
        for kind in self.buffers:  # the lists are shared with self.keys, ...: replace their items
            for layer, buffer in enumerate(kind):
                kind[layer] = buffer[rows]
        self.documents_BS, self._starts_B = self.documents_BS[rows], None
        self.cross = [pair if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.cross]


class Int8KVCache(KVCache):
    """Keys and values in 8 bits with a scale per position and head; cross-attention is not quantized.

    Scales per position let a position be written independently of its neighbors. Attention always reads the quantized
    values, even of positions just written, so results do not depend on how a prompt was split. KIVI (Liu et al. 2024,
    arXiv:2402.02750, section 3) observes a few large channels in keys and uses scales per channel, which 2 bits need; at
    8 bits small channels stay accurate enough.

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
        """Quantize and store T new positions of a layer."""
        codes, scales = quantize_rows(torch.stack([keys_BKTH, values_BKTH]))  # one call for both: less overhead
        super().write(layer, *codes)
        for buffers, part_BKT1 in zip((self.key_scales, self.value_scales), scales, strict=True):
            buffers[layer].narrow(2, self.length, part_BKT1.shape[2]).copy_(part_BKT1)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the dequantized keys and values of a range of positions, in the model's precision."""
        keys, key_scales, values, value_scales = self.coded(layer, start, stop)
        return keys.float().mul_(key_scales).to(self.dtype), values.float().mul_(value_scales).to(self.dtype)

    def coded(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the codes and scales of keys, then of values, of a range of positions."""
        kinds = (self.keys, self.key_scales, self.values, self.value_scales)
        keys, key_scales, values, value_scales = (kind[layer].narrow(2, start, stop - start) for kind in kinds)
        return keys, key_scales, values, value_scales


CACHES: Mapping[str, type[KVCache]] = {"float": KVCache, "int8": Int8KVCache}
"""KV caches by `--kv`: in the model's precision, or in 8 bits."""
