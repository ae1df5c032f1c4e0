"""Muon: momentum whose update is made orthogonal, for the hidden matrices of a model.

Ours rather than torch's for two reasons: products run in the dtype that is fast on the machine (torch's are always
bfloat16, which many processors multiply at half of float32's rate), and a sharded matrix is orthogonalised whole.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scale of the update: same, "original".
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen for the steepest slope at zero; singular values end between 0.7 and 1.2."""

N_ITERATIONS = 5


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U V^T of a matrix U S V^T, by Newton-Schulz iterations in `dtype`.

    Shapes: (O, I) -> (O, I), in `dtype`.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)  # the spectral norm is at most this one
    for _ in range(N_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    `dtype` is that of the iterations: bfloat16 is enough for them where it is fast.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; parameters without a gradient stay."""
        assert closure is None, "the loss is not computed again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = self._orthogonal(gradient.lerp(buffer, group["momentum"]))
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _orthogonal(self, matrix: Any) -> Tensor:
        if not hasattr(matrix, "full_tensor"):
            return orthogonalise(matrix, self.dtype).to(matrix.dtype)
        from torch.distributed.tensor import distribute_tensor

        whole = orthogonalise(matrix.full_tensor(), self.dtype).to(matrix.dtype)
        # Every process has computed the same whole and keeps its own rows: nothing needs sending.
        return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)
