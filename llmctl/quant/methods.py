"""How a matrix gets its codes: pure functions of the weight and of what comes into it, and the table of them.

Every method takes (weight (O, I) float32, scheme, moments of the inputs or None) and returns codes on a grid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.quant.grid import Codes, Grid, encode, rounded_scales, search, whole_range
from llmctl.quant.schemes import Scheme

BLOCK = 128
"""Columns whose errors are carried on one by one (GPTQ); those behind them get the sum at once."""

DAMPING = 0.01
"""What is added to the diagonal of the second moments, as a share of its mean (GPTQ)."""

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

    def add(self, inputs: Tensor) -> None:
        """Take inputs (..., I) in."""
        rows_NI = inputs.detach().flatten(0, -2).float()
        self.second_II.addmm_(rows_NI.T, rows_NI)
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
    second_II = moments.mean.clone()
    weight_OI, grid = weight_OI.clone(), search(weight_OI, scheme, moments.importance)
    diagonal_I = second_II.diagonal()
    unused = diagonal_I == 0
    diagonal_I[unused] = 1.0
    diagonal_I += DAMPING * diagonal_I.mean()
    order = diagonal_I.argsort(descending=True, stable=True)
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
    moved = Grid(rounded_scales(kept), moved.zeros_OG)
    return Codes(encode(weight_OI, moved, scheme), moved)


METHODS: Mapping[str, Method] = {
    "nearest": nearest,
    "clip": clipped,
    "weighted": weighted,
    "hqq": half_quadratic,
    "awq": weighted,
    "gptq": gptq,
    "awq-gptq": gptq,
}
"""Methods by name. awq: scales move into the layer before, see `quant/factors.py`, and then as `weighted`, or as `gptq`."""

NEEDS_DATA = ("weighted", "awq", "gptq", "awq-gptq")
"""Methods that look at what comes into a layer."""

EQUALISES = ("awq", "awq-gptq")
"""Methods for which scales move first."""
