"""How a step's batch is laid out over processes, and how their gradients become one.

A batch is cut into micro-batches of consecutive rows, which go to the processes in order: two micro-batches on one
process are the two of two processes, and so are their sums. Knows nothing of models or files.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import ParallelConfig, TrainConfig
from llmctl.distributed.runtime import Runtime
from llmctl.errors import UsageError


def check_layout(train: TrainConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a batch that cannot be shared out.

    Raises: UsageError with the nearest that can.
    """
    batch, chunks = train.batch_size, parallel.gradient_chunks
    if batch < world_size:
        raise UsageError(
            f"`train.batch_size` {batch} is smaller than the number of processes, {world_size}",
            f"--batch-size {world_size}, or fewer processes",
        )
    if not parallel.deterministic:
        return
    if parallel.strategy == "fsdp" and world_size > 1:
        raise UsageError(
            "`parallel.deterministic` does not go with `parallel.strategy` `fsdp`", "--parallel ddp, or leave one away"
        )
    if chunks < 1 or chunks & (chunks - 1):
        raise UsageError(
            f"`parallel.gradient_chunks` is {chunks}, it must be a power of two",
            f"--set parallel.gradient_chunks={1 << max(0, chunks.bit_length() - 1)}",
        )
    if chunks % world_size or batch < chunks:
        raise UsageError(
            f"`parallel.gradient_chunks` {chunks} must be divisible by the {world_size} processes and not exceed "
            f"`train.batch_size` {batch}",
            "use 1, 2, 4, ... processes, or set parallel.gradient_chunks",
        )
    rows = -(-batch // chunks)
    if 0 < train.micro_batch_size < rows:
        needed = 1 << (-(-batch // train.micro_batch_size) - 1).bit_length()
        raise UsageError(
            f"`train.micro_batch_size` {train.micro_batch_size} is smaller than a gradient chunk of {rows} rows",
            f"--set parallel.gradient_chunks={needed}",
        )


def lay_out(batch_size: int, micro_batch_size: int, parallel: ParallelConfig, world_size: int) -> list[list[range]]:
    """Return the micro-batches of every process, as ranges of rows of the batch; each has at least one.

    Their number is that of full micro-batches, and at least the number of processes; sizes differ by one row at most.
    """
    if parallel.deterministic:
        n_parts = parallel.gradient_chunks
    else:
        n_parts = max(world_size, -(-batch_size // micro_batch_size) if micro_batch_size > 0 else 1)
    parts = split(range(batch_size), n_parts)
    return [[parts[index] for index in own] for own in split(range(n_parts), world_size)]


def split(numbers: range, n_parts: int) -> list[range]:
    """Cut a range into consecutive parts whose lengths differ by one at most, the longer ones first."""
    size, n_longer = divmod(len(numbers), n_parts)
    bounds = [index * size + min(index, n_longer) for index in range(n_parts + 1)]
    return [numbers[bounds[index] : bounds[index + 1]] for index in range(n_parts)]


class Gradients:
    """Leaves the sum over micro-batches and processes in `.grad`; what a wrapper does by itself, it lets it do."""

    def __init__(self, runtime: Runtime, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.runtime, self.module, self.parameters = runtime, module, parameters

    def scale(self, count: int) -> float:
        """Return the factor on a micro-batch's summed loss; DDP averages over processes, which is undone here."""
        averages = isinstance(self.module, nn.parallel.DistributedDataParallel)
        return (self.runtime.world_size if averages else 1) / count

    def part(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Surround one micro-batch; processes exchange gradients in the last one only."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    def collect(self) -> None:
        """Take note of a finished micro-batch."""

    def finish(self) -> None:
        """Complete the sum."""


class TreeGradients(Gradients):
    """Sums gradients as one binary tree over the micro-batches of all processes.

    Floating-point sums depend on their order, so the order is a function of the micro-batches' numbers alone: inside
    a process a tree over its own, between processes pairs, whose sum is the same from either side. 1, 2, 4, ...
    processes get the same bits, and so the same weights.
    """

    def __init__(self, runtime: Runtime, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(runtime, module, parameters)
        self.stack: list[tuple[int, list[Tensor]]] = []
        self.pairs = self._meet() if runtime.world_size > 1 else []

    def _meet(self) -> list[Any]:
        import torch.distributed as dist

        world_size, rank = self.runtime.world_size, self.runtime.rank
        groups, distance = [], 1
        while distance < world_size:
            own = None
            for first in range(world_size):
                if first & distance == 0:  # every process makes every group, in the same order
                    group = dist.new_group([first, first | distance])
                    own = group if rank in (first, first | distance) else own
            groups.append(own)
            distance *= 2
        return groups

    def collect(self) -> None:
        """Take the gradients of a micro-batch away and add up subtrees of equal size."""
        tensors = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        size = 1
        while self.stack and self.stack[-1][0] == size:
            _, left = self.stack.pop()
            torch._foreach_add_(left, tensors)
            tensors, size = left, 2 * size
        self.stack.append((size, tensors))

    def finish(self) -> None:
        """Add up over the processes, pair by pair, and put the sum into `.grad`."""
        import torch.distributed as dist

        ((_, tensors),) = self.stack
        self.stack = []
        if self.pairs:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            for group in self.pairs:
                dist.all_reduce(flat, group=group)
            sizes = [tensor.numel() for tensor in tensors]
            tensors = [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.grad = tensor


def make_gradients(runtime: Runtime, module: nn.Module, parameters: Sequence[nn.Parameter]) -> Gradients:
    """Return what the config asks for."""
    kind = TreeGradients if runtime.parallel.deterministic else Gradients
    return kind(runtime, module, parameters)
