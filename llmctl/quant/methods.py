"""How a matrix gets its codes: pure functions of the weight and of what comes into it, and the table of them.

Every method takes (weight (O, I) float32, scheme, moments of the inputs or None) and returns codes on a grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.quant.grid import Codes, Grid, decode, encode, grouped, rounded_scales, search, whole_range
from llmctl.quant.schemes import Scheme
from llmctl.tables.methods import METHODS

BLOCK = 128
"""Columns whose errors are carried on one by one (GPTQ); those behind them get the sum at once."""

DAMPING = 0.01
"""What is added to the diagonal of the second moments, as a share of its mean (GPTQ)."""

TURNS, RIDGE = 3, 1e-6
"""Turns of fitting scales and codes to each other, and what keeps the scales' equations solvable, as a share (guided)."""

SAMPLE_ROWS = 256
"""Inputs that are kept as they are."""

SHRINK_ROUNDS, SHRINK_POWER, SHRINK_BETA, SHRINK_GROWTH = 20, 0.7, 10.0, 1.01
"""The half-quadratic solver's rounds, exponent, first weight and its growth, as its authors have them."""


@dataclass
class Moments:
    """What comes into a matrix, summed up: second moments (I, I), absolute values (I,), and how many inputs.

    sample_NI: a few of the inputs as they are.
    """

    second_II: Tensor
    absolute_I: Tensor
    count: int = 0
    sample_NI: Tensor | None = None

    @classmethod
    def empty(cls, n_in: int, device: torch.device | str = "cpu") -> "Moments":
        """Return moments of nothing."""
        return cls(torch.zeros(n_in, n_in, device=device), torch.zeros(n_in, device=device))

    def add(self, inputs: Tensor, weights_N: Tensor | None = None) -> None:
        """Take inputs (..., I) in; weights, 1 on average, tell how much each of them counts in the second moments."""
        rows_NI = inputs.detach().flatten(0, -2).float()
        left_NI = rows_NI if weights_N is None else rows_NI * weights_N[:, None]
        self.second_II.addmm_(left_NI.T, rows_NI)
        self.absolute_I += rows_NI.abs().sum(dim=0)
        self.count += len(rows_NI)
        if self.sample_NI is None:
            self.sample_NI = rows_NI[:: max(1, len(rows_NI) // SAMPLE_ROWS)][:SAMPLE_ROWS].clone()

    def divided(self, factors_I: Tensor) -> "Moments":
        """Return the moments of the inputs divided by factors (I,)."""
        return Moments(
            self.second_II / factors_I / factors_I[:, None],
            self.absolute_I / factors_I,
            self.count,
            None if self.sample_NI is None else self.sample_NI / factors_I,
        )

    @property
    def mean(self) -> Tensor:
        """The mean second moments (I, I)."""
        return self.second_II / max(self.count, 1)

    @property
    def damped(self) -> Tensor:
        """The mean second moments (I, I) with a larger diagonal: what comes in on other texts differs a little."""
        second_II = self.mean.clone()
        diagonal_I = second_II.diagonal()
        diagonal_I[diagonal_I == 0] = 1.0
        diagonal_I += DAMPING * diagonal_I.mean()
        return second_II

    @property
    def importance(self) -> Tensor:
        """The mean squares (I,)."""
        return self.second_II.diagonal() / max(self.count, 1)


Method = Callable[[Tensor, Scheme, "Moments | None"], Codes]


def output_error(weight_OI: Tensor, other_OI: Tensor, moments: Moments) -> float:
    """Return the share of a layer's output that is lost: tr(dW H dW^T) / tr(W H W^T)."""
    mean_II = moments.mean
    off_OI = other_OI - weight_OI
    power = ((weight_OI @ mean_II) * weight_OI).sum()
    return float(((off_OI @ mean_II) * off_OI).sum() / power.clamp(min=1e-30))


def nearest(weight_OI: Tensor, scheme: Scheme, moments: Moments | None = None) -> Codes:
    """Round to the nearest value of the whole range."""
    del moments
    grid = whole_range(weight_OI, scheme)
    return Codes(encode(weight_OI, grid, scheme), grid)


def clipped(weight_OI: Tensor, scheme: Scheme, moments: Moments | None = None) -> Codes:
    """Round to the nearest value of the range of least squared error."""
    del moments
    grid = search(weight_OI, scheme)
    return Codes(encode(weight_OI, grid, scheme), grid)


def weighted(weight_OI: Tensor, scheme: Scheme, moments: Moments | None) -> Codes:
    """Round to the nearest on the grid of least error in the outputs, inputs taken as independent.

    Source: llama.cpp's importance matrix, its pull request 4861.
    """
    assert moments is not None
    grid = search(weight_OI, scheme, moments.importance)
    return Codes(encode(weight_OI, grid, scheme), grid)


def gptq(weight_OI: Tensor, scheme: Scheme, moments: Moments | None) -> Codes:
    """Round column after column, the most excited first, and let the columns behind make up for what was lost.

    The grid is searched beforehand, so that every column keeps the group it stands in whatever the order. With second
    moments that are a multiple of the identity it is `weighted`.

    Source: Frantar et al. 2023, arXiv:2210.17323, algorithm 1; order and fixed groups: the authors' `act_order` and
    `static_groups`.
    """
    assert moments is not None
    second_II = moments.damped
    weight_OI, grid = weight_OI.clone(), search(weight_OI, scheme, moments.importance)
    order = second_II.diagonal().argsort(descending=True, stable=True)
    inverse_II = inverse_root(second_II[order][:, order])
    n_in = weight_OI.shape[1]
    groups_I = order // (scheme.group or n_in)
    scales_OI, zeros_OI = grid.scales_OG[:, groups_I], grid.zeros_OG[:, groups_I].float()
    rest_OI = weight_OI[:, order]
    codes_OI = torch.empty_like(rest_OI, dtype=torch.uint8)
    for first in range(0, n_in, BLOCK):
        last = min(first + BLOCK, n_in)
        errors_OB = torch.empty_like(rest_OI[:, first:last])
        for column in range(first, last):
            scale_O, zero_O = scales_OI[:, column], zeros_OI[:, column]
            place_O = (rest_OI[:, column] / scale_O + zero_O).round_().clamp_(0, scheme.levels)
            codes_OI[:, column] = place_O.to(torch.uint8)
            error_O = (rest_OI[:, column] - (place_O - zero_O) * scale_O) / inverse_II[column, column]
            errors_OB[:, column - first] = error_O
            rest_OI[:, column + 1 : last].addr_(error_O, inverse_II[column, column + 1 : last], alpha=-1)
        rest_OI[:, last:].addmm_(errors_OB, inverse_II[first:last, last:], alpha=-1)
    return Codes(codes_OI[:, order.argsort()].contiguous(), grid)


def guided(weight_OI: Tensor, scheme: Scheme, moments: Moments | None) -> Codes:
    """Go on from where `gptq` ends: scales are fitted to all codes at once, and codes to each other, in turns.

    No turn makes the error in the outputs larger. The moments are to be weighted by what errors cost, see
    `model/fisher.py`. Source: column after column, each to the best of its values while the others stay: QuantEase, Behdin
    et al. 2023, arXiv:2309.01885, algorithm 2.
    """
    assert moments is not None
    codes, second_II = gptq(weight_OI, scheme, moments), moments.damped
    for _ in range(TURNS):
        codes = descended(weight_OI, scheme, fitted(weight_OI, scheme, codes, second_II), second_II)
    return fitted(weight_OI, scheme, codes, second_II)


def fitted(weight_OI: Tensor, scheme: Scheme, codes: Codes, second_II: Tensor) -> Codes:
    """Return codes with the scales of least error in the outputs, each row's groups together: linear least squares."""
    scales_OG, zeros_OG = codes.grid
    n_groups = scales_OG.shape[1]
    steps_OGg = grouped(codes.codes_OI, scheme).float() - zeros_OG[..., None]
    steps_OI, wanted_OI = steps_OGg.flatten(1), weight_OI @ second_II
    size = steps_OGg.shape[2]
    products = []
    for group in range(n_groups):
        moved_OI = steps_OGg[:, group] @ second_II[group * size : (group + 1) * size]
        products.append(grouped(moved_OI * steps_OI, scheme).sum(dim=2))
    curvature_OGG, slope_OG = torch.stack(products, dim=1), grouped(wanted_OI * steps_OI, scheme).sum(dim=2)
    # A group whose codes are all zeros has no scale to find: it keeps its own.
    diagonal_OG = curvature_OGG.diagonal(dim1=1, dim2=2)
    empty_OG = diagonal_OG <= 0
    diagonal_OG += torch.where(empty_OG, 1.0, RIDGE * diagonal_OG)
    found_OG = torch.linalg.solve(curvature_OGG, slope_OG[..., None]).squeeze(2)
    usable_OG = (found_OG > 0) & found_OG.isfinite() & ~empty_OG
    better = Codes(codes.codes_OI, Grid(rounded_scales(torch.where(usable_OG, found_OG, scales_OG), scheme), zeros_OG))
    # Scales that could not be taken leave the others of their row without what those were to make up for.
    loses_O = errors(weight_OI, better, scheme, second_II) > errors(weight_OI, codes, scheme, second_II)
    return Codes(codes.codes_OI, Grid(torch.where(loses_O[:, None], scales_OG, better.grid.scales_OG), zeros_OG))


def descended(weight_OI: Tensor, scheme: Scheme, codes: Codes, second_II: Tensor) -> Codes:
    """Return codes after every column took, in its turn, the values of least error in the outputs given all others."""
    n_in = weight_OI.shape[1]
    groups_I = torch.arange(n_in) // (scheme.group or n_in)
    scales_OI, zeros_OI = codes.grid.scales_OG[:, groups_I], codes.grid.zeros_OG[:, groups_I].float()
    places_OI = codes.codes_OI.float()
    slope_OI = (weight_OI - (places_OI - zeros_OI) * scales_OI) @ second_II
    steps_OI = scales_OI * second_II.diagonal()
    for first in range(0, n_in, BLOCK):
        last = min(first + BLOCK, n_in)
        slope_OB, inner_BB = slope_OI[:, first:last].clone(), second_II[first:last, first:last]
        moved_OB = torch.empty_like(slope_OB)
        for column in range(first, last):
            place_O, near = places_OI[:, column], column - first
            better_O = (place_O + slope_OB[:, near] / steps_OI[:, column]).round_().clamp_(0, scheme.levels)
            moved_OB[:, near] = (better_O - place_O) * scales_OI[:, column]
            places_OI[:, column] = better_O
            slope_OB.addr_(moved_OB[:, near], inner_BB[near], alpha=-1)
        slope_OI.addmm_(moved_OB, second_II[first:last], alpha=-1)
    return Codes(places_OI.to(torch.uint8), codes.grid)


def errors(weight_OI: Tensor, codes: Codes, scheme: Scheme, second_II: Tensor) -> Tensor:
    """Return the mean square that every output (O,) is off by."""
    off_OI = decode(codes, scheme) - weight_OI
    return ((off_OI @ second_II) * off_OI).sum(dim=1)


def inverse_root(second_II: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse; what is nearly singular is damped until it has one."""
    wide_II = second_II.double()
    eye_I = wide_II.diagonal()
    for _ in range(8):
        lower_II, info = torch.linalg.cholesky_ex(wide_II)
        if int(info) == 0:
            upper_II, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
            if int(info) == 0:
                return upper_II.float()
        eye_I += eye_I.mean()
    return torch.diag(eye_I.rsqrt()).float()  # of no use but right: the columns count as independent


def half_quadratic(weight_OI: Tensor, scheme: Scheme, moments: Moments | None = None) -> Codes:
    """Move the zeros so that few weights are far off rather than many a little; needs no data.

    Source: HQQ, Badri and Shaji 2023, the half-quadratic solver with an l_p norm, p = 0.7. Its zeros are real numbers, ours
    codes: they are rounded at the end, and the scales fitted to the codes. A symmetric scheme has no zeros to move.
    """
    del moments
    grid = whole_range(weight_OI, scheme)
    if scheme.symmetric:
        return Codes(encode(weight_OI, grid, scheme), grid)
    groups_OGg = weight_OI.unflatten(1, (grid.scales_OG.shape[1], -1))
    scales, zeros, beta = grid.scales_OG[..., None], grid.zeros_OG[..., None].float(), SHRINK_BETA
    for _ in range(SHRINK_ROUNDS):
        places = (groups_OGg / scales + zeros).round_().clamp_(0, scheme.levels)
        off = groups_OGg - (places - zeros) * scales
        size = off.abs().clamp_(min=1e-8)
        shrunk = off.sign() * (size - size.pow(SHRINK_POWER - 1) / beta).clamp_(min=0)
        zeros = (places - (groups_OGg - shrunk) / scales).mean(dim=2, keepdim=True)
        beta *= SHRINK_GROWTH
    moved = Grid(grid.scales_OG, zeros.squeeze(2).round_().clamp_(0, scheme.levels).to(torch.uint8))
    codes_OI = encode(weight_OI, moved, scheme)
    steps = codes_OI.unflatten(1, (grid.scales_OG.shape[1], -1)).float() - moved.zeros_OG[..., None]
    power_OG = steps.square().sum(dim=2)
    fitted_OG = (groups_OGg * steps).sum(dim=2) / power_OG
    kept = torch.where((power_OG > 0) & (fitted_OG > 0), fitted_OG, grid.scales_OG)
    moved = Grid(rounded_scales(kept, scheme), moved.zeros_OG)
    return Codes(encode(weight_OI, moved, scheme), moved)


def method_of(name: str) -> Method:
    """Return the function of a method in tables/methods.py."""
    function: Method = globals()[METHODS[name].function]
    return function
