"""Explicit forward and backward passes for a CPU, for operations that torch composes from many passes over memory.

Each equals its plain form, which is used otherwise: on GPUs, under torch.compile, and without gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def trains_on_cpu(*tensors: Tensor) -> bool:
    """Tell whether one of these tensors needs a gradient, on a CPU in eager mode."""
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return needs_grad and tensors[0].device.type == "cpu" and not torch.compiler.is_compiling()


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with an explicit backward pass for a CPU.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square over the last dimension, and scale."""
        weight = self.weight if self.elementwise_affine else None
        if weight is not None and self.eps is not None and x.dtype == weight.dtype and trains_on_cpu(x, weight):
            normed: Tensor = _RMSNorm.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
            return normed
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (x * inverse).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            # dx = inverse * (w * grad) - x * inverse^3 / D * sum(w * grad * x)
            product = grad * x
            along = (product @ weight_D)[..., None] * inverse.pow(3).div_(x.shape[-1])
            rows_ND = product.reshape(-1, x.shape[-1])
            grad_weight = rows_ND.T.mv(inverse.reshape(-1)) if ctx.needs_input_grad[1] else None
            grad_x = torch.mul(grad, weight_D, out=product).mul_(inverse).addcmul_(x, along, value=-1)
        return grad_x, grad_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of the last dimension by the angles of the tables.

    Shapes: x (..., H); the tables broadcast to it, with equal halves of their last dimension.
    """
    rotated: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, sin, -1.0), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotate by the angles times `sign`; the backward pass is the rotation by the negative angles."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    (first, second), out = x.split(half, dim=-1), torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out
