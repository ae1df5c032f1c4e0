"""Codes and scales of least output error, from the second moments of a layer's inputs: GPTQ, and refits of its result.

Matrices are held transposed, (I, O): what belongs to one input is contiguous, and every step here is taken for one input.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmctl.quant.gguf_schemes import BlockScheme
from llmctl.quant.grid import BlockGrid, Codes, Grid, decode, rounded_scales
from llmctl.quant.schemes import Scheme

BLOCK = 32
"""Inputs per block: changes propagate input by input within a block, and in one product to all later ones."""

RIDGE = 1e-6
"""The relative ridge that keeps the equations of the scales solvable."""

PART_FLOATS = 1 << 22
"""Weights, and floats of the equations of the scales, of the outputs that are computed at a time, to bound memory."""

SMALL = 128
"""Triangular matrices of this size are inverted directly."""


def compensated(weight_OI: Tensor, scheme: Scheme | BlockScheme, grid: Grid | BlockGrid, second_II: Tensor) -> Codes:
    """Return GPTQ's codes on a grid: inputs with large second moments first, each error compensated in the later ones."""
    order = second_II.diagonal().argsort(descending=True, stable=True)
    inverse_II = inverse_root(second_II[order][:, order])
    parts = split(weight_OI, *grid[:2], n_floats=weight_OI.shape[1])
    return Codes(
        torch.cat([_compensated(weight, scheme, Grid(*own), order, inverse_II) for weight, *own in parts]), grid
    )


def _compensated(
    weight_OI: Tensor, scheme: Scheme | BlockScheme, grid: Grid, order: Tensor, inverse_II: Tensor
) -> Tensor:
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
            scheme.snap_(torch.div(rest_O, scale_O, out=code_O).add_(zero_O))
            torch.sub(code_O, zero_O, out=error_O).mul_(scale_O)
            # Divided by the Cholesky factor's diagonal, so that its row times the error is the update (algorithm 1).
            torch.sub(rest_O, error_O, out=error_O).div_(pivot)
            rest_IO[column + 1 : last].addr_(inverse_II[column, column + 1 : last], error_O, alpha=-1)
        # Later inputs get the whole block's errors in one product, which is the same sum but faster.
        rest_IO[last:].addmm_(inverse_II[first:last, last:].T, errors_BO, alpha=-1)
    return codes_IO[order.argsort()].to(code_dtype(scheme)).T.contiguous()


def fitted(weight_OI: Tensor, scheme: Scheme, codes: Codes, second_II: Tensor) -> Codes:
    """Refit the scales to fixed codes for least output error, all groups of a row jointly: linear least squares."""
    n_groups = codes.grid.scales_OG.shape[1]
    parts = split(weight_OI, codes.codes_OI, *codes.grid, n_floats=max(weight_OI.shape[1], n_groups * n_groups))
    refit = [_fitted(weight, scheme, Codes(own, Grid(*grid)), second_II) for weight, own, *grid in parts]
    return Codes(codes.codes_OI, Grid(torch.cat(refit), codes.grid.zeros_OG))


def _fitted(weight_OI: Tensor, scheme: Scheme, codes: Codes, second_II: Tensor) -> Tensor:
    """Return refit scales (O, G)."""
    scales_OG = codes.grid.scales_OG
    n_in, n_groups = weight_OI.shape[1], scales_OG.shape[1]
    steps_IO = (codes.codes_OI.T.float() - per_input(codes.grid.zeros_OG, n_in)).contiguous()
    rest_IO = weight_OI.T - steps_IO * per_input(scales_OG, n_in)
    slope_OG, curvature_OGG = equations(steps_IO, rest_IO, second_II, n_groups)
    # In a group whose values are all zero the scale has no effect: it keeps its old one.
    empty_OG = curvature_OGG.diagonal(dim1=1, dim2=2) <= 0
    change_OG, _ = solved(slope_OG, curvature_OGG)
    solution_OG = scales_OG + change_OG
    usable_OG = (solution_OG > 0) & solution_OG.isfinite() & ~empty_OG
    refit_OG = rounded_scales(torch.where(usable_OG, solution_OG, scales_OG), scheme)
    # If a group's refit scale is rejected, its row's other scales no longer fit: keep the old row where it was better.
    gain_O = gain(refit_OG - scales_OG, slope_OG, curvature_OGG)
    return torch.where((gain_O < 0)[:, None], scales_OG, refit_OG)


def equations(
    levels_IO: Tensor, rest_IO: Tensor, second_II: Tensor, n_groups: int, *, affine: bool = False
) -> tuple[Tensor, Tensor]:
    """Return slope (O, K) and curvature (O, K, K) of half the output error by the parameters of each row.

    These are the scales of its groups, by which levels (I, O) are multiplied, and with `affine` their offsets after them.
    Groups interact through the second moments. rest_IO: what is missing to the weights. Of the curvature, which is symmetric,
    only the upper half is computed.
    """
    n_in, n_out = levels_IO.shape
    size = n_in // n_groups
    missing_IO = second_II @ rest_IO
    curvature_GGO = levels_IO.new_zeros(n_groups, n_groups, n_out)
    for group in range(n_groups):
        first, last = group * size, (group + 1) * size
        moved_IO = (second_II[first:, first:last] @ levels_IO[first:last]).mul_(levels_IO[first:])
        torch.sum(moved_IO.unflatten(0, (-1, size)), dim=1, out=curvature_GGO[group, group:])
    slope_OG = (missing_IO * levels_IO).unflatten(0, (-1, size)).sum(dim=1).T
    curvature_OGG = curvature_GGO.permute(2, 0, 1)
    if not affine:
        return slope_OG, curvature_OGG.contiguous()
    # An offset is a scale of levels that are all 1.
    sums_GI = second_II.unflatten(0, (-1, size)).sum(dim=1)
    mixed_GGO = torch.stack(
        [(levels_IO * sums_G1[:, None]).unflatten(0, (-1, size)).sum(dim=1) for sums_G1 in sums_GI], 1
    )
    offsets_GG = sums_GI.unflatten(1, (-1, size)).sum(dim=2)
    curvature_OKK = levels_IO.new_zeros(n_out, 2 * n_groups, 2 * n_groups)
    curvature_OKK[:, :n_groups, :n_groups] = curvature_OGG
    curvature_OKK[:, :n_groups, n_groups:] = mixed_GGO.permute(2, 0, 1)
    curvature_OKK[:, n_groups:, n_groups:] = offsets_GG.triu()
    return torch.cat([slope_OG, missing_IO.unflatten(0, (-1, size)).sum(dim=1).T], dim=1), curvature_OKK


def solved(slope_OK: Tensor, curvature_OKK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change of the parameters (O, K) of least error, and the curvature's upper Cholesky factor.

    The diagonal of the curvature is changed: by a small ridge, and to 1 for parameters without effect. A row whose equations
    cannot be solved gets NaN.
    """
    diagonal_OK = curvature_OKK.diagonal(dim1=1, dim2=2)
    diagonal_OK += torch.where(diagonal_OK <= 0, 1.0, RIDGE * diagonal_OK)
    upper_OKK, failed_O = torch.linalg.cholesky_ex(curvature_OKK, upper=True)
    change_OK = torch.cholesky_solve(slope_OK[..., None], upper_OKK, upper=True).squeeze(2)
    return change_OK.masked_fill_((failed_O != 0)[:, None], torch.nan), upper_OKK


def gain(change_OK: Tensor, slope_OK: Tensor, curvature_OKK: Tensor) -> Tensor:
    """Return by how much a change of each row's parameters lowers its error (O,); only the curvature's upper half is read."""
    twice_OK = torch.einsum("ogh,oh->og", curvature_OKK.triu(1), change_OK).mul_(2)
    diagonal_OK = curvature_OKK.diagonal(dim1=1, dim2=2)
    return ((2 * slope_OK - twice_OK - diagonal_OK * change_OK) * change_OK).sum(dim=1)


def descended(weight_OI: Tensor, scheme: Scheme | BlockScheme, codes: Codes, second_II: Tensor) -> Codes:
    """Refit the codes by one sweep of coordinate descent: each input takes its best codes given all others."""
    parts = split(weight_OI, codes.codes_OI, *codes.grid[:2], n_floats=weight_OI.shape[1])
    better = [_descended(weight, scheme, Codes(own, Grid(*grid)), second_II) for weight, own, *grid in parts]
    return Codes(torch.cat(better), codes.grid)


def _descended(weight_OI: Tensor, scheme: Scheme | BlockScheme, codes: Codes, second_II: Tensor) -> Tensor:
    """Return better codes (O, I)."""
    n_in = weight_OI.shape[1]
    scales_IO, zeros_IO = per_input(codes.grid.scales_OG, n_in), per_input(codes.grid.zeros_OG, n_in).float()
    codes_IO = codes.codes_OI.T.float().contiguous()
    # The negative gradient of half the output error; for inputs still to come it is kept current as codes change.
    slope_IO = second_II @ (weight_OI.T - (codes_IO - zeros_IO) * scales_IO)
    units_IO = scales_IO * second_II.diagonal()[:, None]
    rows = zip(*(matrix.unbind() for matrix in (codes_IO, slope_IO, units_IO, scales_IO)), strict=True)
    for first in range(0, n_in, BLOCK):
        last = min(first + BLOCK, n_in)
        moved_BO = torch.empty_like(slope_IO[first:last])
        for column, moved_O in enumerate(moved_BO, start=first):
            code_O, slope_O, unit_O, scale_O = next(rows)
            scheme.snap_(torch.div(slope_O, unit_O, out=moved_O).add_(code_O))
            moved_O.sub_(code_O)
            code_O.add_(moved_O)
            moved_O.mul_(scale_O)
            slope_IO[column + 1 : last].addr_(second_II[column, column + 1 : last], moved_O, alpha=-1)
        slope_IO[last:].addmm_(second_II[last:, first:last], moved_BO, alpha=-1)
    return codes_IO.to(code_dtype(scheme)).T.contiguous()


def code_dtype(scheme: Scheme | BlockScheme) -> torch.dtype:
    """Return the type of codes: those of a table are kept as its entries."""
    return torch.int8 if scheme.has_table else torch.uint8


def split(*tensors: Tensor, n_floats: int) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of outputs (O, ...) into parts; `n_floats`: of the largest that is computed for one output."""
    return zip(*(tensor.split(max(1, PART_FLOATS // n_floats)) for tensor in tensors), strict=True)


def per_input(values_OG: Tensor, n_in: int) -> Tensor:
    """Return values of groups for each of their inputs (I, O)."""
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
