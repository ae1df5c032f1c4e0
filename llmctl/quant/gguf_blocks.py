"""Grids of ggml's block formats: search, rounding of scales to what a block can store, and refits to given codes.

Without data, an error is weighted by the root mean square of its group plus the weight's magnitude, as in llama.cpp without
an importance matrix. Codes are computed last, with the scales as stored, so that decoded values are bit for bit those that
a reader of the bytes gets.
Source: the idea of make_qkx2_quants in ggml-quants.c of ggml-org/ggml for the search; the refit is that of `columns.fitted`.
Shapes: O outputs, I inputs, G groups of a row, g weights of a group, S blocks of a row, K parameters of a row.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmctl.quant.columns import code_dtype, equations, gain, per_input, solved, split
from llmctl.quant.gguf_schemes import BlockScheme, nearest_entry
from llmctl.quant.grid import BlockGrid, Codes

STEPS = torch.arange(-9, 10) * 0.1
AFFINE_STEPS = torch.arange(-10, 11, 2) * 0.1
"""Offsets of the candidate scales from the scale of the full range, in code steps."""

TABLE_STEPS = torch.arange(-8, 9) * 0.025
"""Relative offsets of the candidate scales of formats with a table."""

UNITS = 8
"""Candidates for the scale of a block: the largest of its groups is one of the largest integers."""

CHUNK_WEIGHTS = 1 << 18
"""Weights that are searched at a time, to fit into the CPU cache."""

TINY = torch.finfo(torch.float32).tiny
SMALLEST = 1e-30
"""The scale of a group whose stored scale is 0: its codes do not matter."""


# --- what is stored --------------------------------------------------------------------------------------------------


def half(scale: Tensor) -> Tensor:
    """Round to float16."""
    return scale.half().float()


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, or 0 for zero and subnormal scales."""
    return torch.where(scale.abs() < TINY, 0.0, 1 / scale)


def grid_of(scheme: BlockScheme, units_OS: Tensor, offset_units_OS: Tensor, *integers_OG: Tensor) -> BlockGrid:
    """Return the grid of what a file stores."""
    scales_OG, offsets_OG = parameters(scheme, units_OS, offset_units_OS, *integers_OG)
    scales_OG = torch.where(scales_OG.abs() < SMALLEST, SMALLEST, scales_OG)
    zeros_OG = scheme.middle - offsets_OG / scales_OG
    return BlockGrid(scales_OG, zeros_OG, units_OS, offset_units_OS, *integers_OG)


def parameters(
    scheme: BlockScheme, units_OS: Tensor, offset_units_OS: Tensor, integers_OG: Tensor, offset_integers_OG: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scales and offsets (O, G) as a reader computes them."""
    times = integers_OG.shape[1] // units_OS.shape[1]
    scales_OG = units_OS.repeat_interleave(times, dim=1) * integers_OG
    offsets_OG = offset_units_OS.repeat_interleave(times, dim=1) * offset_integers_OG
    return scales_OG, -offsets_OG if scheme.offset_end else offsets_OG


def decode(codes: Codes, scheme: BlockScheme) -> Tensor:
    """Return the weights (O, I) that the bytes stand for, multiplied in the same order as by llama.cpp, for equal bits."""
    grid = codes.grid
    assert isinstance(grid, BlockGrid)
    scales_OG, offsets_OG = parameters(scheme, *grid[2:])
    levels_OGg = levels_of(codes.codes_OI, scheme).unflatten(1, (scales_OG.shape[1], -1))
    values_OGg = levels_OGg * scales_OG[..., None]
    return (values_OGg + offsets_OG[..., None] if scheme.affine else values_OGg).flatten(1)


def levels_of(codes: Tensor, scheme: BlockScheme) -> Tensor:
    """Return what codes are multiplied by a scale for: float32."""
    return codes.float() - scheme.middle  # a table's codes are kept as its entries


def rounded(
    scheme: BlockScheme, scales_OG: Tensor, offsets_OG: Tensor, powers_OG: Tensor, offset_powers_OG: Tensor
) -> BlockGrid:
    """Round scales and offsets to what blocks can store; powers: weights of their squared errors."""
    integers, offset_integers = torch.ones_like(scales_OG), torch.ones_like(scales_OG)
    n_blocks = scales_OG.shape[1] * scheme.group // scheme.block
    if not scheme.has_integers:
        units, offset_units = half(scales_OG), half(offsets_OG)
        return grid_of(scheme, units, offset_units, integers, offset_integers)
    units, integers = in_units(scales_OG, powers_OG, n_blocks, *scheme.scale_ends)
    offset_units = torch.zeros_like(units)
    if scheme.affine:
        offset_units, offset_integers = in_units(-offsets_OG, offset_powers_OG, n_blocks, 0, scheme.offset_end)
    return grid_of(scheme, units, offset_units, integers, offset_integers)


def in_units(values_OG: Tensor, powers_OG: Tensor, n_blocks: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return float16 units of blocks (O, S) and integers (O, G) whose products are near values.

    Where integers may be negative, the value of largest magnitude becomes one of the lowest.
    """
    values, powers = values_OG.unflatten(1, (n_blocks, -1)), powers_OG.unflatten(1, (n_blocks, -1))
    if low < 0:
        largest = values.gather(2, values.abs().argmax(dim=2, keepdim=True))
        ends = [low + step for step in range(min(UNITS, -low // 2))]
    else:
        values = values.clamp(min=0)
        largest, ends = values.amax(dim=2, keepdim=True), [high - step for step in range(min(UNITS, high // 2))]
    found: tuple[Tensor, Tensor, Tensor] | None = None
    for end in ends:
        unit = half(largest / end)
        integers = (values * inverse(unit)).round_().clamp_(low, high)
        error = (powers * (unit * integers - values).square()).sum(dim=2, keepdim=True)
        if found is None:
            found = error, unit, integers
        else:
            is_better = error < found[0]
            found = (
                torch.where(is_better, error, found[0]),
                torch.where(is_better, unit, found[1]),
                torch.where(is_better, integers, found[2]),
            )
    assert found is not None
    return found[1].squeeze(2), found[2].flatten(1)


# --- search ----------------------------------------------------------------------------------------------------------


def search(weight_OI: Tensor, scheme: BlockScheme, importance_I: Tensor | None = None) -> BlockGrid:
    """Search the grid of least squared error, weighted by the importance of inputs."""
    rows = max(1, CHUNK_WEIGHTS // weight_OI.shape[1])
    parts = [_search(part, scheme, importance_I) for part in weight_OI.split(rows)]
    return BlockGrid(*map(torch.cat, zip(*parts, strict=True)))


def _search(weight_OI: Tensor, scheme: BlockScheme, importance_I: Tensor | None) -> BlockGrid:
    groups_OGg = weight_OI.unflatten(1, (-1, scheme.group))
    weights = groups_OGg.square().mean(dim=-1, keepdim=True).sqrt() + groups_OGg.abs()
    if importance_I is not None:
        weights = (
            importance_I.clamp(min=importance_I.mean() * 1e-6 + TINY)
            .unflatten(0, (-1, scheme.group))
            .expand_as(weights)
        )
    offset = torch.zeros_like(groups_OGg[..., :1])
    if scheme.affine:
        scale, offset = fit_affine(groups_OGg, weights, scheme.levels, below_zero=scheme.offset_end > 0)
        levels = ((groups_OGg - offset) * inverse(scale)).round_().clamp_(0, scheme.levels)
    else:
        snap, firsts = candidates(scheme, groups_OGg)
        scale = fit(groups_OGg, weights, firsts, snap)
        levels = snap(groups_OGg * inverse(scale))
    powers = (weights * levels.square()).sum(dim=2)
    return rounded(scheme, scale.squeeze(2), offset.squeeze(2), powers, weights.sum(dim=2))


def candidates(scheme: BlockScheme, x: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """Return the rounding to levels, and candidate inverse scales (O, G, 1) around the full range.

    Their signs map the weight of largest magnitude to the lowest level, which is further from 0 than the highest; of a table
    also to the highest, since its entries are of different distances.
    """
    extreme = inverse(x.gather(-1, x.abs().argmax(dim=-1, keepdim=True)))
    if scheme.table:
        ends = (scheme.table[0], scheme.table[-1])
        return partial(nearest_entry, table=scheme.table), [
            extreme * (end * (1 + step)) for end in ends for step in TABLE_STEPS.tolist()
        ]
    low, high = scheme.least - scheme.middle, scheme.levels - scheme.middle
    steps = STEPS.tolist() if scheme.bits < 8 else [0.0]
    return lambda codes: codes.round_().clamp_(low, high), [extreme * (low - step) for step in steps]


def fit(x: Tensor, w: Tensor, inverses: list[Tensor], snap: Callable[[Tensor], Tensor]) -> Tensor:
    """Fit the scale (..., 1) of x ~ scale * level: of every candidate the levels, and of those the least-squares scale."""
    best_scale, best_gain = torch.zeros_like(x[..., :1]), torch.full_like(x[..., :1], -1.0)
    for first in inverses:
        levels = snap(x * first)
        weighted = w * levels
        product, power = (weighted * x).sum(-1, keepdim=True), (weighted * levels).sum(-1, keepdim=True)
        scale = product * inverse(power)
        gain = scale * product  # the reduction of the weighted error compared to all levels 0
        is_better = gain > best_gain
        best_scale, best_gain = torch.where(is_better, scale, best_scale), torch.where(is_better, gain, best_gain)
    return best_scale


def fit_affine(x: Tensor, w: Tensor, highest: int, *, below_zero: bool) -> tuple[Tensor, Tensor]:
    """Fit scale and offset (..., 1) of x ~ scale * code + offset, 0 <= code <= highest.

    below_zero: constrain the offset to be at most 0, for formats that store its magnitude without a sign.
    """
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


def encode(weight_OI: Tensor, grid: BlockGrid, scheme: BlockScheme) -> Tensor:
    """Round weights to the nearest codes (O, I) of a grid."""
    scaled = weight_OI.unflatten(1, (-1, scheme.group)) / grid.scales_OG[..., None] + grid.zeros_OG[..., None]
    return scheme.snap_(scaled.nan_to_num_(0.0)).to(code_dtype(scheme)).flatten(1)


# --- refit -----------------------------------------------------------------------------------------------------------


def fitted(weight_OI: Tensor, scheme: BlockScheme, codes: Codes, second_II: Tensor) -> Codes:
    """Refit scales and offsets to fixed codes for least output error, all groups of a row jointly."""
    n_parameters = codes.grid.scales_OG.shape[1] * (2 if scheme.affine else 1)
    n_floats = max(weight_OI.shape[1], 2 * n_parameters * n_parameters)
    parts = split(weight_OI, codes.codes_OI, *codes.grid, n_floats=n_floats)
    refit = [_fitted(weight, scheme, own, BlockGrid(*grid), second_II) for weight, own, *grid in parts]
    return Codes(codes.codes_OI, BlockGrid(*map(torch.cat, zip(*refit, strict=True))))


def _fitted(weight_OI: Tensor, scheme: BlockScheme, codes_OI: Tensor, grid: BlockGrid, second_II: Tensor) -> BlockGrid:
    scales_OG, offsets_OG = parameters(scheme, *grid[2:])
    n_in, n_groups = weight_OI.shape[1], scales_OG.shape[1]
    levels_IO = levels_of(codes_OI.T, scheme).contiguous()
    rest_IO = weight_OI.T - levels_IO * per_input(scales_OG, n_in) - per_input(offsets_OG, n_in)
    slope_OK, curvature_OKK = equations(levels_IO, rest_IO, second_II, n_groups, affine=scheme.affine)
    before_OK = torch.cat([scales_OG, offsets_OG], dim=1) if scheme.affine else scales_OG
    change_OK, upper_OKK = solved(slope_OK, curvature_OKK)
    wanted_OK = before_OK + change_OK
    powers_OK = curvature_OKK.diagonal(dim1=1, dim2=2)
    powers_OK = curvature_OKK.diagonal(dim1=1, dim2=2)
    near = rounded(scheme, *halves(wanted_OK, scheme), *halves(powers_OK, scheme))
    found = [near]
    if scheme.has_integers:
        inverse_OKK = torch.linalg.cholesky(torch.cholesky_inverse(upper_OKK, upper=True), upper=True)
        found += [with_feedback(scheme, wanted_OK, inverse_OKK, base) for base in (near, grid)]
        whole_OKK = curvature_OKK + curvature_OKK.triu(1).mT
        found += [with_units(scheme, before_OK, slope_OK, whole_OKK, base) for base in found]
    best, best_O1 = grid, torch.zeros_like(slope_OK[:, :1])
    for one in found:
        after = parameters(scheme, *one[2:])
        after_OK = torch.cat(after, dim=1) if scheme.affine else after[0]
        gain_O1 = gain(after_OK - before_OK, slope_OK, curvature_OKK)[:, None]
        is_better = gain_O1 > best_O1  # not of NaN
        best = BlockGrid(*(torch.where(is_better, new, old) for new, old in zip(one, best, strict=True)))
        best_O1 = torch.where(is_better, gain_O1, best_O1)
    return best


def halves(values_OK: Tensor, scheme: BlockScheme) -> tuple[Tensor, Tensor]:
    """Return what belongs to scales and to offsets (O, G) of a row's parameters; zeros if it has no offsets."""
    if not scheme.affine:
        return values_OK, torch.zeros_like(values_OK)
    scales_OG, offsets_OG = values_OK.chunk(2, dim=1)
    return scales_OG, offsets_OG


def with_feedback(scheme: BlockScheme, wanted_OK: Tensor, upper_OKK: Tensor, grid: BlockGrid) -> BlockGrid:
    """Round a row's parameters one after the other to integers of their blocks' units, each error compensated in the later.

    upper_OKK: the upper Cholesky factor of the inverse of the curvature. This is GPTQ on the parameters of a row.
    """
    times = grid.integers_OG.shape[1] // grid.units_OS.shape[1]
    units_OK = grid.units_OS.repeat_interleave(times, dim=1)
    ends = [scheme.scale_ends] * units_OK.shape[1]
    if scheme.affine:
        units_OK = torch.cat([units_OK, -grid.offset_units_OS.repeat_interleave(times, dim=1)], dim=1)
        ends += [(0, scheme.offset_end)] * grid.integers_OG.shape[1]
    rest_OK, integers_OK = wanted_OK.clone(), torch.empty_like(wanted_OK)
    inverses_OK = inverse(units_OK)
    for k, (low, high) in enumerate(ends):
        integers_OK[:, k] = (rest_OK[:, k] * inverses_OK[:, k]).round_().clamp_(low, high)
        error_O = (rest_OK[:, k] - integers_OK[:, k] * units_OK[:, k]) / upper_OKK[:, k, k]
        rest_OK[:, k + 1 :] -= error_O[:, None] * upper_OKK[:, k, k + 1 :]
    integers, offset_integers = halves(integers_OK, scheme)
    return grid_of(scheme, grid.units_OS, grid.offset_units_OS, integers, offset_integers)


def with_units(
    scheme: BlockScheme, before_OK: Tensor, slope_OK: Tensor, curvature_OKK: Tensor, grid: BlockGrid
) -> BlockGrid:
    """Refit the units of blocks to given integers: linear least squares as well; curvature_OKK is the whole matrix."""
    parts = [grid.integers_OG, -grid.offset_integers_OG] if scheme.affine else [grid.integers_OG]
    integers_OK = torch.cat(parts, dim=1)
    n_units = len(parts) * grid.units_OS.shape[1]
    # A row's parameters are linear in its units: each is the unit of its block times its integer.
    moved_OKU = (curvature_OKK * integers_OK[:, None]).unflatten(2, (n_units, -1)).sum(dim=3)
    curvature_OUU = (moved_OKU * integers_OK[..., None]).unflatten(1, (n_units, -1)).sum(dim=2)
    units_OU = torch.cat([grid.units_OS, grid.offset_units_OS], dim=1)[:, :n_units]
    now_OK = units_OU.repeat_interleave(integers_OK.shape[1] // n_units, dim=1) * integers_OK
    rest_OK = slope_OK - ((now_OK - before_OK)[:, None] @ curvature_OKK).squeeze(1)
    change_OU, _ = solved((rest_OK * integers_OK).unflatten(1, (n_units, -1)).sum(dim=2), curvature_OUU)
    units, *offset_units = (half(units_OU + change_OU)).chunk(len(parts), dim=1)
    return grid_of(scheme, units, *(offset_units or [grid.offset_units_OS]), grid.integers_OG, grid.offset_integers_OG)
