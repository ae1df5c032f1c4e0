"""Weights in bfloat16 beside a float32 master that takes the updates.

Products need no conversion of weights, and the residual stream is half as wide; an update that is too small for
bfloat16 is kept in the master until it counts. Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.
"""

import copy

import torch
from torch import Tensor, nn

from llmctl.distributed.gradients import Gradients
from llmctl.distributed.runtime import Runtime
from llmctl.model.transformer import LanguageModel


class Masters:
    """A model whose parameters are bfloat16, and its float32 twin; tied weights are tied in both."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.master = model, copy.deepcopy(model)
        self.pairs = list(zip(model.parameters(), self.master.parameters(), strict=True))
        for parameter, _ in self.pairs:
            parameter.data = parameter.data.bfloat16()

    @torch.no_grad()
    def push(self) -> None:
        """Give the model what the master holds, rounded."""
        torch._foreach_copy_([parameter.data for parameter, _ in self.pairs], [master.data for _, master in self.pairs])

    def restore(self) -> None:
        """Let the model be float32 again, with the master's weights."""
        for parameter, master in self.pairs:
            parameter.grad = None
            parameter.data = master.data


class MasterGradients(Gradients):
    """Adds the model's bfloat16 gradients up in the master, in float32."""

    def __init__(self, runtime: Runtime, module: nn.Module, masters: Masters) -> None:
        pairs = [pair for pair in masters.pairs if pair[1].requires_grad]
        super().__init__(runtime, module, [master for _, master in pairs])
        self.pairs = pairs

    def collect(self) -> None:
        """Move the gradients of a micro-batch to the master."""
        for parameter, master in self.pairs:
            gradient: Tensor | None = parameter.grad
            if gradient is None:
                continue
            if master.grad is None:
                master.grad = gradient.to(master.dtype)
            else:
                master.grad += gradient
            parameter.grad = None


def wants_masters(runtime: Runtime, *, is_on: bool) -> bool:
    """Tell whether a run trains this way: one process, on a processor, in bfloat16."""
    return is_on and runtime.dtype == torch.bfloat16 and runtime.device.type == "cpu" and runtime.world_size == 1
