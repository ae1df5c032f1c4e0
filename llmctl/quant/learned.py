"""Linear layers for quantization-aware training: learn the scales of fixed codes, or scales and weights.

Source: LSQ, Esser et al. 2020, arXiv:1902.08153, eq. 3 and 5 (gradients of weight and scale); fixed zero points,
training weights and scales together, and scales alone with fixed codes: EfficientQAT, Chen et al. 2024,
arXiv:2407.11062, section 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmctl.quant.grid import Codes, Grid, decode, encode, grouped, rounded_scales
from llmctl.quant.schemes import Scheme

NEAREST = 0.49
"""The largest initial distance of a weight from its code's value, in steps: below half, so it rounds to that code."""


class _Rounded(torch.autograd.Function):
    """Fake quantization with LSQ's gradients: straight-through for weights in range, exact for scales."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(weight_OI, scales_OG, zeros_OG)
        ctx.levels = levels
        scales, zeros = scales_OG[..., None], zeros_OG[..., None]
        groups = weight_OI.unflatten(1, (scales_OG.shape[1], -1))
        codes = (groups / scales).add_(zeros).round_().clamp_(0, levels)
        return codes.sub_(zeros).mul_(scales).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, scales_OG, zeros_OG = ctx.saved_tensors
        scales, zeros = scales_OG[..., None], zeros_OG[..., None]
        n_groups = scales_OG.shape[1]
        steps = weight_OI.unflatten(1, (n_groups, -1)) / scales
        position = steps + zeros
        # Weights that round to an end of the range still count as inside: clamping has no effect on them.
        inside = (position >= -0.5) & (position <= ctx.levels + 0.5)
        grad = grad_OI.unflatten(1, (n_groups, -1))
        # d(output)/d(scale): the rounding error in range, the clamped code outside.
        slope = position.round_().clamp_(0, ctx.levels).sub_(zeros).sub_(steps * inside)
        return (grad * inside).flatten(1), (grad * slope).sum(dim=2), None, None


class _Scaled(torch.autograd.Function):
    """Dequantization of fixed codes with gradients for the scales."""

    @staticmethod
    def forward(ctx: Any, codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
        ctx.save_for_backward(codes_OI, zeros_OG)  # uint8; the float steps are recomputed in the backward pass
        return _steps(codes_OI, zeros_OG).mul_(scales_OG[..., None]).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        steps = _steps(*ctx.saved_tensors)
        return None, steps.mul_(grad_OI.unflatten(1, steps.shape[1:])).sum(dim=2), None


def _steps(codes_OI: Tensor, zeros_OG: Tensor) -> Tensor:
    return codes_OI.float().unflatten(1, (zeros_OG.shape[1], -1)).sub_(zeros_OG[..., None])


class TunedLinear(nn.Module, ABC):
    """A linear layer whose weight is computed from what is trained in every forward pass."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    @property
    def n_more(self) -> int:
        """The difference between the size of the weight matrix and the number of its parameters here."""
        n_parameters = sum(parameter.numel() for name, parameter in self.named_parameters() if name != "bias")
        return self.in_features * self.out_features - n_parameters

    @abstractmethod
    def rounded(self) -> Tensor:
        """Return the dequantized weight (O, I)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b with the dequantized weight."""
        return F.linear(x, self.rounded(), self.bias)


class GridLinear(TunedLinear):
    """Base class of layers with learned scales of one of our schemes.

    Parameters: bias, and ratio (O, G), the logarithm of a factor on the grid's scales, so that one learning rate suits
    scales of any magnitude. Buffers: scales and zeros (O, G).
    """

    scales_OG: Tensor
    zeros_OG: Tensor

    def __init__(self, n_in: int, n_out: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self.scheme = scheme
        n_groups = scheme.n_groups(n_in)
        self.ratio = nn.Parameter(torch.zeros(n_out, n_groups))
        self.register_buffer("scales_OG", torch.ones(n_out, n_groups))
        self.register_buffer("zeros_OG", torch.zeros(n_out, n_groups))

    @torch.no_grad()
    def put(self, codes: Codes, original_OI: Tensor) -> None:
        """Initialize from the codes of a quantized weight."""
        del original_OI
        self.ratio.zero_()
        self.scales_OG.copy_(codes.grid.scales_OG)
        self.zeros_OG.copy_(codes.grid.zeros_OG)

    def scales(self) -> Tensor:
        """Return the scales (O, G) rounded to their stored precision, with a straight-through gradient."""
        # The value is the rounded scale, the gradient that of the exact one.
        exact = self.scales_OG * self.ratio.exp()
        return exact + (rounded_scales(exact.detach(), self.scheme) - exact.detach())


class ScaledLinear(GridLinear):
    """A linear layer with fixed codes, uint8 (O, I), and learned scales.

    GPTQ's codes compensate each other's errors; training weights would change them one by one and lose that. Scales
    alone can be fitted without changing any code.
    """

    codes_OI: Tensor

    def __init__(self, n_in: int, n_out: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__(n_in, n_out, scheme, bias=bias)
        self.register_buffer("codes_OI", torch.zeros(n_out, n_in, dtype=torch.uint8))

    @torch.no_grad()
    def put(self, codes: Codes, original_OI: Tensor) -> None:
        """Initialize from the codes of a quantized weight."""
        super().put(codes, original_OI)
        self.codes_OI.copy_(codes.codes_OI)

    def rounded(self) -> Tensor:
        """Return the dequantized weight (O, I)."""
        weight: Tensor = _Scaled.apply(self.codes_OI, self.scales(), self.zeros_OG)  # type: ignore[no-untyped-call]
        return weight


class LearnedLinear(GridLinear):
    """A linear layer whose trainable weight (O, I) is rounded to a grid in every forward pass (fake quantization)."""

    def __init__(self, n_in: int, n_out: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__(n_in, n_out, scheme, bias=bias)
        self.weight = nn.Parameter(torch.zeros(n_out, n_in))

    @torch.no_grad()
    def put(self, codes: Codes, original_OI: Tensor) -> None:
        """Initialize each weight as close to the original as possible while it still rounds to its code."""
        super().put(codes, original_OI)
        decoded = decode(codes, self.scheme)
        # A weight may differ from its code's value by less than half a step, or it would round to another code.
        reach = grouped(torch.ones_like(decoded), self.scheme) * (codes.grid.scales_OG * NEAREST)[..., None]
        reach = reach.flatten(1)
        self.weight.copy_(decoded + (original_OI - decoded).clamp(-reach, reach))

    def rounded(self) -> Tensor:
        """Return the dequantized weight (O, I)."""
        weight: Tensor = _Rounded.apply(self.weight, self.scales(), self.zeros_OG, self.scheme.levels)  # type: ignore[no-untyped-call]
        return weight


def learned_codes(tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """Return the codes of a trained layer from its state dict."""
    scales_OG = rounded_scales(tensors["scales_OG"].float() * tensors["ratio"].float().exp(), scheme)
    grid = Grid(scales_OG, tensors["zeros_OG"].to(torch.uint8))
    return Codes(
        tensors["codes_OI"] if "codes_OI" in tensors else encode(tensors["weight"].float(), grid, scheme), grid
    )
