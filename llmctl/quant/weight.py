"""A quantized matrix as packed tensors, with the value (codes - zeros) * scales."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmctl.quant.grid import Codes, Grid, decode
from llmctl.quant.packing import n_words, pack, unpack
from llmctl.quant.schemes import Scheme

PARTS = ("weight_packed", "weight_scale", "weight_zero_point")
"""The tensors of a matrix; the last only if the scheme is not symmetric."""


class QuantWeight(nn.Module):
    """A quantized matrix (O, I).

    Buffers with the names and layout of compressed-tensors' `pack-quantized`: weight_packed (O, words) int32,
    weight_scale (O, G) and, if the scheme is not symmetric, weight_zero_point (words of O, G) int32. Our own scales are
    bfloat16; those of other tools keep the dtype of their file.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, n_out: int, n_in: int, scheme: Scheme) -> None:
        super().__init__()
        self.n_out, self.n_in, self.scheme = n_out, n_in, scheme
        n_groups = scheme.n_groups(n_in)
        self.register_buffer("weight_packed", torch.zeros(n_out, n_words(n_in, scheme.bits), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(n_out, n_groups, dtype=torch.bfloat16))
        if not scheme.symmetric:
            words = torch.zeros(n_words(n_out, scheme.bits), n_groups, dtype=torch.int32)
            self.register_buffer("weight_zero_point", words)

    def put(self, codes: Codes) -> None:
        """Store codes in the buffers."""
        for name, tensor in packed(codes, self.scheme).items():
            getattr(self, name).copy_(tensor)

    def codes(self) -> Codes:
        """Return the unpacked codes."""
        return unpacked(dict(self.named_buffers(recurse=False)), self.scheme, self.n_out, self.n_in)

    def zeros(self) -> Tensor:
        """Return the zero points (O, G), uint8."""
        return zero_points(dict(self.named_buffers(recurse=False)), self.scheme, self.n_out)

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix (O, I) float32, recomputed at every access."""
        return self.dequantized()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized matrix (O, I)."""
        return decode(self.codes(), self.scheme).to(dtype)

    @property
    def has_bfloat16_scales(self) -> bool:
        """Whether bfloat16 represents the scales exactly, whatever their dtype."""
        scales = self.weight_scale
        return scales.dtype == torch.bfloat16 or torch.equal(scales.bfloat16().to(scales.dtype), scales)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch would copy the scales into the buffer, and so round them to its dtype.
        scales = state_dict.get(f"{prefix}weight_scale")
        if scales is not None and scales.dtype != self.weight_scale.dtype:
            self.weight_scale = self.weight_scale.to(scales.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(dtype) must not convert the scales: their own dtype is their stored precision.
        scales = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scales.dtype:
            self.weight_scale = scales.to(self.weight_packed.device)
        return self


def packed(codes: Codes, scheme: Scheme) -> dict[str, Tensor]:
    """Pack codes into the tensors of a file."""
    tensors = {
        "weight_packed": pack(codes.codes_OI, scheme.bits),
        "weight_scale": codes.grid.scales_OG.bfloat16(),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = pack(codes.grid.zeros_OG.T, scheme.bits).T.contiguous()
    return tensors


def unpacked(tensors: dict[str, Tensor], scheme: Scheme, n_out: int, n_in: int) -> Codes:
    """Unpack the codes of a file's tensors."""
    grid = Grid(tensors["weight_scale"].float(), zero_points(tensors, scheme, n_out))
    return Codes(unpack(tensors["weight_packed"], scheme.bits, n_in), grid)


def zero_points(tensors: dict[str, Tensor], scheme: Scheme, n_out: int) -> Tensor:
    """Return the zero points (O, G) of a file's tensors, uint8."""
    if scheme.symmetric:
        return torch.full_like(tensors["weight_scale"], scheme.middle, dtype=torch.uint8)
    return unpack(tensors["weight_zero_point"].T.contiguous(), scheme.bits, n_out).T.contiguous()
