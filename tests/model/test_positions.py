"""Position schemes against their formulas, written out the slow way."""

import cmath
import math
from itertools import pairwise

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.model.positions import (
    alibi_slopes,
    apply_rope,
    positions_within,
    relative_buckets,
    rope_tables,
    signed_buckets,
    sinusoidal_table,
)


def tables(positions, head_dim, theta):
    return rope_tables(ModelConfig(head_dim=head_dim), positions, (theta, False), positions.shape[-1])


def test_rope_is_a_rotation_of_complex_numbers():
    head_dim, theta = 8, 10_000.0
    x = torch.randn(2, 3, 7, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 30], [5, 6, 7, 8, 9, 10, 11]])
    rotated = apply_rope(x, *tables(positions, head_dim, theta))
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
        rotate = lambda x, p: apply_rope(x, *tables(torch.tensor([[p]]), 8, 500.0))
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


def scaled(kind, *values, head_dim=16, theta=10_000.0, n_positions=64, **fields):
    """Return the angles of position 1, which are the frequencies, and the factor on cosines and sines."""
    config = ModelConfig(head_dim=head_dim, rope_scaling=kind, rope_scaling_values=values, **fields)
    cos, sin = rope_tables(config, torch.tensor([[0, 1]]), (theta, True), n_positions)
    return torch.atan2(sin, cos)[0, 1, : cos.shape[-1] // 2], float(cos[0, 0, 0])


FREQUENCIES = torch.tensor([10_000.0 ** (-2 * i / 16) for i in range(8)])


def test_linear_scaling_divides_positions():
    got, factor = scaled("linear", 4.0)
    torch.testing.assert_close(got, FREQUENCIES / 4)
    assert factor == 1.0


def test_llama3_keeps_high_frequencies_and_divides_low_ones():
    length, low, high = 512.0, 1.0, 4.0
    got, _ = scaled("llama3", 8.0, low, high, length)
    for frequency, found in zip(FREQUENCIES.tolist(), got.tolist(), strict=True):
        turns = length * frequency / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        assert found == pytest.approx(share * frequency + (1 - share) * frequency / 8, rel=1e-5)
    assert got[0] == pytest.approx(FREQUENCIES[0])
    assert got[-1] == pytest.approx(FREQUENCIES[-1] / 8)


def test_yarn_has_a_ramp_between_the_two_and_a_factor():
    got, factor = scaled("yarn", 4.0, 32.0, 1.0, 128.0, 1.25)
    ratios = (FREQUENCIES / got).tolist()
    assert all(later >= earlier - 1e-5 for earlier, later in pairwise(ratios))
    assert ratios[0] == pytest.approx(1.0)
    assert ratios[-1] == pytest.approx(4.0, rel=1e-5)
    assert factor == pytest.approx(1.25)


def test_longrope_has_other_divisors_for_long_rows():
    short, long = [1.0 + i / 10 for i in range(8)], [2.0 + i for i in range(8)]
    values = (64.0, 1.1, *short, *long)
    torch.testing.assert_close(scaled("longrope", *values, n_positions=64)[0], FREQUENCIES / torch.tensor(short))
    torch.testing.assert_close(scaled("longrope", *values, n_positions=65)[0], FREQUENCIES / torch.tensor(long))


def test_a_part_of_a_head_is_rotated_and_the_rest_is_left():
    config = ModelConfig(head_dim=16, rotary_dim=4)
    x = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    got = apply_rope(x, *rope_tables(config, positions, (500.0, False), 5))
    torch.testing.assert_close(got[..., 4:], x[..., 4:], rtol=0, atol=0)
    narrow = rope_tables(ModelConfig(head_dim=4), positions, (500.0, False), 5)
    torch.testing.assert_close(got[..., :4], apply_rope(x[..., :4], *narrow))


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    # Other numbers: those of the next lower power of two, then every second of the next higher one.
    assert alibi_slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_fairseq_sinusoids_end_at_a_ten_thousandth():
    table = sinusoidal_table(3, 8, "halves")
    rates = [10_000.0 ** (-i / 3) for i in range(4)]
    assert table[2].tolist() == pytest.approx([*(math.sin(2 * r) for r in rates), *(math.cos(2 * r) for r in rates)])


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(512, 512), (64, 130), (16, 40)])
def test_signed_buckets_are_exact_near_by_and_then_logarithmic(n_buckets, max_distance):
    span, exact = n_buckets // 2, n_buckets // 4
    for distance in range(-3 * max_distance, 3 * max_distance + 1):
        size = abs(distance)
        if size > exact:
            growth = math.log(size / exact) / math.log((max_distance - 1) / exact)
            # At the edge of a bucket, float32 decides.
            if abs(growth * (exact - 1) - round(growth * (exact - 1))) < 1e-4 and size != max_distance - 1:
                continue
            size = exact + math.ceil(growth * (exact - 1) - 1e-6)
        row = min(max(span + math.copysign(size, distance), 0), n_buckets - 1)
        assert signed_buckets(torch.tensor([distance]), n_buckets=n_buckets, max_distance=max_distance).item() == row
