"""Codes of 8-bit ONNX files: products of two adjacent inputs stay within 16 bits, whatever the weights."""

import pytest
import torch

from llmctl.formats.onnx.weights import LARGEST_SUM, SCHEME, grid_for_pairs, levels_for, pair_sums, signed
from llmctl.quant.grid import Codes, decode, encode, whole_range

WEIGHTS = {
    "normal": torch.randn(40, 96, generator=torch.Generator().manual_seed(0)),
    "heavy tails": torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) ** 3,
    "an odd number of inputs": torch.randn(7, 33, generator=torch.Generator().manual_seed(0)),
    "equal": torch.ones(3, 8),
    "zero": torch.zeros(3, 8),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_in_pairs_take_all_levels_of_inputs(name):
    weight = WEIGHTS[name]
    grid = grid_for_pairs(weight)
    codes = Codes(encode(weight, grid, SCHEME), grid)
    assert int(pair_sums(signed(codes).int()).max()) <= 128
    assert levels_for(codes) == 255
    assert ((decode(codes, SCHEME) - weight).abs() <= grid.scales_OG * 0.5001).all()
    assert (grid.scales_OG <= 2.02 * whole_range(weight, SCHEME).scales_OG).all()


@pytest.mark.parametrize("name", ["normal", "heavy tails", "equal"])
def test_other_codes_take_fewer_levels(name):
    grid = whole_range(WEIGHTS[name], SCHEME)
    codes = Codes(encode(WEIGHTS[name], grid, SCHEME), grid)
    worst, levels = int(pair_sums(signed(codes).int()).max()), levels_for(codes)
    assert levels < 255
    assert levels * worst <= LARGEST_SUM < (levels + 1) * worst
