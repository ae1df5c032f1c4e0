"""Position encodings as pure functions of tensors: rotary, sinusoidal, ALiBi, and T5's relative buckets.

Shape suffixes (one legend for the package): B batch, T target time, S source or cached time, V vocabulary,
D model width, F feed-forward width, N query heads, K key/value heads, H head width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmctl.config import ModelConfig
from llmctl.model.kernels import rotate, trains_on_cpu

RopeKind = tuple[float, bool]
"""The base of a layer's rotary frequencies, 0 for no rotation, and whether they are scaled."""


def rope_tables(config: ModelConfig, positions: Tensor, kind: RopeKind, n_positions: int) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine tables of rotary embeddings.

    n_positions: the length of the longest row, including what will be generated: longrope has other frequencies beyond
    the context it was trained with.
    Shapes: positions (..., T) -> two float32 tensors (..., T, R), R the rotated channels of a head.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34, in the half-split layout of `LlamaForCausalLM`.
    """
    frequencies, factor = rope_frequencies(config, kind, n_positions, positions.device)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * factor, angles.sin() * factor


def rope_frequencies(
    config: ModelConfig, kind: RopeKind, n_positions: int, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Return the frequencies of a kind of rotary embeddings (R/2), and the factor on its cosines and sines."""
    width = config.rotary_dim or config.head_dim
    theta, is_scaled = kind
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, device=device).float() / width)
    if not is_scaled:
        return frequencies, 1.0
    return SCALINGS[config.rope_scaling](frequencies, theta, n_positions, *config.rope_scaling_values)


# Each returns the scaled frequencies and the factor on cosines and sines; the arguments after n_positions are
# `rope_scaling_values`.


def linear_scaling(frequencies: Tensor, _theta: float, _n_positions: int, factor: float) -> tuple[Tensor, float]:
    """Interpolate positions (Chen et al. 2023, arXiv:2306.15595)."""
    return frequencies / factor, 1.0


def llama3_scaling(
    frequencies: Tensor, _theta: float, _n_positions: int, factor: float, low: float, high: float, length: float
) -> tuple[Tensor, float]:
    """Interpolate the low frequencies and keep the high ones (Llama 3.1, arXiv:2407.21783).

    low, high: turns within the original context of `length` positions, between which the two are mixed.
    """
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor), 1.0


def yarn_scaling(
    frequencies: Tensor,
    theta: float,
    _n_positions: int,
    factor: float,
    fast: float,
    slow: float,
    length: float,
    attention: float,
    truncate: float = 1.0,
) -> tuple[Tensor, float]:
    """Interpolate by frequency, with a linear ramp over the channels (YaRN, Peng et al. 2023, arXiv:2309.00071).

    fast, slow: turns within the original context of `length` positions at the ends of the ramp. attention: the factor on
    cosines and sines. truncate: 1 if the ends of the ramp are whole channels.
    """
    width = 2 * len(frequencies)
    low, high = (width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    channels = torch.arange(len(frequencies), device=frequencies.device).float()
    kept = 1 - ((channels - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor), attention


def longrope_scaling(
    frequencies: Tensor, _theta: float, n_positions: int, length: float, attention: float, *divisors: float
) -> tuple[Tensor, float]:
    """Divide each frequency by its own divisor (LongRoPE, Ding et al. 2024, arXiv:2402.13753).

    divisors: for rows of at most `length` positions, then for longer ones, one per frequency each.
    """
    n = len(frequencies)
    own = divisors[n:] if n_positions > length else divisors[:n]
    return frequencies / torch.tensor(own, device=frequencies.device), attention


SCALINGS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "linear": linear_scaling,
    "llama3": llama3_scaling,
    "yarn": yarn_scaling,
    "longrope": longrope_scaling,
}


def apply_rope(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Apply rotary embeddings to queries or keys; the tables are broadcast over the heads.

    Tables narrower than a head rotate its first channels and leave the others as they are.
    """
    width = cos_BTH.shape[-1]
    if width < x_BNTH.shape[-1]:
        rest = x_BNTH[..., width:]
        return torch.cat([apply_rope(x_BNTH[..., :width], cos_BTH, sin_BTH), rest], dim=-1)
    cos, sin = (table.unsqueeze(-3).to(x_BNTH.dtype) for table in (cos_BTH, sin_BTH))
    if trains_on_cpu(x_BNTH):
        return rotate(x_BNTH, cos, sin)
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos + torch.cat([-second, first], dim=-1) * sin


def sinusoidal_table(n_positions: int, d_model: int, kind: str = "interleaved") -> Tensor:
    """Return the sinusoidal position table of the 2017 Transformer, float32 (n_positions, D).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5. Sines are in the first half and cosines in the second, as
    in Marian (the paper interleaves them; this only permutes channels, which training absorbs). kind: `halves` has the
    geometric series of fairseq, whose last rate is exactly 1/10000.
    """
    if kind == "halves":
        half = d_model // 2
        series = torch.exp(torch.arange(half, dtype=torch.float64) * -(math.log(10000.0) / max(half - 1, 1)))
        turns = torch.arange(n_positions, dtype=torch.float64)[:, None] * series
        return torch.nn.functional.pad(torch.cat([turns.sin(), turns.cos()], dim=1), (0, d_model % 2)).float()
    rates = 10000.0 ** (-2.0 * (torch.arange(d_model, dtype=torch.float64) // 2) / d_model)
    angles = torch.arange(n_positions, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=1).float()


def alibi_slopes(n_heads: int) -> Tensor:
    """Return the slopes by which a head's scores fall with distance, float32 (N).

    Source: Press et al. 2021, arXiv:2108.12409, section 3; the slopes of head counts that are no power of two as in the
    authors' code.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(n_heads - power)]
    return torch.tensor(slopes)


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


def signed_buckets(distances: Tensor, *, n_buckets: int, max_distance: int) -> Tensor:
    """Map query position minus key position to rows of DeBERTa's table: in each direction half exact, half logarithmic.

    n_buckets: rows of the table, half of them for keys after the query.
    Source: He et al. 2020, arXiv:2006.03654, eq. 3, with the logarithmic buckets of the authors' version 2.
    """
    span = n_buckets // 2
    n_exact = span // 2
    sizes = distances.abs().clamp(min=n_exact).float()
    # In float32 as in the published models: a distance at the edge of a bucket is rounded as there.
    growth = torch.log(sizes / n_exact) / torch.log(torch.tensor((max_distance - 1) / n_exact, device=sizes.device))
    logarithmic = (torch.ceil(growth * (n_exact - 1)) + n_exact).long() * distances.sign()
    buckets = torch.where(distances.abs() <= n_exact, distances, logarithmic)
    return (buckets + span).clamp(0, 2 * span - 1)


def positions_within(documents_BT: Tensor) -> Tensor:
    """Return positions that restart from 0 in every document of a packed row.

    Shapes: documents (B, T), each document contiguous -> positions (B, T), int64.
    """
    index = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts = torch.ones_like(documents_BT, dtype=torch.bool)
    starts[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    first = torch.where(starts, index, torch.zeros_like(index)).cummax(dim=1).values
    return index - first
