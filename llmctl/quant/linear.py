"""Layers whose weights are packed codes: a linear map and an embedding, which may share one weight.

How a product is computed depends on the machine, see `products.py`; nothing here is trained.
"""

import torch
from torch import Tensor

from llmctl.quant.grid import Codes, Grid, decode
from llmctl.quant.packing import unpack
from llmctl.quant.products import Product, Table, choose, usual
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import QuantWeight


class QuantLinear(QuantWeight):
    """A linear layer over a matrix in few bits."""

    bias: Tensor | None

    def __init__(self, n_in: int, n_out: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__(n_out, n_in, scheme)
        self.register_buffer("bias", torch.zeros(n_out) if bias else None)
        self.table: Table = usual
        self._product: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, in the precision of x."""
        if self._product is None:
            self._product = choose(self, self.table)
        y = self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantEmbedding(QuantWeight):
    """An embedding whose rows are codes."""

    like: Tensor

    def __init__(self, n_rows: int, width: int, scheme: Scheme) -> None:
        super().__init__(n_rows, width, scheme)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (..., I), in the precision that the module was moved to."""
        flat, scheme = ids.reshape(-1), self.scheme
        scales = self.weight_scale[flat].float()
        if scheme.symmetric:
            zeros = torch.full_like(scales, scheme.middle, dtype=torch.uint8)
        else:
            zeros = unpack(self.weight_zero_point.T.contiguous(), scheme.bits, self.n_out).T[flat]
        rows = Codes(unpack(self.weight_packed[flat], scheme.bits, self.n_in), Grid(scales, zeros))
        return decode(rows, scheme).to(self.like.dtype).view(*ids.shape, self.n_in)
