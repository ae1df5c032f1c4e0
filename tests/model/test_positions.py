"""Position schemes against their formulas, written out the slow way."""

import cmath
import math

import pytest
import torch

from llmctl.model.positions import apply_rope, positions_within, relative_buckets, rope_tables, sinusoidal_table


def test_rope_is_a_rotation_of_complex_numbers():
    head_dim, theta = 8, 10_000.0
    x = torch.randn(2, 3, 7, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 30], [5, 6, 7, 8, 9, 10, 11]])
    rotated = apply_rope(x, *rope_tables(positions, head_dim, theta))
    half = head_dim // 2
    for b, n, t, i in torch.cartesian_prod(
        torch.arange(2), torch.arange(3), torch.arange(7), torch.arange(half)
    ).tolist():
        z = complex(x[b, n, t, i], x[b, n, t, i + half])
        z *= cmath.exp(1j * positions[b, t].item() * theta ** (-2 * i / head_dim))
        assert rotated[b, n, t, i].item() == pytest.approx(z.real, abs=1e-5)
        assert rotated[b, n, t, i + half].item() == pytest.approx(z.imag, abs=1e-5)


def test_rope_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1)).unbind()

    def score(i, j):
        rotate = lambda x, p: apply_rope(x, *rope_tables(torch.tensor([[p]]), 8, 500.0))
        return (rotate(q, i) * rotate(k, j)).sum().item()

    assert score(3, 1) == pytest.approx(score(19, 17), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


@pytest.mark.parametrize("d_model", [6, 16])
def test_sinusoids_follow_the_formula(d_model):
    table = sinusoidal_table(50, d_model)
    for position in (0, 1, 7, 49):
        for i in range(d_model // 2):
            angle = position / 10_000 ** (2 * i / d_model)
            assert table[position, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, d_model // 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def textbook_bucket(offset: int, *, causal: bool, n_buckets: int, max_distance: int) -> int:
    """Raffel et al. 2020: half the buckets per direction, half of those exact, the rest logarithmic."""
    first = 0
    if causal:
        distance = max(-offset, 0)
    else:
        n_buckets //= 2
        first = n_buckets if offset > 0 else 0
        distance = abs(offset)
    n_exact = n_buckets // 2
    if distance < n_exact:
        return first + distance
    share = math.log(distance / n_exact) / math.log(max_distance / n_exact)
    return first + min(n_exact + int(share * (n_buckets - n_exact)), n_buckets - 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20)])
def test_relative_buckets_equal_the_textbook(causal, n_buckets, max_distance):
    offsets = torch.arange(-300, 301)
    kind = {"causal": causal, "n_buckets": n_buckets, "max_distance": max_distance}
    wanted = [textbook_bucket(offset, **kind) for offset in offsets.tolist()]
    assert relative_buckets(offsets, **kind).tolist() == wanted


def test_positions_restart_in_every_document():
    documents = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
    assert positions_within(documents).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5]]
