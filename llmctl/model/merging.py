"""Merge tensors of models with one shape: weighted means, interpolation on a sphere, and sums of what training changed.

Pure functions of tensors, computed in float32 at least.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

COLLINEAR = 1e-6
"""Directions whose sine is below this are interpolated on the line between them."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean (Wortsman et al. 2022, "Model soups", arXiv:2203.05482)."""
    total = sum(weights)
    dtype = wide(tensors)
    return sum(
        (weight / total * one.to(dtype) for one, weight in zip(tensors, weights, strict=True)), start=zero(dtype)
    )


def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return a point on the arc between two tensors, taken as vectors; the second's share of the weights is its place.

    Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; lengths are interpolated linearly, as the arc is
    one of directions.
    """
    first, second = (one.to(wide(tensors)) for one in tensors)
    place = weights[1] / sum(weights)
    lengths = [torch.linalg.vector_norm(one) for one in (first, second)]
    if not all(lengths):
        return linear(tensors, weights)
    cosine = (first.flatten() @ second.flatten() / (lengths[0] * lengths[1])).clamp(-1, 1)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    if sine < COLLINEAR:
        return linear(tensors, weights)
    shares = torch.sin((1 - place) * angle) / sine, torch.sin(place * angle) / sine
    direction = shares[0] * first / lengths[0] + shares[1] * second / lengths[1]
    return ((1 - place) * lengths[0] + place * lengths[1]) * direction


def ties(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor, density: float) -> Tensor:
    """Return the base plus what most of its descendants changed in common.

    Of each difference from the base, the `density` largest entries stay; every entry takes the sign with the larger sum of
    weighted magnitudes, and the weighted mean of the differences with that sign. Yadav et al. 2023, arXiv:2306.01708,
    algorithm 1, with lambda = 1.
    """
    base = base.to(wide([base, *tensors]))
    changes = [trimmed(one.to(base.dtype) - base, density) for one in tensors]
    sign = torch.sign(sum((weight * one for one, weight in zip(changes, weights, strict=True)), start=zero(base.dtype)))
    total, share = torch.zeros_like(base), torch.zeros_like(base)
    for change, weight in zip(changes, weights, strict=True):
        agrees = (torch.sign(change) == sign) & (change != 0)
        total += torch.where(agrees, weight * change, 0.0)
        share += torch.where(agrees, weight, 0.0)
    return base + torch.where(share > 0, total / share.clamp(min=torch.finfo(base.dtype).tiny), 0.0)


def trimmed(change: Tensor, density: float) -> Tensor:
    """Return a tensor with its largest entries by magnitude, and zeros elsewhere."""
    n_kept = max(1, round(density * change.numel()))
    if n_kept >= change.numel():
        return change
    flat = change.flatten()
    kept = flat.abs().topk(n_kept).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)


def wide(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which tensors are merged."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def zero(dtype: torch.dtype) -> Tensor:
    """Return what a sum starts from."""
    return torch.zeros((), dtype=dtype)
