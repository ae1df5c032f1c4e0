"""Weights in llama.cpp's blocks: 32 or 256 neighbors of a row with scales of their own, byte for byte as files hold them.

The formats are ggml's; how scales are chosen is ours: candidates around the whole range, each refitted by least squares
to its codes, the one of least weighted error kept. A large weight counts for more, as in llama.cpp where nothing was
measured: by the root mean square of its group plus its own size. Codes are taken last, on the scales as stored, so
that what comes out is what a reader of the bytes gets, bit for bit.
Source: ggml-common.h and ggml-quants.c of ggml-org/ggml for layouts; the idea of its make_qkx2_quants for the search.
Shapes: N blocks, G groups of a block, g weights of a group.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SYMMETRIC_STEPS = torch.arange(-9, 10) * 0.1
AFFINE_STEPS = torch.arange(-10, 11, 2) * 0.1
"""How far candidates of a scale lie from the whole range's, in codes."""

ROUNDS = 2
"""Times that a block's 16-bit scales are refitted to its codes."""

CHUNK_WEIGHTS = 1 << 18
"""Weights that are searched at a time: what the processor's cache holds."""

BYTE, NIBBLE = 8, 15
TINY = torch.finfo(torch.float32).tiny


class Blocks(NamedTuple):
    """A matrix as bytes (O, B) uint8 of whole blocks, and as the weights (O, I) float32 that they stand for."""

    bytes_OB: Tensor
    values_OI: Tensor


class Kind(NamedTuple):
    """A format: weights and bytes of a block, and what turns weights (N, w) into bytes (N, b) and values (N, w)."""

    n_weights: int
    n_bytes: int
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]


def encode(weight_OI: Tensor, name: str) -> Blocks:
    """Return a matrix in blocks of the format `name`, a key of KINDS; its rows are whole blocks.

    A scale that is too large for a 16-bit float makes values that are not finite: the caller looks.
    """
    kind = KINDS[name]
    assert weight_OI.shape[1] % kind.n_weights == 0, f"rows of {weight_OI.shape[1]} in {name}"
    blocks_Nw = weight_OI.float().reshape(-1, kind.n_weights)
    parts = [kind.encode(part) for part in blocks_Nw.split(CHUNK_WEIGHTS // kind.n_weights)]
    n_out = weight_OI.shape[0]
    return Blocks(
        torch.cat([part[0] for part in parts]).reshape(n_out, -1),
        torch.cat([part[1] for part in parts]).reshape(n_out, -1),
    )


# --- scales ----------------------------------------------------------------------------------------------------------


def weights_of(x: Tensor) -> Tensor:
    """Return how much each weight's error counts; groups lie in the last dimension."""
    return x.square().mean(dim=-1, keepdim=True).sqrt() + x.abs()


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 for 0 and what is next to it: all codes of such a group are then the zero's."""
    return torch.where(scale.abs() < TINY, 0.0, 1 / scale)


def stored(scale: Tensor) -> Tensor:
    """Return the nearest number that a 16-bit float holds."""
    return scale.half().float()


def fit_symmetric(x: Tensor, lowest: int, highest: int) -> Tensor:
    """Return the scale (..., 1) of x ~ scale * code, lowest <= code <= highest, signed so that the largest reaches lowest."""
    w = weights_of(x)
    extreme = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))
    best_scale, best_gain = torch.zeros_like(extreme), torch.full_like(extreme, -1.0)
    for step in SYMMETRIC_STEPS.tolist():
        codes = (x * (inverse(extreme) * (lowest - step))).round_().clamp_(lowest, highest)
        weighted = w * codes
        product, power = (weighted * x).sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
        scale = product * inverse(power)
        gain = scale * product  # what the error is smaller by than that of zeros
        is_better = gain > best_gain
        best_scale, best_gain = torch.where(is_better, scale, best_scale), torch.where(is_better, gain, best_gain)
    return best_scale


def fit_affine(x: Tensor, highest: int, *, below_zero: bool) -> tuple[Tensor, Tensor]:
    """Return scale and offset (..., 1) of x ~ scale * code + offset, 0 <= code <= highest.

    below_zero: the offset is never above 0, as where its size is stored without a sign.
    """
    w = weights_of(x)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low = low.clamp(max=0) if below_zero else low
    sums = w.sum(-1, keepdim=True), (w * x).sum(-1, keepdim=True)
    best_scale, best_offset = (high - low) / highest, low
    best_error = _affine_error(x, w, best_scale, best_offset, highest)
    for step in AFFINE_STEPS.tolist():
        codes = ((x - low) * ((highest + step) * inverse(high - low))).round_().clamp_(0, highest)
        scale, offset = _least_squares(x, w, codes, sums, below_zero=below_zero)
        error = _affine_error(x, w, scale, offset, highest)
        is_better = error < best_error
        best_scale, best_offset = torch.where(is_better, scale, best_scale), torch.where(is_better, offset, best_offset)
        best_error = torch.where(is_better, error, best_error)
    return best_scale, best_offset


def _least_squares(
    x: Tensor, w: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor], *, below_zero: bool
) -> tuple[Tensor, Tensor]:
    """Return the scale and offset of least weighted squared error for given codes."""
    total, total_x = sums
    weighted = w * codes
    total_q, total_qq = weighted.sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
    total_qx = (weighted * x).sum(-1, keepdim=True)
    determinant = total * total_qq - total_q.square()
    scale = (total * total_qx - total_q * total_x) * inverse(determinant)
    offset = (total_qq * total_x - total_q * total_qx) * inverse(determinant)
    if below_zero:
        is_above = offset > 0
        scale = torch.where(is_above, total_qx * inverse(total_qq), scale)
        offset = offset.clamp(max=0)
    return scale, offset


def _affine_error(x: Tensor, w: Tensor, scale: Tensor, offset: Tensor, highest: int) -> Tensor:
    codes = ((x - offset) * inverse(scale)).round_().clamp_(0, highest)
    return (w * (codes * scale + offset - x).square()).sum(-1, keepdim=True)


# --- bytes -----------------------------------------------------------------------------------------------------------


def half_bytes(scale_N1: Tensor) -> Tensor:
    """Return 16-bit floats as their bytes (N, 2), the low one first."""
    bits = scale_N1.half().view(torch.int16).int()
    return torch.cat([bits & 255, (bits >> BYTE) & 255], dim=1).to(torch.uint8)


def nibbles(low: Tensor, high: Tensor) -> Tensor:
    """Return pairs of four bits as bytes."""
    return (low & NIBBLE) | ((high & NIBBLE) << 4)


# --- formats of 32 ---------------------------------------------------------------------------------------------------


def q8_0(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks of a scale and 32 codes of eight bits: nearest codes over the whole range."""
    scale_N1 = stored(x_Nw.abs().amax(dim=1, keepdim=True) / 127)
    codes_Nw = (x_Nw * inverse(scale_N1)).round_().clamp_(-127, 127)
    return torch.cat([half_bytes(scale_N1), codes_Nw.to(torch.int8).view(torch.uint8)], dim=1), codes_Nw * scale_N1


def _symmetric_32(x_Nw: Tensor, middle: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return stored scales (N, 1), codes from 0 (N, 32) uint8, and values (N, 32)."""
    scale_N1 = stored(fit_symmetric(x_Nw, -middle, middle - 1))
    codes_Nw = (x_Nw * inverse(scale_N1)).round_().clamp_(-middle, middle - 1)
    return scale_N1, (codes_Nw + middle).to(torch.uint8), codes_Nw * scale_N1


def q4_0(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks of a scale and 32 codes of four bits."""
    scale_N1, codes_Nw, values_Nw = _symmetric_32(x_Nw, 8)
    return torch.cat([half_bytes(scale_N1), nibbles(codes_Nw[:, :16], codes_Nw[:, 16:])], dim=1), values_Nw


def q5_0(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks of a scale, the fifth bits of 32 codes, and their lower four."""
    scale_N1, codes_Nw, values_Nw = _symmetric_32(x_Nw, 16)
    places = torch.arange(8, dtype=torch.uint8)
    fifth_N4 = ((codes_Nw >> 4).view(-1, 4, 8) << places).sum(dim=2).to(torch.uint8)
    parts = [half_bytes(scale_N1), fifth_N4, nibbles(codes_Nw[:, :16], codes_Nw[:, 16:])]
    return torch.cat(parts, dim=1), values_Nw


def q4_1(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks of a scale, an offset, and 32 codes of four bits."""
    scale_N1, offset_N1 = map(stored, fit_affine(x_Nw, NIBBLE, below_zero=False))
    codes_Nw = ((x_Nw - offset_N1) * inverse(scale_N1)).round_().clamp_(0, NIBBLE)
    values_Nw = codes_Nw * scale_N1 + offset_N1
    codes_Nw = codes_Nw.to(torch.uint8)
    parts = [half_bytes(scale_N1), half_bytes(offset_N1), nibbles(codes_Nw[:, :16], codes_Nw[:, 16:])]
    return torch.cat(parts, dim=1), values_Nw


# --- formats of 256 --------------------------------------------------------------------------------------------------


class _Affine(NamedTuple):
    """Eight groups of a block: 16-bit scales of scales and offsets (N, 1, 1), six-bit ones (N, 8, 1), codes (N, 8, 32)."""

    d: Tensor
    d_offset: Tensor
    scales: Tensor
    offsets: Tensor
    codes: Tensor

    def values(self) -> Tensor:
        """Return the weights, multiplied in the order that readers multiply in."""
        return (self.d * self.scales) * self.codes - self.d_offset * self.offsets


def q4_k(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks of 256: eight groups of 32 codes of four bits, six-bit scales and offsets, and 16-bit scales of those."""
    x_NGg = x_Nw.view(-1, 8, 32)
    w_NGg = weights_of(x_NGg)
    scale_NG1, offset_NG1 = fit_affine(x_NGg, NIBBLE, below_zero=True)
    d, d_offset = stored(scale_NG1.amax(1, keepdim=True) / 63), stored(-offset_NG1.amin(1, keepdim=True) / 63)
    scales = (scale_NG1 * inverse(d)).round_().clamp_(0, 63)
    offsets = (-offset_NG1 * inverse(d_offset)).round_().clamp_(0, 63)
    best = _with_codes(x_NGg, d, d_offset, scales, offsets)
    best_error = _error(x_NGg, w_NGg, best.values())
    for _ in range(ROUNDS):
        d, d_offset = _refit(x_NGg, w_NGg, best)
        found = _with_codes(x_NGg, d, d_offset, scales, offsets)
        error = _error(x_NGg, w_NGg, found.values())
        is_better = error < best_error
        best = _Affine(*(torch.where(is_better, new, old) for new, old in zip(found, best, strict=True)))
        best_error = torch.where(is_better, error, best_error)
    return _q4_k_bytes(best), best.values().flatten(1)


def _with_codes(x_NGg: Tensor, d: Tensor, d_offset: Tensor, scales: Tensor, offsets: Tensor) -> _Affine:
    codes = ((x_NGg + d_offset * offsets) * inverse(d * scales)).round_().clamp_(0, NIBBLE)
    return _Affine(d, d_offset, scales, offsets, codes)


def _error(x_NGg: Tensor, w_NGg: Tensor, values_NGg: Tensor) -> Tensor:
    return (w_NGg * (values_NGg - x_NGg).square()).sum((1, 2), keepdim=True)


def _refit(x_NGg: Tensor, w_NGg: Tensor, block: _Affine) -> tuple[Tensor, Tensor]:
    """Return the two 16-bit scales of least weighted squared error for given codes and six-bit scales."""
    a, b = block.scales * block.codes, block.offsets
    aa, ab, bb, ax, bx = (
        (w_NGg * left * right).sum((1, 2), keepdim=True)
        for left, right in ((a, a), (a, b), (b, b), (a, x_NGg), (b, x_NGg))
    )
    determinant = aa * bb - ab.square()
    d = (ax * bb - ab * bx) * inverse(determinant)
    d_offset = (ab * ax - aa * bx) * inverse(determinant)
    is_sound = (determinant > 0) & (d > 0) & (d_offset >= 0)
    return stored(torch.where(is_sound, d, block.d)), stored(torch.where(is_sound, d_offset, block.d_offset))


def _q4_k_bytes(block: _Affine) -> Tensor:
    """Return d, d_offset, twelve bytes of six-bit numbers, and codes; even groups in low bits, odd ones in high bits."""
    scales_N8, offsets_N8 = block.scales[..., 0].to(torch.uint8), block.offsets[..., 0].to(torch.uint8)
    s_first, s_last, o_first, o_last = scales_N8[:, :4], scales_N8[:, 4:], offsets_N8[:, :4], offsets_N8[:, 4:]
    six_bits = [s_first | ((s_last >> 4) << 6), o_first | ((o_last >> 4) << 6), nibbles(s_last, o_last)]
    codes = block.codes.to(torch.uint8).view(-1, 4, 2, 32)
    packed = nibbles(codes[:, :, 0], codes[:, :, 1]).flatten(1)
    return torch.cat([half_bytes(block.d[:, 0]), half_bytes(block.d_offset[:, 0]), *six_bits, packed], dim=1)


def q6_k(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks of 256: 16 groups of 16 codes of six bits, eight-bit scales, and a 16-bit scale of those."""
    x_NGg = x_Nw.view(-1, 16, 16)
    scale_NG1 = fit_symmetric(x_NGg, -32, 31)
    extreme = scale_NG1.gather(1, scale_NG1.abs().argmax(dim=1, keepdim=True))
    d = stored(extreme / -128)
    scales = (scale_NG1 * inverse(d)).round_().clamp_(-128, 127)
    codes = (x_NGg * inverse(d * scales)).round_().clamp_(-32, 31)
    values = (d * scales) * codes
    first, second, third, fourth = (codes + 32).to(torch.uint8).view(-1, 2, 4, 32).unbind(dim=2)
    low = torch.cat([nibbles(first, third), nibbles(second, fourth)], dim=2).flatten(1)
    high = (first >> 4) | (second >> 4 << 2) | (third >> 4 << 4) | (fourth >> 4 << 6)
    parts = [low, high.flatten(1), scales[..., 0].to(torch.int8).view(torch.uint8), half_bytes(d[:, 0])]
    return torch.cat(parts, dim=1), values.flatten(1)


KINDS: Mapping[str, Kind] = {
    "Q8_0": Kind(32, 34, q8_0),
    "Q6_K": Kind(256, 210, q6_k),
    "Q5_0": Kind(32, 22, q5_0),
    "Q4_1": Kind(32, 20, q4_1),
    "Q4_0": Kind(32, 18, q4_0),
    "Q4_K": Kind(256, 144, q4_k),
}
"""ggml's formats that are written here, by their names."""
