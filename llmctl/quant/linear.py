"""Quantized layers with packed weights: linear and embedding, which may share one weight; not trainable.

The product's implementation depends on the machine, see `products.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmctl.quant.grid import Codes, Grid, decode
from llmctl.quant.packing import unpack
from llmctl.quant.products import Product, Table, choose, usual
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import QuantWeight


class QuantLinear(QuantWeight):
    """A linear layer with a quantized weight."""

    bias: Tensor | None

    def __init__(self, n_in: int, n_out: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__(n_out, n_in, scheme)
        self.register_buffer("bias", torch.zeros(n_out) if bias else None)
        self.table: Table = usual
        self._product: Product | None = None

    @property
    def in_features(self) -> int:
        """The number of inputs, by torch's name."""
        return self.n_in

    @property
    def out_features(self) -> int:
        """The number of outputs, by torch's name."""
        return self.n_out

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b in the precision of x; differentiable in x."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T, with the implementation chosen at the first call."""
        if self._product is None:
            self._product = choose(self, self.table)
        return self._product(x)


class _Frozen(torch.autograd.Function):
    """The product with a frozen quantized weight, which the backward pass dequantizes again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


class QuantEmbedding(QuantWeight):
    """An embedding with quantized rows."""

    like: Tensor

    def __init__(self, n_rows: int, width: int, scheme: Scheme) -> None:
        super().__init__(n_rows, width, scheme)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the dequantized rows of ids (..., I), in the precision that the module was moved to."""
        flat, scheme = ids.reshape(-1), self.scheme
        scales = self.weight_scale[flat].float()
        if scheme.symmetric:
            zeros = torch.full_like(scales, scheme.middle, dtype=torch.uint8)
        else:
            zeros = unpack(self.weight_zero_point.T.contiguous(), scheme.bits, self.n_out).T[flat]
        rows = Codes(unpack(self.weight_packed[flat], scheme.bits, self.n_in), Grid(scales, zeros))
        return decode(rows, scheme).to(self.like.dtype).view(*ids.shape, self.n_in)
