"""Sharded tensors (FSDP2), of which each process has some rows: shard a module, convert to and from full tensors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """Rows of a tensor: those from `start` on, of a full tensor of `shape`; scalars are never split."""

    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """Wrap full tensors as parts."""
    return {name: Part(tensor, tuple(tensor.shape)) for name, tensor in tensors.items()}


def shard(module: nn.Module, device: torch.device, dtype: torch.dtype, world_size: int, *, offloads: bool) -> None:
    """Shard weights, gradients and optimizer state over the processes, block by block (FSDP2).

    Uses torch's function directly, since Accelerate's plugin silently falls back to DDP on a CPU. Gradients are summed,
    not averaged: the loss is already divided by the global count.
    Source: Zhao et al. 2023, arXiv:2304.11277.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world_size,))
    precision = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if offloads and device.type == "cuda" else OffloadPolicy()
    blocks = [child for child in module.modules() if type(child).__name__ == "Block"]
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload)
        assert isinstance(part, FSDPModule)
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)


def reshard(module: nn.Module) -> None:
    """Free full weights that a forward pass gathered, so that the next read or load sees the shards."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """Return this process's rows of a tensor, which may be unsharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_part(tensor: Any) -> Part:
    """Return this process's rows of a sharded tensor with their position; FSDP splits rows as torch.chunk does."""
    local, mesh = tensor.to_local(), tensor.device_mesh
    size = -(-tensor.shape[0] // mesh.size())
    return Part(local, tuple(tensor.shape), min(mesh.get_local_rank() * size, tensor.shape[0]))


def own_parts(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Part]:
    """Return what this rank saves of named tensors: its rows of sharded ones, and on rank 0 all unsharded ones."""
    parts = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            parts[name] = local_part(tensor)
        elif rank == 0:
            parts[name] = Part(tensor, tuple(tensor.shape))
    return parts


def own_rows(like: Any, read: Callable[..., Tensor]) -> Tensor:
    """Return a tensor with the layout, device and dtype of `like`; `read(start, stop)` supplies this rank's rows."""
    if not is_sharded(like):
        return read().to(like.device, like.dtype)
    filled: Any = torch.zeros_like(like)
    part = local_part(filled)
    part.tensor.copy_(read(part.start, part.start + part.tensor.shape[0]))
    return filled


def fill(parameter: Any, read: Callable[..., Tensor]) -> None:
    """Overwrite a parameter, or this rank's rows of it, with `read(start, stop)`."""
    with torch.no_grad():
        parameter.copy_(own_rows(parameter, read))


def whole_tensor(tensor: Any) -> Tensor:
    """Return the full tensor; a collective operation if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shared_like(whole: Tensor, like: Any) -> Tensor:
    """Shard a full tensor, present on every rank, like another one, without communication."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
