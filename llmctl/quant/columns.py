"""Codes and scales of least output error, from the second moments of a layer's inputs: GPTQ, and refits of its result.

Matrices are held transposed, (I, O): what belongs to one input is contiguous, and every step here is taken for one input.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmctl.quant.grid import Codes, Grid, decode, rounded_scales
from llmctl.quant.schemes import Scheme

BLOCK = 32
"""Inputs per block: changes propagate input by input within a block, and in one product to all later ones."""

RIDGE = 1e-6
"""The relative ridge that keeps the equations of the scales solvable."""

PART_FLOATS = 1 << 22
"""Weights, and floats of the equations of the scales, of the outputs that are computed at a time, to bound memory."""

SMALL = 128
"""Triangular matrices of this size are inverted directly."""


def compensated(weight_OI: Tensor, scheme: Scheme, grid: Grid, second_II: Tensor) -> Codes:
    """Return GPTQ's codes on a grid: inputs with large second moments first, each error compensated in the later ones."""
    order = second_II.diagonal().argsort(descending=True, stable=True)
    inverse_II = inverse_root(second_II[order][:, order])
    parts = split(weight_OI, *grid, n_floats=weight_OI.shape[1])
    return Codes(
        torch.cat([_compensated(weight, scheme, Grid(*own), order, inverse_II) for weight, *own in parts]), grid
    )


def _compensated(weight_OI: Tensor, scheme: Scheme, grid: Grid, order: Tensor, inverse_II: Tensor) -> Tensor:
    """Return codes (O, I)."""
    n_in = weight_OI.shape[1]
    groups_I = order // (scheme.group or n_in)
    scales_IO, zeros_IO = grid.scales_OG.T[groups_I], grid.zeros_OG.T[groups_I].float()
    rest_IO = weight_OI.T[order].contiguous()
    codes_IO = torch.empty_like(rest_IO)
    pivots = inverse_II.diagonal().tolist()
    rows = zip(*(matrix.unbind() for matrix in (rest_IO, codes_IO, scales_IO, zeros_IO)), pivots, strict=True)
    for first in range(0, n_in, BLOCK):
        last = min(first + BLOCK, n_in)
        errors_BO = torch.empty_like(rest_IO[first:last])
        for column, error_O in enumerate(errors_BO, start=first):
            rest_O, code_O, scale_O, zero_O, pivot = next(rows)
            torch.div(rest_O, scale_O, out=code_O).add_(zero_O).round_().clamp_(0, scheme.levels)
            torch.sub(code_O, zero_O, out=error_O).mul_(scale_O)
            # Divided by the Cholesky factor's diagonal, so that its row times the error is the update (algorithm 1).
            torch.sub(rest_O, error_O, out=error_O).div_(pivot)
            rest_IO[column + 1 : last].addr_(inverse_II[column, column + 1 : last], error_O, alpha=-1)
        # Later inputs get the whole block's errors in one product, which is the same sum but faster.
        rest_IO[last:].addmm_(inverse_II[first:last, last:].T, errors_BO, alpha=-1)
    return codes_IO[order.argsort()].to(torch.uint8).T.contiguous()


def fitted(weight_OI: Tensor, scheme: Scheme, codes: Codes, second_II: Tensor) -> Codes:
    """Refit the scales to fixed codes for least output error, all groups of a row jointly: linear least squares."""
    n_groups = codes.grid.scales_OG.shape[1]
    parts = split(weight_OI, codes.codes_OI, *codes.grid, n_floats=max(weight_OI.shape[1], n_groups * n_groups))
    refit = [_fitted(weight, scheme, Codes(own, Grid(*grid)), second_II) for weight, own, *grid in parts]
    return Codes(codes.codes_OI, Grid(torch.cat(refit), codes.grid.zeros_OG))


def _fitted(weight_OI: Tensor, scheme: Scheme, codes: Codes, second_II: Tensor) -> Tensor:
    """Return refit scales (O, G)."""
    scales_OG = codes.grid.scales_OG
    n_out, n_groups = scales_OG.shape
    steps_IO = (codes.codes_OI.T.float() - per_input(codes.grid.zeros_OG, codes)).contiguous()
    slope_IO = second_II @ (weight_OI.T - steps_IO * per_input(scales_OG, codes))
    size = len(steps_IO) // n_groups
    # Normal equations of each row for the change of its scales: a (G, G) system, since groups interact through the second
    # moments. It is symmetric: only its upper half is computed.
    curvature_GGO = steps_IO.new_zeros(n_groups, n_groups, n_out)
    for group in range(n_groups):
        first, last = group * size, (group + 1) * size
        moved_IO = (second_II[first:, first:last] @ steps_IO[first:last]).mul_(steps_IO[first:])
        torch.sum(moved_IO.unflatten(0, (-1, size)), dim=1, out=curvature_GGO[group, group:])
    slope_OG = slope_IO.mul_(steps_IO).unflatten(0, (-1, size)).sum(dim=1).T
    curvature_OGG = curvature_GGO.permute(2, 0, 1).contiguous()
    # In a group whose values are all zero the scale has no effect: it keeps its old one.
    diagonal_OG = curvature_OGG.diagonal(dim1=1, dim2=2)
    empty_OG = diagonal_OG <= 0
    diagonal_OG += torch.where(empty_OG, 1.0, RIDGE * diagonal_OG)
    upper_OGG, failed_O = torch.linalg.cholesky_ex(curvature_OGG, upper=True)
    change_OG = torch.cholesky_solve(slope_OG[..., None], upper_OGG, upper=True).squeeze(2)
    solution_OG = scales_OG + change_OG
    usable_OG = (solution_OG > 0) & solution_OG.isfinite() & ~empty_OG & (failed_O == 0)[:, None]
    refit_OG = rounded_scales(torch.where(usable_OG, solution_OG, scales_OG), scheme)
    # If a group's refit scale is rejected, its row's other scales no longer fit: keep the old row where it was better.
    moved_OG = refit_OG - scales_OG
    twice_OG = torch.einsum("ogh,oh->og", curvature_OGG.triu(1), moved_OG).mul_(2)
    gained_O = ((2 * slope_OG - twice_OG - diagonal_OG * moved_OG) * moved_OG).sum(dim=1)
    return torch.where((gained_O < 0)[:, None], scales_OG, refit_OG)


def descended(weight_OI: Tensor, scheme: Scheme, codes: Codes, second_II: Tensor) -> Codes:
    """Refit the codes by one sweep of coordinate descent: each input takes its best codes given all others."""
    parts = split(weight_OI, codes.codes_OI, *codes.grid, n_floats=weight_OI.shape[1])
    better = [_descended(weight, scheme, Codes(own, Grid(*grid)), second_II) for weight, own, *grid in parts]
    return Codes(torch.cat(better), codes.grid)


def _descended(weight_OI: Tensor, scheme: Scheme, codes: Codes, second_II: Tensor) -> Tensor:
    """Return better codes (O, I)."""
    scales_IO, zeros_IO = per_input(codes.grid.scales_OG, codes), per_input(codes.grid.zeros_OG, codes).float()
    codes_IO = codes.codes_OI.T.float().contiguous()
    # The negative gradient of half the output error; for inputs still to come it is kept current as codes change.
    slope_IO = second_II @ (weight_OI.T - (codes_IO - zeros_IO) * scales_IO)
    units_IO = scales_IO * second_II.diagonal()[:, None]
    rows = zip(*(matrix.unbind() for matrix in (codes_IO, slope_IO, units_IO, scales_IO)), strict=True)
    n_in = len(codes_IO)
    for first in range(0, n_in, BLOCK):
        last = min(first + BLOCK, n_in)
        moved_BO = torch.empty_like(slope_IO[first:last])
        for column, moved_O in enumerate(moved_BO, start=first):
            code_O, slope_O, unit_O, scale_O = next(rows)
            torch.div(slope_O, unit_O, out=moved_O).add_(code_O).round_().clamp_(0, scheme.levels)
            moved_O.sub_(code_O)
            code_O.add_(moved_O)
            moved_O.mul_(scale_O)
            slope_IO[column + 1 : last].addr_(second_II[column, column + 1 : last], moved_O, alpha=-1)
        slope_IO[last:].addmm_(second_II[last:, first:last], moved_BO, alpha=-1)
    return codes_IO.to(torch.uint8).T.contiguous()


def split(*tensors: Tensor, n_floats: int) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of outputs (O, ...) into parts; `n_floats`: of the largest that is computed for one output."""
    return zip(*(tensor.split(max(1, PART_FLOATS // n_floats)) for tensor in tensors), strict=True)


def per_input(values_OG: Tensor, codes: Codes) -> Tensor:
    """Return values of groups for each of their inputs (I, O)."""
    n_in = codes.codes_OI.shape[1]
    return values_OG.T.repeat_interleave(n_in // values_OG.shape[1], dim=0)


def errors(weight_OI: Tensor, codes: Codes, scheme: Scheme, second_II: Tensor) -> Tensor:
    """Return the mean squared error of every output (O,)."""
    error_OI = decode(codes, scheme) - weight_OI
    return ((error_OI @ second_II) * error_OI).sum(dim=1)


def inverse_root(second_II: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse, damping a nearly singular matrix until it exists.

    That is the inverse of the upper factor R of the matrix itself, R R^T, which is found from its last row to its first.
    """
    wide_II = second_II.flip(0, 1).double()
    eye_I = wide_II.diagonal()
    for _ in range(8):
        lower_II, info = torch.linalg.cholesky_ex(wide_II)
        if int(info) == 0:
            return inverted(lower_II.flip(0, 1)).float()
        eye_I += eye_I.mean()
    return torch.diag(eye_I.flip(0).rsqrt()).float()  # last resort: treat the columns as uncorrelated


def inverted(upper_II: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix, by halves: most of it is in products."""
    n = len(upper_II)
    if n <= SMALL:
        eye_II = torch.eye(n, dtype=upper_II.dtype, device=upper_II.device)
        return torch.linalg.solve_triangular(upper_II, eye_II, upper=True)
    half, inverse_II = n // 2, torch.zeros_like(upper_II)
    inverse_II[:half, :half] = inverted(upper_II[:half, :half])
    inverse_II[half:, half:] = inverted(upper_II[half:, half:])
    inverse_II[:half, half:] = inverse_II[:half, :half] @ upper_II[:half, half:] @ inverse_II[half:, half:].neg()
    return inverse_II
