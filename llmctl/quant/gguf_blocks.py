"""Quantize weights to llama.cpp's block formats: 32 or 256 adjacent weights of a row with their own scales, as bytes.

The formats are ggml's; the search for scales is ours: candidates around the full range are each refit by least squares
to their codes, and the one with the least weighted error is kept. As in llama.cpp without an importance matrix, an
error is weighted by the root mean square of the group plus the weight's magnitude. Codes are computed last, with the
scales as stored, so that the returned values are bit for bit those that a reader of the bytes gets.
Source: ggml-common.h and ggml-quants.c of ggml-org/ggml for layouts; the idea of its make_qkx2_quants for the search.
Shapes: N blocks, w weights of a block, G groups of a block, g weights of a group.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SYMMETRIC_STEPS = torch.arange(-9, 10) * 0.1
AFFINE_STEPS = torch.arange(-10, 11, 2) * 0.1
"""Offsets of the candidate scales from the scale of the full range, in code steps."""

ROUNDS = 2
"""How often a block's 16-bit scales are refit to its codes."""

CHUNK_WEIGHTS = 1 << 18
"""Weights that are processed at a time, to fit into the CPU cache."""

BYTE, NIBBLE = 8, 15
TINY = torch.finfo(torch.float32).tiny


class Blocks(NamedTuple):
    """A quantized matrix: bytes (O, B) uint8 of whole blocks, and the weights (O, I) float32 that they decode to."""

    bytes_OB: Tensor
    values_OI: Tensor


class Kind(NamedTuple):
    """A format: weights and bytes per block, and the function from weights (N, w) to bytes (N, b) and values (N, w)."""

    n_weights: int
    n_bytes: int
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]


def encode(weight_OI: Tensor, name: str) -> Blocks:
    """Quantize a matrix to the format `name`, a key of KINDS; rows must divide into blocks.

    A scale too large for float16 gives non-finite values, which the caller must check.
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
    """Return the weight of each element's squared error; the last dimension is the group."""
    return x.square().mean(dim=-1, keepdim=True).sqrt() + x.abs()


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, or 0 for zero and subnormal scales: the codes of such a group then decode to zero."""
    return torch.where(scale.abs() < TINY, 0.0, 1 / scale)


def stored(scale: Tensor) -> Tensor:
    """Round to float16."""
    return scale.half().float()


def fit_symmetric(x: Tensor, lowest: int, highest: int) -> Tensor:
    """Fit the scale (..., 1) of x ~ scale * code, lowest <= code <= highest.

    Its sign maps the element of largest magnitude to `lowest`, which has one step more than `highest`.
    """
    w = weights_of(x)
    # With its sign: the scale is negative where the extreme value is positive.
    extreme = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))
    best_scale, best_gain = torch.zeros_like(extreme), torch.full_like(extreme, -1.0)
    # Candidate codes come from scales around the full range; each gets its least-squares scale.
    for step in SYMMETRIC_STEPS.tolist():
        codes = (x * (inverse(extreme) * (lowest - step))).round_().clamp_(lowest, highest)
        weighted = w * codes
        product, power = (weighted * x).sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
        scale = product * inverse(power)
        gain = scale * product  # the reduction of the weighted error compared to all codes 0
        is_better = gain > best_gain
        best_scale, best_gain = torch.where(is_better, scale, best_scale), torch.where(is_better, gain, best_gain)
    return best_scale


def fit_affine(x: Tensor, highest: int, *, below_zero: bool) -> tuple[Tensor, Tensor]:
    """Fit scale and offset (..., 1) of x ~ scale * code + offset, 0 <= code <= highest.

    below_zero: constrain the offset to be at most 0, for formats that store its magnitude without a sign.
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
    """Return the scale and offset of least weighted squared error for fixed codes (2x2 normal equations)."""
    total, total_x = sums
    weighted = w * codes
    total_q, total_qq = weighted.sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
    total_qx = (weighted * x).sum(-1, keepdim=True)
    determinant = total * total_qq - total_q.square()
    scale = (total * total_qx - total_q * total_x) * inverse(determinant)
    offset = (total_qq * total_x - total_q * total_qx) * inverse(determinant)
    # At the bound the offset is 0, and the scale is that of a fit without an offset.
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
    """Return float16 values as bytes (N, 2), little-endian."""
    bits = scale_N1.half().view(torch.int16).int()
    return torch.cat([bits & 255, (bits >> BYTE) & 255], dim=1).to(torch.uint8)


def nibbles(low: Tensor, high: Tensor) -> Tensor:
    """Pack pairs of 4-bit values into bytes."""
    return (low & NIBBLE) | ((high & NIBBLE) << 4)


# --- formats with blocks of 32 ---------------------------------------------------------------------------------------


def q8_0(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode blocks of a scale and 32 8-bit codes, rounded to nearest over the full range."""
    scale_N1 = stored(x_Nw.abs().amax(dim=1, keepdim=True) / 127)
    codes_Nw = (x_Nw * inverse(scale_N1)).round_().clamp_(-127, 127)
    return torch.cat([half_bytes(scale_N1), codes_Nw.to(torch.int8).view(torch.uint8)], dim=1), codes_Nw * scale_N1


def _symmetric_32(x_Nw: Tensor, middle: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return float16 scales (N, 1), unsigned codes (N, 32) uint8, and values (N, 32)."""
    scale_N1 = stored(fit_symmetric(x_Nw, -middle, middle - 1))
    codes_Nw = (x_Nw * inverse(scale_N1)).round_().clamp_(-middle, middle - 1)
    return scale_N1, (codes_Nw + middle).to(torch.uint8), codes_Nw * scale_N1


def q4_0(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode blocks of a scale and 32 4-bit codes."""
    scale_N1, codes_Nw, values_Nw = _symmetric_32(x_Nw, 8)
    return torch.cat([half_bytes(scale_N1), nibbles(codes_Nw[:, :16], codes_Nw[:, 16:])], dim=1), values_Nw


def q5_0(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode blocks of a scale, the fifth bits of 32 codes, and their lower four bits."""
    scale_N1, codes_Nw, values_Nw = _symmetric_32(x_Nw, 16)
    # The fifth bits of all 32 codes are one little-endian 32-bit number, code 0 in its lowest bit.
    shifts = torch.arange(8, dtype=torch.uint8)
    fifth_N4 = ((codes_Nw >> 4).view(-1, 4, 8) << shifts).sum(dim=2).to(torch.uint8)
    parts = [half_bytes(scale_N1), fifth_N4, nibbles(codes_Nw[:, :16], codes_Nw[:, 16:])]
    return torch.cat(parts, dim=1), values_Nw


def q4_1(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode blocks of a scale, an offset, and 32 4-bit codes."""
    scale_N1, offset_N1 = map(stored, fit_affine(x_Nw, NIBBLE, below_zero=False))
    codes_Nw = ((x_Nw - offset_N1) * inverse(scale_N1)).round_().clamp_(0, NIBBLE)
    values_Nw = codes_Nw * scale_N1 + offset_N1
    codes_Nw = codes_Nw.to(torch.uint8)
    parts = [half_bytes(scale_N1), half_bytes(offset_N1), nibbles(codes_Nw[:, :16], codes_Nw[:, 16:])]
    return torch.cat(parts, dim=1), values_Nw


# --- formats with blocks of 256 --------------------------------------------------------------------------------------


class _Affine(NamedTuple):
    """The 8 groups of a Q4_K block.

    float16 scales of the scales and of the offsets (N, 1, 1), 6-bit scales and offsets (N, 8, 1), codes (N, 8, 32).
    """

    d: Tensor
    d_offset: Tensor
    scales: Tensor
    offsets: Tensor
    codes: Tensor

    def values(self) -> Tensor:
        """Decode the weights, multiplying in the same order as llama.cpp, for equal bits."""
        return (self.d * self.scales) * self.codes - self.d_offset * self.offsets


def q4_k(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode blocks of 256: 8 groups of 32 4-bit codes, 6-bit scales and offsets, and float16 scales of both."""
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
        candidate = _with_codes(x_NGg, d, d_offset, scales, offsets)
        error = _error(x_NGg, w_NGg, candidate.values())
        is_better = error < best_error
        best = _Affine(*(torch.where(is_better, new, old) for new, old in zip(candidate, best, strict=True)))
        best_error = torch.where(is_better, error, best_error)
    return _q4_k_bytes(best), best.values().flatten(1)


def _with_codes(x_NGg: Tensor, d: Tensor, d_offset: Tensor, scales: Tensor, offsets: Tensor) -> _Affine:
    codes = ((x_NGg + d_offset * offsets) * inverse(d * scales)).round_().clamp_(0, NIBBLE)
    return _Affine(d, d_offset, scales, offsets, codes)


def _error(x_NGg: Tensor, w_NGg: Tensor, values_NGg: Tensor) -> Tensor:
    return (w_NGg * (values_NGg - x_NGg).square()).sum((1, 2), keepdim=True)


def _refit(x_NGg: Tensor, w_NGg: Tensor, block: _Affine) -> tuple[Tensor, Tensor]:
    """Return the two float16 scales of least weighted squared error for fixed codes and 6-bit scales."""
    a, b = block.scales * block.codes, block.offsets
    aa, ab, bb, ax, bx = (
        (w_NGg * left * right).sum((1, 2), keepdim=True)
        for left, right in ((a, a), (a, b), (b, b), (a, x_NGg), (b, x_NGg))
    )
    determinant = aa * bb - ab.square()
    d = (ax * bb - ab * bx) * inverse(determinant)
    d_offset = (ab * ax - aa * bx) * inverse(determinant)
    is_valid = (determinant > 0) & (d > 0) & (d_offset >= 0)  # both scales are unsigned in the format
    return stored(torch.where(is_valid, d, block.d)), stored(torch.where(is_valid, d_offset, block.d_offset))


def _q4_k_bytes(block: _Affine) -> Tensor:
    """Lay out d, d_offset, 12 bytes of 6-bit numbers, and codes: even groups in the low nibbles, odd ones in the high."""
    scales_N8, offsets_N8 = block.scales[..., 0].to(torch.uint8), block.offsets[..., 0].to(torch.uint8)
    # The last four groups' upper two bits go into the free upper bits of the first four groups' bytes.
    s_first, s_last, o_first, o_last = scales_N8[:, :4], scales_N8[:, 4:], offsets_N8[:, :4], offsets_N8[:, 4:]
    six_bits = [s_first | ((s_last >> 4) << 6), o_first | ((o_last >> 4) << 6), nibbles(s_last, o_last)]
    codes = block.codes.to(torch.uint8).view(-1, 4, 2, 32)
    packed = nibbles(codes[:, :, 0], codes[:, :, 1]).flatten(1)
    return torch.cat([half_bytes(block.d[:, 0]), half_bytes(block.d_offset[:, 0]), *six_bits, packed], dim=1)


def q6_k(x_Nw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode blocks of 256: 16 groups of 16 6-bit codes, 8-bit scales, and a float16 scale of those."""
    x_NGg = x_Nw.view(-1, 16, 16)
    scale_NG1 = fit_symmetric(x_NGg, -32, 31)
    extreme = scale_NG1.gather(1, scale_NG1.abs().argmax(dim=1, keepdim=True))
    d = stored(extreme / -128)
    scales = (scale_NG1 * inverse(d)).round_().clamp_(-128, 127)
    codes = (x_NGg * inverse(d * scales)).round_().clamp_(-32, 31)
    values = (d * scales) * codes
    # Each half of 128 codes: lower nibbles of quarters 1 and 3, 2 and 4 share bytes; so do all four upper bit pairs.
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
"""The supported ggml formats by name."""
