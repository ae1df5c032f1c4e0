"""Tensors of which every process holds some rows: how a module becomes so, and whole tensors from and to shares."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """The rows from `start` on of a tensor whose whole shape is `shape`; a tensor of no dimension is whole."""

    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """Return tensors as parts that are all of themselves."""
    return {name: Part(tensor, tuple(tensor.shape)) for name, tensor in tensors.items()}


def shard(module: nn.Module, device: torch.device, dtype: torch.dtype, world_size: int, *, offloads: bool) -> None:
    """Share weights, gradients and optimizer state out over the processes, block by block (FSDP2).

    Accelerate's plugin silently trains with DDP on a CPU, so torch's own function is called. Gradients are summed,
    not averaged: the loss is divided by the global count before.
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
    """Let go of weights that a forward pass has gathered, so that what is read or loaded next is the shares."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a process holds only some of a tensor's rows."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """Return the rows of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_part(tensor: Any) -> Part:
    """Return the rows of a sharded tensor that this process holds: consecutive ones, as torch.chunk cuts them."""
    local, mesh = tensor.to_local(), tensor.device_mesh
    size = -(-tensor.shape[0] // mesh.size())
    return Part(local, tuple(tensor.shape), min(mesh.get_local_rank() * size, tensor.shape[0]))


def own_parts(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Part]:
    """Return what this process saves of named tensors: its rows of sharded ones, and as the first one, all others."""
    parts = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            parts[name] = local_part(tensor)
        elif rank == 0:
            parts[name] = Part(tensor, tuple(tensor.shape))
    return parts


def own_rows(like: Any, read: Callable[..., Tensor]) -> Tensor:
    """Return a tensor of the same layout, device and dtype as `like`, filled with `read(start, stop)` of its rows."""
    if not is_sharded(like):
        return read().to(like.device, like.dtype)
    filled: Any = torch.zeros_like(like)
    part = local_part(filled)
    part.tensor.copy_(read(part.start, part.start + part.tensor.shape[0]))
    return filled


def fill(parameter: Any, read: Callable[..., Tensor]) -> None:
    """Overwrite a parameter, or this process's rows of it, with `read(start, stop)`."""
    with torch.no_grad():
        parameter.copy_(own_rows(parameter, read))


def whole_tensor(tensor: Any) -> Tensor:
    """Return a tensor with all its rows; every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shared_like(whole: Tensor, like: Any) -> Tensor:
    """Return a whole tensor in the layout of another: every process has all of it and keeps its own rows."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
