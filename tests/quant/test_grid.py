"""Scales as files hold them."""

import pytest
import torch

from llmctl.quant.grid import rounded_scales, scale_codes, scales_of
from llmctl.quant.schemes import SCHEMES


@pytest.mark.parametrize("name", ["int4", "int4-sym"])
def test_rounding_scales_again_changes_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-24, 24, (200, 1), generator=generator)
    scales = torch.rand(200, 18, generator=generator) * sizes
    found = rounded_scales(scales, SCHEMES[name])
    assert torch.equal(found, rounded_scales(found, SCHEMES[name]))
    assert torch.equal(found, found.bfloat16().float())
    assert (found > 0).all()
    step = scales.amax(dim=1, keepdim=True) * 2.0**-7
    assert ((found - scales).abs() <= step).all()


def test_scales_in_eight_bits_are_multiples_of_a_power_of_two_by_row() -> None:
    codes, exponents = scale_codes(torch.tensor([[1.0, 0.5, 0.001], [255.9, 3.0, 0.2], [0.0, 0.0, 0.0]]))
    assert codes[:2].tolist() == [
        [128, 64, 1],
        [128, 2, 1],
    ]  # 255.9 would round to 256, one more than there is room for
    assert exponents[:2].tolist() == [[-7], [1]]
    assert scales_of(codes, exponents)[1].tolist() == [256.0, 4.0, 2.0]
    assert (scales_of(codes, exponents)[2] < 1e-29).all()
