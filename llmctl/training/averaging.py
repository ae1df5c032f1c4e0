"""A moving average of the weights, beside those that are trained."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

AVERAGE = "average"
"""The name of the averages among the optimizers, and of their tensors, in a checkpoint."""


class Average(torch.optim.Optimizer):
    """An average of parameters over steps; as an optimizer, it is saved, sharded and restored like the others.

    It changes no parameter until `swap`. With a tail, the mean of the steps in this last fraction of the training (Jain et
    al. 2018, arXiv:1610.03774, tail-averaging); else an exponential moving average (Polyak and Juditsky 1992, "Acceleration
    of stochastic approximation by averaging"). Its early steps have a smaller decay, (1 + step) / (10 + step), as in
    TensorFlow's ExponentialMovingAverage: it would otherwise remember the weights from before the first step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, tail_frac: float = 0.0) -> None:
        self.decay, self.tail_frac = decay, tail_frac
        super().__init__([one for one in parameters if one.requires_grad], {})

    @torch.no_grad()
    def note(self, step: int, total_steps: int = 0) -> None:
        """Take the weights after a step, counted from 1, into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.tail_frac:
            n_before = step - 1 - int((1 - self.tail_frac) * total_steps)
            if n_before < 0:
                return
            decay = n_before / (n_before + 1)
        for parameter in self._parameters():
            state = self.state[parameter]
            if AVERAGE in state:
                state[AVERAGE].lerp_(parameter.detach(), 1 - decay)
            else:
                state[AVERAGE] = parameter.detach().clone()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        for parameter in self._parameters():
            average = self.state[parameter][AVERAGE]
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)

    @property
    def is_begun(self) -> bool:
        """Whether it has the weights of a step."""
        return bool(self.state)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: no gradient is used."""

    def _parameters(self) -> Iterable[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]
