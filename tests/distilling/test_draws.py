"""Draws: every token has its share, also where float32 would lose it, and numbers belong to their address."""

import numpy as np
import pytest
import torch

from llmctl.distilling.draws import BLOCK, draw, uniforms


def grid(n: int) -> torch.Tensor:
    return ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[None]


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK, BLOCK + 1, 1000])
def test_evenly_spread_numbers_find_each_token_by_its_share(vocabulary):
    p_1V = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    n = 100_000
    counts = torch.bincount(draw(p_1V, grid(n))[0], minlength=vocabulary)
    assert len(counts) == vocabulary  # nothing of what pads the last block
    # The interval of a token has its share of an even grid, to one number at each end.
    assert (counts - n * p_1V[0].double()).abs().max() <= 2


def test_a_plain_search_in_float64_finds_the_same():
    p_LV = torch.randn(7, 333, generator=torch.Generator().manual_seed(1)).softmax(1)
    numbers = torch.from_numpy(uniforms(3, 9, 7, 50))
    cdf_LV = p_LV.double().cumsum(1)
    expected = torch.searchsorted(cdf_LV, numbers * cdf_LV[:, -1:], right=True)
    assert torch.equal(draw(p_LV, numbers), expected)


def test_a_tail_below_the_digits_of_float32_is_drawn():
    """Half of these tokens leave a float32 sum as it is; together they are a hundredth of all draws."""
    vocabulary = 1 << 20
    p_1V = torch.full((1, vocabulary), 0.01 / (vocabulary - 1))
    p_1V[0, 0] = 0.99
    tokens = draw(p_1V, grid(100_000))[0]
    share = (tokens > 0).double().mean().item()
    assert share == pytest.approx(0.01, rel=2e-3)
    assert (tokens > vocabulary // 2).double().mean().item() == pytest.approx(0.005, rel=4e-3)


def test_tokens_without_mass_are_never_drawn():
    p_1V = torch.zeros(1, 3 * BLOCK)
    p_1V[0, [BLOCK - 1, 2 * BLOCK]] = torch.tensor([0.3, 0.7])
    edges = torch.tensor([[0.0, 0.3, np.nextafter(0.3, 0), 1 - 2.0**-53]], dtype=torch.float64)
    assert set(draw(p_1V, edges)[0].tolist()) <= {BLOCK - 1, 2 * BLOCK}
    assert draw(p_1V[:, :BLOCK], edges).unique().tolist() == [BLOCK - 1]


def test_numbers_belong_to_their_address():
    once = uniforms(1, 2, 40, 32)
    assert np.array_equal(uniforms(1, 2, 40, 32), once)
    assert np.array_equal(uniforms(1, 2, 9, 32), once[:9])
    # Not even where a sum or a product of both would be equal.
    others = [uniforms(*pair, 40, 32) for pair in ((2, 1), (1, 3), (0, 1_000_005), (0, 3), (-1, 2))]
    assert all(not np.isin(other, once).any() for other in others)
    assert once.min() >= 0
    assert once.max() < 1
    assert uniforms(0, 0, 0, 32).shape == (0, 32)


def test_numbers_stay_what_they_are():
    """The values of Philox 4x64 for key (0, 1): a cache made elsewhere or later must have the same."""
    raw = [int(value * 2**53) for value in uniforms(0, 1, 1, 3)[0]]
    assert raw == [7326042091893818, 6767391852299296, 6049676765835104]
    assert draw(torch.zeros(0, 7), torch.zeros(0, 4, dtype=torch.float64)).shape == (0, 4)
