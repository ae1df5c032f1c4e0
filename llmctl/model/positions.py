"""Position encodings as pure functions of tensors: rotary, sinusoidal, and T5's relative buckets.

Shape suffixes (one legend for the package): B batch, T target time, S source or cached time, V vocabulary,
D model width, F feed-forward width, N query heads, K key/value heads, H head width.
"""

import math

import torch
from torch import Tensor

from llmctl.model.kernels import rotate, trains_on_cpu


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine tables of rotary embeddings.

    Shapes: positions (..., T) -> two float32 tensors (..., T, H).
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34, in the half-split layout of `LlamaForCausalLM`.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Apply rotary embeddings to queries or keys; the tables are broadcast over the heads."""
    cos, sin = (table.unsqueeze(-3).to(x_BNTH.dtype) for table in (cos_BTH, sin_BTH))
    if trains_on_cpu(x_BNTH):
        return rotate(x_BNTH, cos, sin)
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos + torch.cat([-second, first], dim=-1) * sin


def sinusoidal_table(n_positions: int, d_model: int) -> Tensor:
    """Return the sinusoidal position table of the 2017 Transformer, float32 (n_positions, D).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5. Sines are in the first half and cosines in the second, as
    in Marian (the paper interleaves them; this only permutes channels, which training absorbs).
    """
    rates = 10000.0 ** (-2.0 * (torch.arange(d_model, dtype=torch.float64) // 2) / d_model)
    angles = torch.arange(n_positions, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=1).float()


def relative_buckets(offsets_TS: Tensor, *, causal: bool, n_buckets: int, max_distance: int) -> Tensor:
    """Map key position minus query position to T5's buckets: half of them exact, the rest logarithmic.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1.
    """
    buckets = torch.zeros_like(offsets_TS)
    if causal:
        distance = (-offsets_TS).clamp(min=0)
    else:
        n_buckets //= 2
        buckets = buckets + (offsets_TS > 0).long() * n_buckets
        distance = offsets_TS.abs()
    n_exact = n_buckets // 2
    growth = torch.log(distance.float().clamp(min=1) / n_exact) / math.log(max_distance / n_exact)
    logarithmic = (n_exact + (growth * (n_buckets - n_exact)).long()).clamp(max=n_buckets - 1)
    return buckets + torch.where(distance < n_exact, distance, logarithmic)


def positions_within(documents_BT: Tensor) -> Tensor:
    """Return positions that restart from 0 in every document of a packed row.

    Shapes: documents (B, T), each document contiguous -> positions (B, T), int64.
    """
    index = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts = torch.ones_like(documents_BT, dtype=torch.bool)
    starts[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    first = torch.where(starts, index, torch.zeros_like(index)).cummax(dim=1).values
    return index - first
