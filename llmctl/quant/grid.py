"""Quantization grids: scales and zero points of groups of weights, and rounding to them.

Scales are rounded to their stored precision at once, so that errors measured here are those of the stored model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmctl.quant.schemes import Scheme

SEARCH_STEPS = 20
NARROWEST = 0.5
"""The search tries clipped ranges from the full one down to this fraction of it."""

ROUNDS = 2
"""How often scales are refit to codes, and codes to scales, after the search."""

SMALLEST, LARGEST_SCALE = 1e-30, 255
"""The smallest scale, and the largest 8-bit scale code (in units of its row's power of two)."""

CHUNK_WEIGHTS = 1 << 19
"""Weights that are searched at a time: with what is computed of them, they fit into a core's cache."""


class Grid(NamedTuple):
    """Scales (O, G) float32, already rounded to their stored precision, and zero points (O, G) uint8."""

    scales_OG: Tensor
    zeros_OG: Tensor


class BlockGrid(NamedTuple):
    """What ggml's blocks store of the scales of a matrix, and what follows from it.

    scales_OG, zeros_OG: a weight is (code - zero) * scale. units_OS, offset_units_OS: float16 numbers of blocks, in float32.
    integers_OG, offset_integers_OG: those of groups; 1 in formats without.
    """

    scales_OG: Tensor
    zeros_OG: Tensor
    units_OS: Tensor
    offset_units_OS: Tensor
    integers_OG: Tensor
    offset_integers_OG: Tensor


class Codes(NamedTuple):
    """A quantized matrix: codes (O, I) on a grid: uint8, or int8 entries of a table."""

    codes_OI: Tensor
    grid: Grid | BlockGrid

    def split(self, sizes: Sequence[int]) -> "list[Codes]":
        """Split into matrices of so many outputs."""
        grids = zip(*(tensor.split(sizes) for tensor in self.grid), strict=True)
        return [
            Codes(codes_OI, type(self.grid)(*own))
            for codes_OI, own in zip(self.codes_OI.split(sizes), grids, strict=True)
        ]


def grouped(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """View a matrix (O, I) as groups (O, G, g)."""
    return weight_OI.unflatten(1, (scheme.n_groups(weight_OI.shape[1]), -1))


def rounded_scales(scales_OG: Tensor, scheme: Scheme) -> Tensor:
    """Round scales to their stored precision, never to 0: bfloat16, or 8-bit multiples of a power of two per row."""
    if scheme.has_small_scales:
        return scales_of(*scale_codes(scales_OG))
    return scales_OG.clamp(min=SMALLEST).bfloat16().float()


def scale_codes(scales_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize scales to uint8 codes (O, G), at least 128 for a row's largest, and exponents of two (O, 1) int8.

    An 8-bit integer times a power of two is exact in bfloat16, so decoding and encoding again is lossless.
    """
    scales_OG = scales_OG.float().clamp(min=SMALLEST)
    largest_O1 = scales_OG.amax(dim=1, keepdim=True)
    # frexp puts the largest scale into [128, 256); if it rounds up to 256, the row needs the next exponent.
    exponents_O1 = torch.frexp(largest_O1).exponent - 8
    exponents_O1 += torch.ldexp(largest_O1, -exponents_O1).round_() > LARGEST_SCALE
    codes_OG = torch.ldexp(scales_OG, -exponents_O1).round_().clamp_(1, LARGEST_SCALE)
    return codes_OG.to(torch.uint8), exponents_O1.to(torch.int8)


def scales_of(codes_OG: Tensor, exponents_O1: Tensor) -> Tensor:
    """Decode the scales (O, G) float32 of `scale_codes`."""
    return torch.ldexp(codes_OG.float(), exponents_O1)


def whole_range(weight_OI: Tensor, scheme: Scheme) -> Grid:
    """Return the grid over every group's range."""
    return grid_over(range_of(weight_OI, scheme), scheme)


def range_of(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest weight of every group (O, G), at most and at least 0."""
    low_OG, high_OG = grouped(weight_OI, scheme).aminmax(dim=2)
    return low_OG.clamp(max=0), high_OG.clamp(min=0)


def grid_over(ends: tuple[Tensor, Tensor], scheme: Scheme, share: float = 1.0) -> Grid:
    """Return the grid over a fraction of every group's range."""
    low_OG, high_OG = ends
    if scheme.symmetric:
        # Uses codes from -(2^(b-1) - 1): only a smaller scale, as the search tries, reaches the lowest code.
        largest_OG = torch.maximum(-low_OG, high_OG)
        scales_OG = rounded_scales(largest_OG * (share / (scheme.levels // 2)), scheme)
        return Grid(scales_OG, torch.full_like(scales_OG, scheme.middle, dtype=torch.uint8))
    low_OG, high_OG = low_OG * share, high_OG * share
    scales_OG = rounded_scales((high_OG - low_OG) / scheme.levels, scheme)
    return Grid(scales_OG, (-low_OG / scales_OG).round_().clamp_(0, scheme.levels).to(torch.uint8))


def encode(weight_OI: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Round weights to the nearest codes (O, I) uint8 of a grid."""
    codes = grouped(weight_OI, scheme) / grid.scales_OG[..., None] + grid.zeros_OG[..., None]
    return codes.round_().clamp_(0, scheme.levels).to(torch.uint8).flatten(1)


def decode(codes: Codes, scheme: Scheme) -> Tensor:
    """Dequantize codes to weights (O, I) float32."""
    shifted = grouped(codes.codes_OI, scheme).float() - codes.grid.zeros_OG[..., None].float()
    return (shifted * codes.grid.scales_OG[..., None]).flatten(1)


def search(weight_OI: Tensor, scheme: Scheme, importance_I: Tensor | None = None) -> Grid:
    """Search the grid of least squared error, columns weighted by importance: clipped ranges, then least squares.

    Source: clipping as in OmniQuant's and AWQ's searches (arXiv:2306.00978, section 3.2); least-squares scales as in
    HIGGS' and llama.cpp's quantizers: for codes q, the best scale is sum(w q') / sum(q'^2) with q' = q - zero.
    """
    rows = max(1, CHUNK_WEIGHTS // weight_OI.shape[1])
    parts = [_search(part, scheme, importance_I) for part in weight_OI.split(rows)]
    return Grid(torch.cat([part.scales_OG for part in parts]), torch.cat([part.zeros_OG for part in parts]))


def _search(weight_OI: Tensor, scheme: Scheme, importance_I: Tensor | None) -> Grid:
    groups_OGg = grouped(weight_OI, scheme)
    weights = torch.ones_like(weight_OI[:1]) if importance_I is None else importance_I[None].to(weight_OI.dtype)
    weights_1Gg = grouped(weights, scheme)
    # Per group, keep the grid with the least error over all clipped ranges.
    ends = range_of(weight_OI, scheme)
    best, best_OG = grid_over(ends, scheme), None
    for step in range(SEARCH_STEPS):
        grid = grid_over(ends, scheme, 1 - step * (1 - NARROWEST) / (SEARCH_STEPS - 1))
        error_OG = _error(groups_OGg, weights_1Gg, grid, scheme)
        best, best_OG = (grid, error_OG) if best_OG is None else _better(best, best_OG, grid, error_OG)
    assert best_OG is not None
    for _ in range(ROUNDS):
        steps_OGg = _codes(groups_OGg, best, scheme) - best.zeros_OG[..., None]
        power_OG = (steps_OGg.square() * weights_1Gg).sum(dim=2)
        fitted_OG = (groups_OGg * steps_OGg * weights_1Gg).sum(dim=2) / power_OG
        usable = (power_OG > 0) & (fitted_OG > 0)  # power 0: all codes are the zero point, so no scale follows
        grid = Grid(rounded_scales(torch.where(usable, fitted_OG, best.scales_OG), scheme), best.zeros_OG)
        best, best_OG = _better(best, best_OG, grid, _error(groups_OGg, weights_1Gg, grid, scheme))
    # A row may now mix scales of two grids with different exponents: bring them to one.
    return Grid(rounded_scales(best.scales_OG, scheme), best.zeros_OG)


def _codes(groups_OGg: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    return (groups_OGg / grid.scales_OG[..., None] + grid.zeros_OG[..., None]).round_().clamp_(0, scheme.levels)


def _error(groups_OGg: Tensor, weights_1Gg: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    steps_OGg = _codes(groups_OGg, grid, scheme).sub_(grid.zeros_OG[..., None])
    error_OGg = steps_OGg.mul_(grid.scales_OG[..., None]).sub_(groups_OGg)
    return error_OGg.square_().mul_(weights_1Gg).sum(dim=2)


def _better(best: Grid, best_OG: Tensor, grid: Grid, error_OG: Tensor) -> tuple[Grid, Tensor]:
    is_better = error_OG < best_OG
    return (
        Grid(
            torch.where(is_better, grid.scales_OG, best.scales_OG),
            torch.where(is_better, grid.zeros_OG, best.zeros_OG),
        ),
        torch.minimum(error_OG, best_OG),
    )
