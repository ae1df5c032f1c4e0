"""Muon is torch's, bit for bit in its dtype, and makes updates orthogonal in any."""

import pytest
import torch

from llmctl.training.muon import Muon, orthogonalize

SHAPES = [(16, 16), (16, 16), (12, 40), (40, 12), (40, 12), (7, 5)]


def matrices() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def test_in_bfloat16_it_is_torchs_bit_for_bit():
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    first = Muon(ours, dtype=torch.bfloat16, **settings)
    second = torch.optim.Muon(theirs, adjust_lr_fn="original", **settings)
    for seed in range(4):
        torch.manual_seed(seed)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        first.step()
        second.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
        # Equal up to the last bit of bfloat16 in a product of a batch, which the library may add up in another order.
        assert (one != other).float().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 60), (16, 48), (48, 16)])
def test_the_update_is_nearly_orthogonal(shape: tuple[int, int], dtype: torch.dtype):
    torch.manual_seed(0)
    update = orthogonalize(torch.randn(3, *shape), dtype)
    assert update.dtype == dtype
    assert update.shape == (3, *shape)
    values = torch.linalg.svdvals(update.double())
    # Five iterations bring singular values of a random matrix between about 0.5 and 1.25, not to one.
    assert 0.3 < float(values.min()) <= float(values.max()) < 1.3


def test_a_parameter_without_a_gradient_stays():
    ours = matrices()
    before = [matrix.detach().clone() for matrix in ours]
    ours[0].grad = torch.ones_like(ours[0])
    Muon(ours, lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert not torch.equal(ours[0], before[0])
    assert all(torch.equal(matrix, old) for matrix, old in zip(ours[1:], before[1:], strict=True))
