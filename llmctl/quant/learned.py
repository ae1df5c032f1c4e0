"""Linear layers that learn what they are rounded to: the scales of fixed codes, or the weight behind the codes as well.

Source: LSQ, Esser et al. 2020, arXiv:1902.08153, eq. 3 and 5 (gradients of weight and scale); fixed zeros, weights beside
scales, and scales alone under fixed codes: EfficientQAT, Chen et al. 2024, arXiv:2407.11062, section 3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmctl.quant.grid import Codes, Grid, decode, encode, grouped, rounded_scales
from llmctl.quant.schemes import Scheme

NEAREST = 0.49
"""How far from its value a weight begins at most, in steps of its scale: its code is the one that was chosen."""


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(weight_OI, scales_OG, zeros_OG)
        ctx.levels = levels
        scales, zeros = scales_OG[..., None], zeros_OG[..., None]
        groups = weight_OI.unflatten(1, (scales_OG.shape[1], -1))
        places = (groups / scales).add_(zeros).round_().clamp_(0, levels)
        return places.sub_(zeros).mul_(scales).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, scales_OG, zeros_OG = ctx.saved_tensors
        scales, zeros = scales_OG[..., None], zeros_OG[..., None]
        n_groups = scales_OG.shape[1]
        steps = weight_OI.unflatten(1, (n_groups, -1)) / scales
        places = steps + zeros
        inside = (places >= -0.5) & (places <= ctx.levels + 0.5)
        grad = grad_OI.unflatten(1, (n_groups, -1))
        off = places.round_().clamp_(0, ctx.levels).sub_(zeros).sub_(steps * inside)
        return (grad * inside).flatten(1), (grad * off).sum(dim=2), None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
        ctx.save_for_backward(codes_OI, zeros_OG)  # bytes: the steps are made anew in the backward pass
        return _steps(codes_OI, zeros_OG).mul_(scales_OG[..., None]).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        steps = _steps(*ctx.saved_tensors)
        return None, steps.mul_(grad_OI.unflatten(1, steps.shape[1:])).sum(dim=2), None


def _steps(codes_OI: Tensor, zeros_OG: Tensor) -> Tensor:
    return codes_OI.float().unflatten(1, (zeros_OG.shape[1], -1)).sub_(zeros_OG[..., None])


class TunedLinear(nn.Module):
    """What linear layers whose scales learn have in common.

    Parameters: bias, and ratio (O, G): the logarithm of what the grid's scales are multiplied by, so that one learning rate
    fits scales of any size. Buffers: scales and zeros (O, G).
    """

    scales_OG: Tensor
    zeros_OG: Tensor

    def __init__(self, n_in: int, n_out: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = n_in, n_out, scheme
        n_groups = scheme.n_groups(n_in)
        self.ratio = nn.Parameter(torch.zeros(n_out, n_groups))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.register_buffer("scales_OG", torch.ones(n_out, n_groups))
        self.register_buffer("zeros_OG", torch.zeros(n_out, n_groups))

    @property
    def n_more(self) -> int:
        """How many more numbers the weight stands for than there are parameters for it."""
        held = sum(one.numel() for name, one in self.named_parameters() if name != "bias")
        return self.in_features * self.out_features - held

    @torch.no_grad()
    def put(self, codes: Codes, original_OI: Tensor) -> None:
        """Begin with codes that were chosen for a weight."""
        del original_OI
        self.ratio.zero_()
        self.scales_OG.copy_(codes.grid.scales_OG)
        self.zeros_OG.copy_(codes.grid.zeros_OG)

    def scales(self) -> Tensor:
        """Return the scales (O, G) as a file will hold them; the gradient goes past the rounding."""
        exact = self.scales_OG * self.ratio.exp()
        return exact + (rounded_scales(exact.detach(), self.scheme) - exact.detach())

    def rounded(self) -> Tensor:
        """Return the weight (O, I) that the codes mean."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b of the weight that the codes mean."""
        return F.linear(x, self.rounded(), self.bias)


class ScaledLinear(TunedLinear):
    """A linear layer whose codes stay, uint8 (O, I), and whose scales learn.

    Codes that make up for each other's errors, as GPTQ's, are lost when weights cross their thresholds one by one; their
    scales can only become better fitted.
    """

    codes_OI: Tensor

    def __init__(self, n_in: int, n_out: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__(n_in, n_out, scheme, bias=bias)
        self.register_buffer("codes_OI", torch.zeros(n_out, n_in, dtype=torch.uint8))

    @torch.no_grad()
    def put(self, codes: Codes, original_OI: Tensor) -> None:
        """Begin with codes that were chosen."""
        super().put(codes, original_OI)
        self.codes_OI.copy_(codes.codes_OI)

    def rounded(self) -> Tensor:
        """Return the weight (O, I) that the codes mean."""
        weight: Tensor = _Scaled.apply(self.codes_OI, self.scales(), self.zeros_OG)  # type: ignore[no-untyped-call]
        return weight


class LearnedLinear(TunedLinear):
    """A linear layer whose weight (O, I), a parameter, is rounded to a grid in every pass, and learns all the same."""

    def __init__(self, n_in: int, n_out: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__(n_in, n_out, scheme, bias=bias)
        self.weight = nn.Parameter(torch.zeros(n_out, n_in))

    @torch.no_grad()
    def put(self, codes: Codes, original_OI: Tensor) -> None:
        """Begin with codes that were chosen, each weight as near to the original as its code allows."""
        super().put(codes, original_OI)
        meant = decode(codes, self.scheme)
        room = grouped(torch.ones_like(meant), self.scheme) * (codes.grid.scales_OG * NEAREST)[..., None]
        reach = room.flatten(1)
        self.weight.copy_(meant + (original_OI - meant).clamp(-reach, reach))

    def rounded(self) -> Tensor:
        """Return the weight (O, I) that the codes mean."""
        weight: Tensor = _Rounded.apply(self.weight, self.scales(), self.zeros_OG, self.scheme.levels)  # type: ignore[no-untyped-call]
        return weight


def learned_codes(tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """Return the codes of what a layer has become, of its tensors by their names in it."""
    scales_OG = rounded_scales(tensors["scales_OG"].float() * tensors["ratio"].float().exp(), scheme)
    grid = Grid(scales_OG, tensors["zeros_OG"].to(torch.uint8))
    return Codes(
        tensors["codes_OI"] if "codes_OI" in tensors else encode(tensors["weight"].float(), grid, scheme), grid
    )
