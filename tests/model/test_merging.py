"""Merged tensors against the formulas written out, and the cases at their ends."""

import math

import pytest
import torch

from llmctl.model.merging import linear, slerp, ties, trimmed


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_mean_is_of_normalized_weights():
    assert linear([tensor(1, 2), tensor(3, 6)], [1, 3]).tolist() == [2.5, 5.0]
    half = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0], dtype=torch.bfloat16)]
    assert linear(half, [0.1, 0.9]).dtype == torch.float32


def test_slerp_follows_the_arc():
    x, y = tensor(2, 0), tensor(0, 4)
    for place in (0.0, 0.25, 0.5, 1.0):
        found = slerp([x, y], [1 - place, place])
        angle, length = place * math.pi / 2, 2 + 2 * place
        assert found.tolist() == pytest.approx([length * math.cos(angle), length * math.sin(angle)], abs=1e-12)
    assert slerp([x, 3 * x], [1, 1]).tolist() == [4.0, 0.0]
    assert slerp([x, 0 * x], [1, 1]).tolist() == [1.0, 0.0]


def test_ties_keeps_large_changes_and_the_sign_of_most():
    base = tensor(1, 1, 1, 1)
    first, second, third = (base + tensor(*change) for change in ((4, 0.1, -2, 1), (2, 0.2, -4, -3), (-3, 0.1, 6, 1)))
    # The signs are those of the sums 3, 0.4, 0 and -1; only changes with them count.
    found = ties([first, second, third], [1, 1, 1], base, 1.0)
    assert found.tolist() == pytest.approx([1 + 3, 1 + 0.4 / 3, 1, 1 - 3])
    assert trimmed(tensor(4, 0.1, -2, 1), 0.5).tolist() == [4, 0, -2, 0]
    assert ties([first], [0.3], base, 0.5).tolist() == pytest.approx([5, 1, -1, 1])
    assert torch.equal(ties([base, base], [1, 1], base, 0.2), base)
