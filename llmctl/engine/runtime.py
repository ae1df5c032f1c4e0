"""Device, precision and ranks: the only importer of accelerate besides the launcher.

Knows nothing of objectives, optimizers' rules or files.
"""

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmctl.config import TrainConfig
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

BFLOAT16_GAIN = 1.5
"""How much faster bfloat16 products must be to pay for the conversions around them."""


@dataclass(frozen=True)
class Runtime:
    """One process's view of the machine."""

    accelerator: "Accelerator"
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """The device this process trains on."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and wrap it for precision and ranks."""
        return self.accelerator.prepare_model(module)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients."""
        self.accelerator.backward(loss)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        return tensor if self.world_size == 1 else self.accelerator.reduce(tensor, reduction="sum")


def start(config: TrainConfig) -> Runtime:
    """Choose device and precision and start Accelerate.

    Raises: UsageError if a device is asked for that is not there.
    """
    from accelerate import Accelerator

    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise UsageError(
            "`train.device` is `cuda`, but no CUDA device is visible", "--device cpu trains on the processor"
        )
    on_cpu = config.device == "cpu" or not has_cuda
    dtype = choose_dtype(config.dtype, on_cpu=on_cpu)
    # Accelerate would otherwise take its precision from a global config file or the environment.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    return Runtime(Accelerator(cpu=on_cpu, mixed_precision=precision), dtype)


def choose_dtype(name: str, *, on_cpu: bool) -> torch.dtype:
    """Return the precision of matrix products; auto takes bfloat16 where the hardware is faster with it."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if on_cpu:
        gain = product_rate(torch.bfloat16) / product_rate(torch.float32)
        return torch.bfloat16 if gain > BFLOAT16_GAIN else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the measured rate of a typical matrix product in FLOP/s; takes a few hundredths of a second.

    Capability flags do not tell: of processors with the same bfloat16 instructions some are 4 times faster with
    them than with float32, and some half as fast.
    """
    size = 4096 if device == "cuda" else 512
    a, b = torch.ones(2 * size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")

    def wait() -> None:
        if device == "cuda":  # a GPU's products are only begun when the call returns
            torch.cuda.synchronize()

    for _ in range(6):
        wait()
        begun = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - begun)
    return 4 * size**3 / best


def describe_environment() -> dict[str, Any]:
    """Return what a result depends on besides its recipe."""
    import platform

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
