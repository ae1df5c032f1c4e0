"""Muon: momentum with an orthogonalized update, for the hidden matrices of a model.

Not torch's, for two reasons: matmuls run in the dtype that is fast on the machine (torch's always use bfloat16, which many
CPUs multiply at half of float32's rate), and a sharded matrix is orthogonalized as a whole.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scale of the update: same, "original".
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmctl.distributed.sharding import shared_like, whole_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen for the steepest slope at zero; singular values end between 0.7 and 1.2."""

N_ITERATIONS = 5

TOGETHER = 16
"""Matrices of one shape orthogonalized per call: small matmuls alone do not use all cores."""


def orthogonalize(matrices_GOI: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U V^T of matrices U S V^T, by Newton-Schulz iterations in `dtype`.

    Shapes: (G, O, I) -> (G, O, I), in `dtype`.
    """
    a, b, c = COEFFICIENTS
    x = matrices_GOI.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    # The smaller Gram matrix: iterations cost O(min(O, I)^2 * max(O, I)).
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the Frobenius norm bounds the spectral norm
    for _ in range(N_ITERATIONS):
        # x <- a x + (b A + c A^2) x with A = x x^T, in two fused matmuls.
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum with decoupled weight decay.

    `dtype`: of the iterations; bfloat16 is precise enough where it is fast.
    """

    def __init__(
        self,
        params: Iterable[Any],
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
        """Take one step; parameters without a gradient do not change."""
        assert closure is None, "the loss is not computed again"
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                for start in range(0, len(parameters), TOGETHER):
                    self._step(parameters[start : start + TOGETHER], group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        updates = torch.stack([whole_tensor(self._momentum(parameter, group["momentum"])) for parameter in parameters])
        updates = orthogonalize(updates, self.dtype).to(updates.dtype)
        rows, columns = parameters[0].shape
        # An orthogonal update of a tall matrix has a smaller effect per input: scaled up.
        rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(shared_like(update, parameter), alpha=-rate)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        # Nesterov: a step ahead along the new momentum.
        return gradient.lerp(buffer, momentum)
