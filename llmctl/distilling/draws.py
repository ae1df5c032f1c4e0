"""Sample from distributions over a vocabulary with counter-based random numbers.

`torch.multinomial` sums the vocabulary in float32, where the probability of a tail token is below the sum's precision: such
tokens are sampled too rarely or never. Here blocks of the vocabulary are summed and their sums accumulated in float64, so
that every token keeps its probability. Random numbers come from a counter (Salmon et al. 2011,
doi:10.1145/2063384.2063405), not from a state: they are the same in any order and on any device.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Tokens per block: small enough to search cheaply, large enough that there are few blocks."""


def uniforms(seed: int, address: int, n_labels: int, n_draws: int) -> NDArray[np.float64]:
    """Return uniform numbers (L, n) in [0, 1) for (seed, address); more labels do not change the first ones."""
    key = np.array([seed % 2**64, address % 2**64], dtype=np.uint64)
    # Raw bits, not Generator.random: NumPy guarantees that these never change.
    raw = np.random.Philox(key=key).random_raw(n_labels * n_draws)
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(n_labels, n_draws)


def draw(p_LV: Tensor, uniforms_Ln: Tensor) -> Tensor:
    """Return the tokens (L, n) selected by float64 numbers in [0, 1); the distributions need not sum to one."""
    n_pad = -p_LV.shape[1] % BLOCK
    p_LGB = (F.pad(p_LV, (0, n_pad)) if n_pad else p_LV).unflatten(1, (-1, BLOCK))
    # A block's sum is accurate to 1e-7 in float32; the sum over all blocks is not.
    mass_LG = p_LGB.sum(2).double().cumsum(1)
    place_Ln = below(uniforms_Ln * mass_LG[:, -1:], mass_LG[:, -1:])
    block_Ln = torch.searchsorted(mass_LG, place_Ln, right=True)
    end_Ln = mass_LG.gather(1, block_Ln)
    begin_Ln = torch.where(block_Ln > 0, mass_LG.gather(1, (block_Ln - 1).clamp(min=0)), 0.0)
    rows_L1 = torch.arange(len(p_LV), device=p_LV.device)[:, None]
    inner_LnB = p_LGB[rows_L1, block_Ln].double().cumsum(2)
    total_Ln = inner_LnB[..., -1]
    inside_Ln = below((place_Ln - begin_Ln) / (end_Ln - begin_Ln) * total_Ln, total_Ln)
    return block_Ln * BLOCK + torch.searchsorted(inner_LnB, inside_Ln[..., None], right=True).squeeze(2)


def below(place: Tensor, end: Tensor) -> Tensor:
    """Return indices clamped to tokens with nonzero probability, in case rounding moved them past the end."""
    return torch.minimum(place, torch.nextafter(end, torch.zeros_like(end)))
