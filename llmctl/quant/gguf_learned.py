"""Linear layers of ggml's blocks with fixed codes whose scales and offsets are trained.

In every forward pass they are rounded to what blocks store: float16 units times small integers, with a straight-through
gradient. As in `learned.py`, codes stay as the solver chose them: they compensate each other's errors.
Shapes: O outputs, I inputs, G groups of a row, S blocks of a row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmctl.quant.columns import code_dtype
from llmctl.quant.gguf_blocks import grid_of, half, levels_of, parameters
from llmctl.quant.gguf_schemes import BlockScheme
from llmctl.quant.grid import BlockGrid, Codes
from llmctl.quant.learned import TunedLinear

PACE_BITS = 4
"""With each additional bit the same relative change of a scale moves the outermost codes by twice as many steps: what is trained
acts on it with half the weight, and with twice the weight for each bit less than these."""


class _Decoded(torch.autograd.Function):
    """Dequantization of fixed codes, in the order of `decode`, with gradients for scales and offsets (O, G)."""

    @staticmethod
    def forward(
        ctx: Any, codes_OI: Tensor, scales_OG: Tensor, offsets_OG: Tensor | None, scheme: BlockScheme
    ) -> Tensor:
        ctx.save_for_backward(codes_OI)  # uint8 or int8; the levels are computed again in the backward pass
        ctx.scheme = scheme
        values_OGg = _levels(codes_OI, scheme).mul_(scales_OG[..., None])
        return (values_OGg if offsets_OG is None else values_OGg.add_(offsets_OG[..., None])).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        (codes_OI,) = ctx.saved_tensors
        levels_OGg = _levels(codes_OI, ctx.scheme)
        grad_OGg = grad_OI.unflatten(1, levels_OGg.shape[1:])
        offsets_OG = grad_OGg.sum(dim=2) if ctx.needs_input_grad[2] else None
        return None, levels_OGg.mul_(grad_OGg).sum(dim=2), offsets_OG, None


def _levels(codes_OI: Tensor, scheme: BlockScheme) -> Tensor:
    return levels_of(codes_OI, scheme).unflatten(1, (-1, scheme.group))


class BlockLinear(TunedLinear):
    """A linear layer with fixed codes (O, I) of a block format and learned scales.

    Parameters: ratio (O, G), the logarithm of a factor on the scales; shift (O, G) of formats with offsets: what is added to
    them, in halves of the range of their group's codes. Buffers: the codes and what the file stores of the scales.
    """

    codes_OI: Tensor

    def __init__(self, n_in: int, n_out: int, scheme: BlockScheme, *, bias: bool) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self.scheme = scheme
        n_groups, n_blocks = scheme.n_groups(n_in), n_in // scheme.block
        self.ratio = nn.Parameter(torch.zeros(n_out, n_groups))
        self.shift = nn.Parameter(torch.zeros(n_out, n_groups)) if scheme.affine else None
        self.register_buffer("codes_OI", torch.zeros(n_out, n_in, dtype=code_dtype(scheme)))
        for name in STORED:
            self.register_buffer(name, torch.ones(n_out, n_blocks if name.endswith("S") else n_groups))

    @torch.no_grad()
    def put(self, codes: Codes) -> None:
        """Initialize from the codes of a quantized weight."""
        assert isinstance(codes.grid, BlockGrid)
        self.codes_OI.copy_(codes.codes_OI)
        for name in STORED:
            getattr(self, name).copy_(getattr(codes.grid, name))
        for parameter in (self.ratio, self.shift):
            if parameter is not None:
                parameter.zero_()

    def rounded(self) -> Tensor:
        """Return the dequantized weight (O, I)."""
        tensors = {name: getattr(self, name) for name in (*STORED, "ratio", "shift") if getattr(self, name) is not None}
        exact = trained(tensors, self.scheme)
        with torch.no_grad():
            stored = parameters(self.scheme, *rounded(tensors, self.scheme, *exact))
        # The values are those that are stored, the gradients those of the exact ones.
        scales, offsets = (own + (one - one.detach()) for own, one in zip(stored, exact, strict=True))
        weight: Tensor = _Decoded.apply(self.codes_OI, scales, offsets if self.scheme.affine else None, self.scheme)  # type: ignore[no-untyped-call]
        return weight


STORED = ("units_OS", "offset_units_OS", "integers_OG", "offset_integers_OG")
"""What a file stores of the scales, by the names of `BlockGrid`."""


def trained(tensors: Mapping[str, Tensor], scheme: BlockScheme) -> tuple[Tensor, Tensor]:
    """Return scales and offsets (O, G) of a layer as they are trained, not rounded."""
    scales_OG, offsets_OG = parameters(scheme, *(tensors[name] for name in STORED))
    pace = 2.0 ** (PACE_BITS - scheme.bits)
    exact_OG = scales_OG * (tensors["ratio"] * pace).exp()
    if scheme.affine:
        offsets_OG = offsets_OG + tensors["shift"] * pace * (scales_OG.abs() * (scheme.levels / 2))
    return exact_OG, offsets_OG


def rounded(
    tensors: Mapping[str, Tensor], scheme: BlockScheme, scales_OG: Tensor, offsets_OG: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a file stores of trained scales and offsets: of untrained ones what they were read from."""
    units, offset_units, integers, offset_integers = (tensors[name] for name in STORED)
    if not scheme.has_integers:
        return half(scales_OG), half(offsets_OG), integers, offset_integers
    units, integers = refit(scales_OG, units, integers, *scheme.scale_ends)
    if scheme.affine:
        offset_units, offset_integers = refit(-offsets_OG, offset_units, offset_integers, 0, scheme.offset_end)
    return units, offset_units, integers, offset_integers


def refit(values_OG: Tensor, units_OS: Tensor, integers_OG: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return units (O, S) and integers (O, G) whose products are near values, from those that were near before.

    Units of least squares for the integers, then integers for these units, then units for these.
    """
    n_blocks = units_OS.shape[1]
    values, integers = values_OG.unflatten(1, (n_blocks, -1)), integers_OG.unflatten(1, (n_blocks, -1))
    units = units_of(values, integers, units_OS[..., None])
    integers = torch.where(units == 0, integers, (values / units).round_().clamp_(low, high))
    return half(units_of(values, integers, units)).squeeze(2), integers.flatten(1)


def units_of(values_OSg: Tensor, integers_OSg: Tensor, units_OS1: Tensor) -> Tensor:
    """Return the units (O, S, 1) of least squares for integers; the given ones for blocks of integers that are all 0."""
    power = integers_OSg.square().sum(dim=2, keepdim=True)
    return torch.where(power > 0, (values_OSg * integers_OSg).sum(dim=2, keepdim=True) / power, units_OS1)


def learned_codes(tensors: Mapping[str, Tensor], scheme: BlockScheme) -> Codes:
    """Return the codes of a trained layer from its state dict."""
    tensors = {name: tensor if name == "codes_OI" else tensor.float() for name, tensor in tensors.items()}
    return Codes(tensors["codes_OI"], grid_of(scheme, *rounded(tensors, scheme, *trained(tensors, scheme))))
