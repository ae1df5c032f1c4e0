"""8-bit weights: symmetric, one scale per output channel, round-to-nearest; products in the input's precision.

Takes a quarter of float32's memory; the weight is dequantized for every product.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 127.0


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to int8 codes (..., O, I) and float32 scales (..., O, 1).

    Source: Jacob et al. 2018, arXiv:1712.05877, symmetric and per output channel.
    """
    wide_OI = weight_OI.float()
    scales_O1 = (wide_OI.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide_OI / scales_O1).round_().to(torch.int8), scales_O1


class Int8Linear(nn.Module):
    """A linear layer with an 8-bit weight, for inference."""

    codes_OI: Tensor
    scales_O1: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes_OI, scales_O1 = quantize_rows(linear.weight.detach())
        self.register_buffer("codes_OI", codes_OI)
        self.register_buffer("scales_O1", scales_O1)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        weight_OI = self.codes_OI.to(x.dtype) * self.scales_O1.to(x.dtype)
        return F.linear(x, weight_OI, None if self.bias is None else self.bias.to(x.dtype))


def to_int8(module: nn.Module) -> int:
    """Replace all linear layers inside a module, in place; return their number."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
            count += 1
        else:
            count += to_int8(child)
    return count
