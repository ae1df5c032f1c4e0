"""bfloat16 weights with float32 master weights that receive the updates.

Matmuls need no weight conversion and activations take half the memory; updates too small for bfloat16 accumulate in the
master weights. Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.
"""

import copy

import torch
from torch import Tensor, nn

from llmctl.distributed.gradients import Gradients
from llmctl.distributed.runtime import Runtime
from llmctl.model.transformer import LanguageModel


class Masters:
    """A model with bfloat16 parameters and its float32 copy; tied weights are tied in both."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.master = model, copy.deepcopy(model)
        self.pairs = list(zip(model.parameters(), self.master.parameters(), strict=True))
        for parameter, _ in self.pairs:
            parameter.data = parameter.data.bfloat16()

    @torch.no_grad()
    def push(self) -> None:
        """Copy the master weights to the model, rounded."""
        torch._foreach_copy_([parameter.data for parameter, _ in self.pairs], [master.data for _, master in self.pairs])

    def restore(self) -> None:
        """Convert the model back to float32 with the master weights."""
        for parameter, master in self.pairs:
            parameter.grad = None
            parameter.data = master.data


class MasterGradients(Gradients):
    """Accumulates the model's bfloat16 gradients in the master, in float32."""

    def __init__(self, runtime: Runtime, module: nn.Module, masters: Masters) -> None:
        pairs = [pair for pair in masters.pairs if pair[1].requires_grad]
        super().__init__(runtime, module, [master for _, master in pairs])
        self.pairs = pairs

    def collect(self) -> None:
        """Add the gradients of a micro-batch to the master's."""
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
    """Return whether a run uses master weights: one process, on a CPU, in bfloat16."""
    return is_on and runtime.dtype == torch.bfloat16 and runtime.device.type == "cpu" and runtime.world_size == 1
