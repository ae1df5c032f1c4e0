"""Scales and zeros: where the few values lie that a group of weights can take, and which of them each weight takes.

Scales are what a file holds and a kernel uses from the beginning, so that what is measured here is what comes of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmctl.quant.schemes import Scheme

SEARCH_STEPS = 20
NARROWEST = 0.5
"""The search tries ranges from the whole one down to this share of it."""

ROUNDS = 2
"""Times that scales are fitted to the codes and codes to the scales after the search."""

SMALLEST, LARGEST_SCALE = 1e-30, 255
"""Of a scale, and of one in eight bits, in units of its row's power of two."""

CHUNK_WEIGHTS = 1 << 22
"""Weights that are searched at a time."""


class Grid(NamedTuple):
    """Scales (O, G) float32, each a number that a file can hold, and zeros (O, G) uint8."""

    scales_OG: Tensor
    zeros_OG: Tensor


class Codes(NamedTuple):
    """A matrix in few bits: codes (O, I) uint8 on a grid."""

    codes_OI: Tensor
    grid: Grid


def grouped(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """Return a matrix with its groups apart (O, G, g)."""
    return weight_OI.unflatten(1, (scheme.n_groups(weight_OI.shape[1]), -1))


def rounded_scales(scales_OG: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest numbers that a file can hold, never 0: bfloat16, or multiples of a power of two, by row."""
    if scheme.has_small_scales:
        return scales_of(*scale_codes(scales_OG))
    return scales_OG.clamp(min=SMALLEST).bfloat16().float()


def scale_codes(scales_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales as uint8 codes (O, G), the largest of a row from 128 on, and exponents (O, 1) int8 of two.

    Codes of eight bits times a power of two are bfloat16 numbers, and rounding them again changes nothing.
    """
    scales_OG = scales_OG.float().clamp(min=SMALLEST)
    largest_O1 = scales_OG.amax(dim=1, keepdim=True)
    exponents_O1 = torch.frexp(largest_O1).exponent - 8
    exponents_O1 += torch.ldexp(largest_O1, -exponents_O1).round_() > LARGEST_SCALE
    codes_OG = torch.ldexp(scales_OG, -exponents_O1).round_().clamp_(1, LARGEST_SCALE)
    return codes_OG.to(torch.uint8), exponents_O1.to(torch.int8)


def scales_of(codes_OG: Tensor, exponents_O1: Tensor) -> Tensor:
    """Return the scales (O, G) float32 that `scale_codes` means."""
    return torch.ldexp(codes_OG.float(), exponents_O1)


def whole_range(weight_OI: Tensor, scheme: Scheme, share: float = 1.0) -> Grid:
    """Return the grid over the range of every group, or over a share of it."""
    groups_OGg = grouped(weight_OI, scheme)
    if scheme.symmetric:
        # The lowest code, one step further out than the highest, is left to those that search.
        scales_OG = rounded_scales(groups_OGg.abs().amax(dim=2) * (share / (scheme.levels // 2)), scheme)
        return Grid(scales_OG, torch.full_like(scales_OG, scheme.middle, dtype=torch.uint8))
    low_OG, high_OG = groups_OGg.amin(dim=2).clamp(max=0) * share, groups_OGg.amax(dim=2).clamp(min=0) * share
    scales_OG = rounded_scales((high_OG - low_OG) / scheme.levels, scheme)
    return Grid(scales_OG, (-low_OG / scales_OG).round_().clamp_(0, scheme.levels).to(torch.uint8))


def encode(weight_OI: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Return the codes (O, I) uint8 of the nearest values of a grid."""
    places = grouped(weight_OI, scheme) / grid.scales_OG[..., None] + grid.zeros_OG[..., None]
    return places.round_().clamp_(0, scheme.levels).to(torch.uint8).flatten(1)


def decode(codes: Codes, scheme: Scheme) -> Tensor:
    """Return the weights (O, I) float32 that codes stand for."""
    shifted = grouped(codes.codes_OI, scheme).float() - codes.grid.zeros_OG[..., None].float()
    return (shifted * codes.grid.scales_OG[..., None]).flatten(1)


def search(weight_OI: Tensor, scheme: Scheme, importance_I: Tensor | None = None) -> Grid:
    """Return the grid of least squared error, the columns weighted by importance: clipped ranges, then least squares.

    Source: clipping as in OmniQuant's and AWQ's searches (arXiv:2306.00978, section 3.2); fitted scales as in HIGGS' and
    llama.cpp's quantizers: with codes q, the best scale is sum(w q') / sum(q'^2) where q' = q - zero.
    """
    rows = max(1, CHUNK_WEIGHTS // weight_OI.shape[1])
    parts = [_search(part, scheme, importance_I) for part in weight_OI.split(rows)]
    return Grid(torch.cat([part.scales_OG for part in parts]), torch.cat([part.zeros_OG for part in parts]))


def _search(weight_OI: Tensor, scheme: Scheme, importance_I: Tensor | None) -> Grid:
    groups_OGg = grouped(weight_OI, scheme)
    weights = torch.ones_like(weight_OI[:1]) if importance_I is None else importance_I[None].to(weight_OI.dtype)
    weights_1Gg = grouped(weights, scheme)
    best, best_OG = whole_range(weight_OI, scheme), None
    for step in range(SEARCH_STEPS):
        grid = whole_range(weight_OI, scheme, 1 - step * (1 - NARROWEST) / (SEARCH_STEPS - 1))
        error_OG = _error(groups_OGg, weights_1Gg, grid, scheme)
        best, best_OG = (grid, error_OG) if best_OG is None else _better(best, best_OG, grid, error_OG)
    assert best_OG is not None
    for _ in range(ROUNDS):
        steps_OGg = _places(groups_OGg, best, scheme) - best.zeros_OG[..., None]
        power_OG = (steps_OGg.square() * weights_1Gg).sum(dim=2)
        fitted_OG = (groups_OGg * steps_OGg * weights_1Gg).sum(dim=2) / power_OG
        usable = (power_OG > 0) & (fitted_OG > 0)
        grid = Grid(rounded_scales(torch.where(usable, fitted_OG, best.scales_OG), scheme), best.zeros_OG)
        best, best_OG = _better(best, best_OG, grid, _error(groups_OGg, weights_1Gg, grid, scheme))
    # Groups of a row may have scales of two grids now.
    return Grid(rounded_scales(best.scales_OG, scheme), best.zeros_OG)


def _places(groups_OGg: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    return (groups_OGg / grid.scales_OG[..., None] + grid.zeros_OG[..., None]).round_().clamp_(0, scheme.levels)


def _error(groups_OGg: Tensor, weights_1Gg: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    steps_OGg = _places(groups_OGg, grid, scheme).sub_(grid.zeros_OG[..., None])
    off_OGg = steps_OGg.mul_(grid.scales_OG[..., None]).sub_(groups_OGg)
    return off_OGg.square_().mul_(weights_1Gg).sum(dim=2)


def _better(best: Grid, best_OG: Tensor, grid: Grid, error_OG: Tensor) -> tuple[Grid, Tensor]:
    is_better = error_OG < best_OG
    return (
        Grid(
            torch.where(is_better, grid.scales_OG, best.scales_OG),
            torch.where(is_better, grid.zeros_OG, best.zeros_OG),
        ),
        torch.minimum(error_OG, best_OG),
    )
