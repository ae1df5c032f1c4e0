"""Split a step's batch over processes and sum their gradients.

A batch is split into micro-batches of consecutive rows, assigned to processes in order: the micro-batches, and so the
sum of their gradients, do not depend on how many processes share them. Knows nothing about models or files.
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
    """Check that a batch can be divided among the processes.

    Raises: UsageError suggesting a valid setting.
    """
    batch, chunks = train.batch_size, parallel.gradient_chunks
    if batch < world_size:
        raise UsageError(
            f"`train.batch_size` {batch} is smaller than the number of processes, {world_size}",
            f"use --batch-size {world_size}, or fewer processes",
        )
    if not parallel.deterministic:
        return
    if parallel.strategy == "fsdp" and world_size > 1:
        raise UsageError(
            "`parallel.deterministic` cannot be used with `parallel.strategy` `fsdp`",
            "use --parallel ddp, or omit one of them",
        )
    if chunks < 1 or chunks & (chunks - 1):
        raise UsageError(
            f"`parallel.gradient_chunks` is {chunks}, but must be a power of two",
            f"--set parallel.gradient_chunks={1 << max(0, chunks.bit_length() - 1)}",
        )
    if chunks % world_size or batch < chunks:
        raise UsageError(
            f"`parallel.gradient_chunks` {chunks} must be divisible by the {world_size} processes and not exceed "
            f"`train.batch_size` {batch}",
            "use 1, 2, 4, ... processes, or set parallel.gradient_chunks",
        )
    # In deterministic mode a chunk is one micro-batch: it must fit, and its size must not depend on the memory limit.
    rows = -(-batch // chunks)
    if 0 < train.micro_batch_size < rows:
        needed = 1 << (-(-batch // train.micro_batch_size) - 1).bit_length()
        raise UsageError(
            f"`train.micro_batch_size` {train.micro_batch_size} is smaller than a gradient chunk of {rows} rows",
            f"--set parallel.gradient_chunks={needed}",
        )


def lay_out(batch_size: int, micro_batch_size: int, parallel: ParallelConfig, world_size: int) -> list[list[range]]:
    """Return each process's micro-batches as ranges of batch rows; every process gets at least one.

    There are as many as full micro-batches need, and at least one per process; their sizes differ by at most one row.
    """
    if parallel.deterministic:
        n_parts = parallel.gradient_chunks
    else:
        n_parts = max(world_size, -(-batch_size // micro_batch_size) if micro_batch_size > 0 else 1)
    parts = split(range(batch_size), n_parts)
    return [[parts[index] for index in own] for own in split(range(n_parts), world_size)]


def split(numbers: range, n_parts: int) -> list[range]:
    """Split a range into consecutive parts whose lengths differ by at most one, the longer ones first."""
    size, n_longer = divmod(len(numbers), n_parts)
    bounds = [index * size + min(index, n_longer) for index in range(n_parts + 1)]
    return [numbers[bounds[index] : bounds[index + 1]] for index in range(n_parts)]


class Gradients:
    """Accumulates gradients over micro-batches and processes in `.grad`, leaving the reduction to DDP or FSDP."""

    def __init__(self, runtime: Runtime, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.runtime, self.module, self.parameters = runtime, module, parameters

    def scale(self, count: int) -> float:
        """Return the factor for a micro-batch's summed loss: 1 / count, times the world size to undo DDP's averaging."""
        # DDP averages over processes; the loop wants the sum, divided by the global count.
        averages = isinstance(self.module, nn.parallel.DistributedDataParallel)
        return (self.runtime.world_size if averages else 1) / count

    def part(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch; with DDP, gradients are exchanged only in the last one."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    def collect(self) -> None:
        """Process the gradients of a finished micro-batch."""

    def finish(self) -> None:
        """Complete the sum."""


class TreeGradients(Gradients):
    """Sums gradients in a binary tree over the micro-batches of all processes, for bitwise reproducibility.

    Floating-point sums depend on their order, so the order depends only on the indexes of the micro-batches: each
    process sums its own as a subtree, then processes exchange sums in pairs (a + b has the same bits as b + a). With
    1, 2, 4, ... processes the gradients, and so the weights, are bitwise equal.
    """

    def __init__(self, runtime: Runtime, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(runtime, module, parameters)
        self.stack: list[tuple[int, list[Tensor]]] = []  # complete subtrees: number of micro-batches, their sums
        self.pairs = self._pair_groups() if runtime.world_size > 1 else []

    def _pair_groups(self) -> list[Any]:
        """Create one group of two processes per level of the tree: a rank's partner differs in one bit."""
        import torch.distributed as dist

        world_size, rank = self.runtime.world_size, self.runtime.rank
        groups, distance = [], 1
        while distance < world_size:
            own = None
            for first in range(world_size):
                if first & distance == 0:  # new_group is collective: all ranks create all groups, in the same order
                    group = dist.new_group([first, first | distance])
                    own = group if rank in (first, first | distance) else own
            groups.append(own)
            distance *= 2
        return groups

    def collect(self) -> None:
        """Move a micro-batch's gradients to the stack, merging subtrees of equal size."""
        tensors = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        size = 1
        # Like carrying in a binary counter: equal subtrees merge, left + right.
        while self.stack and self.stack[-1][0] == size:
            _, left = self.stack.pop()
            torch._foreach_add_(left, tensors)
            tensors, size = left, 2 * size
        self.stack.append((size, tensors))

    def finish(self) -> None:
        """Sum over the processes, one level of pairs at a time, and store the result in `.grad`."""
        import torch.distributed as dist

        ((_, tensors),) = self.stack
        self.stack = []
        if self.pairs:
            # One message per level instead of one per tensor.
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            for group in self.pairs:
                dist.all_reduce(flat, group=group)
            sizes = [tensor.numel() for tensor in tensors]
            tensors = [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.grad = tensor


def make_gradients(runtime: Runtime, module: nn.Module, parameters: Sequence[nn.Parameter]) -> Gradients:
    """Return the reduction selected by `parallel.deterministic`."""
    kind = TreeGradients if runtime.parallel.deterministic else Gradients
    return kind(runtime, module, parameters)
