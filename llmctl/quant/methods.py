"""Quantization methods: pure functions of a weight and the statistics of its inputs, and the table of them.

Every method takes (weight (O, I) float32, scheme, moments of the inputs or None) and returns codes on a grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.quant import columns, gguf_blocks, grid
from llmctl.quant.columns import compensated, descended
from llmctl.quant.gguf_schemes import BlockScheme
from llmctl.quant.grid import Codes, Grid, encode, rounded_scales, whole_range
from llmctl.quant.schemes import Scheme
from llmctl.tables.methods import METHODS

DAMPING = 0.01
"""GPTQ's damping, added to the diagonal of the second moments, as a fraction of its mean."""

TURNS = 3
"""`guided`: rounds of refitting scales and codes."""

PART_INPUTS = 256
"""Inputs whose second moments with all later ones are added at a time: smaller parts multiply more slowly."""

SAMPLE_ROWS = 256
"""The number of inputs kept in `Moments.sample_NI`."""

SHRINK_ROUNDS, SHRINK_POWER, SHRINK_BETA, SHRINK_GROWTH = 20, 0.7, 10.0, 1.01
"""HQQ's half-quadratic solver: iterations, exponent p, initial beta and its growth, as published."""


@dataclass
class Moments:
    """Accumulated statistics of a layer's inputs: second moments (I, I), sums of absolute values (I,), count.

    second_II: only on and above its diagonal. sample_NI: a few of the inputs themselves.
    """

    second_II: Tensor
    absolute_I: Tensor
    count: int = 0
    sample_NI: Tensor | None = None

    @classmethod
    def empty(cls, n_in: int, device: torch.device | str = "cpu") -> "Moments":
        """Return the moments of no inputs."""
        return cls(torch.zeros(n_in, n_in, device=device), torch.zeros(n_in, device=device))

    def add(self, inputs: Tensor, weights_N: Tensor | None = None) -> None:
        """Add inputs (..., I); `weights_N`, with mean 1, weight them in the second moments.

        Under autocast the products are in its type, their sum over all calls in float32. SmolLM2-135M at 4 bits, 8 of 30
        layers, bfloat16: 0.995 +- 0.010 of the KL of products in float32.
        """
        rows_NI = inputs.detach().flatten(0, -2).float()
        left_NI = rows_NI if weights_N is None else rows_NI * weights_N[:, None]
        n_in, device = rows_NI.shape[1], rows_NI.device.type
        size = -(-n_in // max(1, round(n_in / PART_INPUTS)))
        is_narrow = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_narrow else rows_NI.dtype
        left_NI, right_NI = left_NI.to(dtype), rows_NI.to(dtype)
        for first in range(0, n_in, size):  # above the diagonal: the rest is the same
            own_JI = self.second_II[first : first + size, first:]
            if is_narrow:
                own_JI += left_NI[:, first : first + size].T @ right_NI[:, first:]
            else:
                own_JI.addmm_(left_NI[:, first : first + size].T, right_NI[:, first:])
        self.absolute_I += rows_NI.new_ones(len(rows_NI)) @ rows_NI.abs()  # twice as fast as a sum over rows
        self.count += len(rows_NI)
        if self.sample_NI is None:
            self.sample_NI = rows_NI[:: max(1, len(rows_NI) // SAMPLE_ROWS)][:SAMPLE_ROWS].clone()

    def power(self, weight_OI: Tensor) -> Tensor:
        """Return the mean square of the outputs of a weight (O,): the diagonal of W H W^T, from one half of H."""
        n_in, power_O = weight_OI.shape[1], weight_OI.new_zeros(len(weight_OI))
        for first in range(0, n_in, PART_INPUTS):
            own_OJ, later_OK = weight_OI[:, first : first + PART_INPUTS], weight_OI[:, first + PART_INPUTS :]
            rows_JI = self.second_II[first : first + PART_INPUTS, first:]
            square_JJ, above_JK = rows_JI[:, : own_OJ.shape[1]], rows_JI[:, own_OJ.shape[1] :]
            symmetric_JJ = square_JJ.triu() + square_JJ.triu(1).T
            power_O += ((own_OJ @ symmetric_JJ) * own_OJ).sum(dim=1)
            power_O += 2 * ((own_OJ @ above_JK) * later_OK).sum(dim=1)
        return power_O / max(self.count, 1)

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
        upper_II = self.second_II.triu() / max(self.count, 1)
        return upper_II + upper_II.triu(1).T

    @property
    def damped(self) -> Tensor:
        """The mean second moments (I, I) with a damped diagonal, against overfitting to the calibration text."""
        second_II = self.mean
        diagonal_I = second_II.diagonal()
        diagonal_I[diagonal_I == 0] = 1.0  # inputs that are always zero would make the matrix singular
        diagonal_I += DAMPING * diagonal_I.mean()
        return second_II

    @property
    def importance(self) -> Tensor:
        """The mean squares (I,)."""
        return self.second_II.diagonal() / max(self.count, 1)


AnyScheme = Scheme | BlockScheme

Method = Callable[[Tensor, Any, "Moments | None"], Codes]


def decode(codes: Codes, scheme: AnyScheme) -> Tensor:
    """Dequantize codes to weights (O, I) float32."""
    return gguf_blocks.decode(codes, scheme) if isinstance(scheme, BlockScheme) else grid.decode(codes, scheme)


def searched(weight_OI: Tensor, scheme: AnyScheme, importance_I: Tensor | None = None) -> Codes:
    """Search the grid of least squared error, columns weighted by importance, and round to it."""
    if isinstance(scheme, BlockScheme):
        blocks = gguf_blocks.search(weight_OI, scheme, importance_I)
        return Codes(gguf_blocks.encode(weight_OI, blocks, scheme), blocks)
    found = grid.search(weight_OI, scheme, importance_I)
    return Codes(encode(weight_OI, found, scheme), found)


def fitted(weight_OI: Tensor, scheme: AnyScheme, codes: Codes, second_II: Tensor) -> Codes:
    """Refit the scales to fixed codes for least output error."""
    if isinstance(scheme, BlockScheme):
        return gguf_blocks.fitted(weight_OI, scheme, codes, second_II)
    return columns.fitted(weight_OI, scheme, codes, second_II)


def output_error(weight_OI: Tensor, other_OI: Tensor, moments: Moments) -> float:
    """Return the relative squared error of a layer's output: tr(dW H dW^T) / tr(W H W^T)."""
    return relative(*output_errors(weight_OI, other_OI, moments))


def output_errors(weight_OI: Tensor, other_OI: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of every output, and its mean square (O,)."""
    return moments.power(other_OI - weight_OI), moments.power(weight_OI)


def relative(error_O: Tensor, power_O: Tensor) -> float:
    """Return the error of outputs relative to their power."""
    return float(error_O.sum() / power_O.sum().clamp(min=1e-30))


def nearest(weight_OI: Tensor, scheme: AnyScheme, moments: Moments | None = None) -> Codes:
    """Round to nearest (RTN) over the full range; to blocks of ggml over the range of least squared error."""
    if isinstance(scheme, BlockScheme):
        return clipped(weight_OI, scheme, moments)
    found = whole_range(weight_OI, scheme)
    return Codes(encode(weight_OI, found, scheme), found)


def clipped(weight_OI: Tensor, scheme: AnyScheme, moments: Moments | None = None) -> Codes:
    """Round to nearest over the clipped range of least squared error."""
    del moments
    return searched(weight_OI, scheme)


def weighted(weight_OI: Tensor, scheme: AnyScheme, moments: Moments | None) -> Codes:
    """Round to nearest on the grid of least output error, treating inputs as uncorrelated.

    Source: llama.cpp's importance matrix, its pull request 4861.
    """
    assert moments is not None
    return searched(weight_OI, scheme, moments.importance)


def gptq(weight_OI: Tensor, scheme: AnyScheme, moments: Moments | None) -> Codes:
    """Quantize column by column, largest second moment first, and compensate each error in the remaining columns.

    The grid is searched beforehand, so that a column's group does not depend on the order. If the second moments are a
    multiple of the identity, the result equals that of `weighted`.

    Source: Frantar et al. 2023, arXiv:2210.17323, algorithm 1; order and fixed groups: the authors' `act_order` and
    `static_groups`.
    """
    assert moments is not None
    return compensated(weight_OI, scheme, searched(weight_OI, scheme, moments.importance).grid, moments.damped)


def guided(weight_OI: Tensor, scheme: AnyScheme, moments: Moments | None) -> Codes:
    """Run GPTQ, then alternately refit the scales to all codes and the codes to each other.

    No step increases the output error. Moments should be weighted by the Fisher information, see `model/fisher.py`.
    Source: coordinate descent over columns: QuantEase, Behdin et al. 2023, arXiv:2309.01885, algorithm 2.
    """
    assert moments is not None
    second_II = moments.damped
    codes = compensated(weight_OI, scheme, searched(weight_OI, scheme, moments.importance).grid, second_II)
    for _ in range(TURNS):
        codes = descended(weight_OI, scheme, fitted(weight_OI, scheme, codes, second_II), second_II)
    return fitted(weight_OI, scheme, codes, second_II)


def half_quadratic(weight_OI: Tensor, scheme: Scheme, moments: Moments | None = None) -> Codes:
    """Optimize the zero points for an l_p norm, p < 1, of the error, which tolerates outliers; needs no data.

    Source: HQQ, Badri and Shaji 2023, the half-quadratic solver with p = 0.7. HQQ's zero points are real numbers, ours
    are integers: they are rounded at the end, and the scales refit to the codes. A symmetric scheme has no zero points.
    """
    del moments
    whole = whole_range(weight_OI, scheme)
    if scheme.symmetric:
        return Codes(encode(weight_OI, whole, scheme), whole)
    groups_OGg = weight_OI.unflatten(1, (whole.scales_OG.shape[1], -1))
    scales, zeros, beta = whole.scales_OG[..., None], whole.zeros_OG[..., None].float(), SHRINK_BETA
    for _ in range(SHRINK_ROUNDS):
        codes = (groups_OGg / scales + zeros).round_().clamp_(0, scheme.levels)
        error = groups_OGg - (codes - zeros) * scales
        size = error.abs().clamp_(min=1e-8)
        # Generalized soft thresholding: the outlier part of the error, which the zero points need not explain.
        outliers = error.sign() * (size - size.pow(SHRINK_POWER - 1) / beta).clamp_(min=0)
        zeros = (codes - (groups_OGg - outliers) / scales).mean(dim=2, keepdim=True)
        beta *= SHRINK_GROWTH
    moved = Grid(whole.scales_OG, zeros.squeeze(2).round_().clamp_(0, scheme.levels).to(torch.uint8))
    codes_OI = encode(weight_OI, moved, scheme)
    steps = codes_OI.unflatten(1, (whole.scales_OG.shape[1], -1)).float() - moved.zeros_OG[..., None]
    power_OG = steps.square().sum(dim=2)
    fitted_OG = (groups_OGg * steps).sum(dim=2) / power_OG
    scales_OG = torch.where((power_OG > 0) & (fitted_OG > 0), fitted_OG, whole.scales_OG)
    moved = Grid(rounded_scales(scales_OG, scheme), moved.zeros_OG)
    return Codes(encode(weight_OI, moved, scheme), moved)


def method_of(name: str) -> Method:
    """Return the function of a method in tables/methods.py."""
    function: Method = globals()[METHODS[name].function]
    return function
