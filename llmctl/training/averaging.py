"""A moving average of the weights, beside those that are trained."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

AVERAGE = "average"
"""The name of the averages among the optimizers, and of their tensors, in a checkpoint."""


class Average(torch.optim.Optimizer):
    """An exponential moving average of parameters; as an optimizer, it is saved, sharded and restored like the others.

    It changes no parameter until `swap`. Early steps have a smaller decay, (1 + step) / (10 + step), since the average would
    otherwise remember the weights from before the first step. Source: Polyak and Juditsky 1992, "Acceleration of stochastic
    approximation by averaging"; the decay of early steps is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        super().__init__([one for one in parameters if one.requires_grad], {})

    @torch.no_grad()
    def note(self, step: int) -> None:
        """Take the weights after a step, counted from 1, into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
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
