import copy

import torch
from torch import nn

from llmctl.quant.int8 import Int8Linear, quantize_rows, to_int8


def test_codes_are_the_nearest():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    codes, scales = quantize_rows(weight)
    assert codes.dtype == torch.int8
    error = (codes * scales - weight).abs()
    assert (error <= scales / 2 * (1 + 1e-5)).all()
    assert ((codes.abs().amax(dim=1)) == 127).all()


def test_what_lies_on_the_grid_is_exact():
    codes = torch.randint(-127, 128, (5, 16), generator=torch.Generator().manual_seed(1))
    codes[:, 0] = 127
    linear = nn.Linear(16, 5)
    linear.weight.data = codes * 0.25
    x = torch.randint(-4, 5, (3, 16), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(Int8Linear(linear)(x), linear(x))


def test_a_row_of_zeros_stays_zero():
    codes, scales = quantize_rows(torch.zeros(2, 4))
    assert torch.equal(codes * scales, torch.zeros(2, 4))


def test_all_linear_layers_are_replaced():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Sequential(nn.Linear(16, 8, bias=False)))
    before, x = copy.deepcopy(model), torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    assert to_int8(model) == 2
    assert not list(model.parameters())
    error = (model(x) - before(x)).norm() / before(x).norm()
    assert 0 < error < 0.02
