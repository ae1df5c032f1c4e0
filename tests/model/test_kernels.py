"""Written-out passes against what torch makes of the plain formulas."""

import pytest
import torch
from torch import nn

from llmctl.config import ModelConfig
from llmctl.model.kernels import RMSNorm, rotate, trains_on_cpu
from llmctl.model.positions import apply_rope, rope_tables


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad((y * weights).sum(), inputs))


@pytest.mark.parametrize("eps", [1e-6, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rms_norm_equals_torchs(eps, dtype, tolerance, is_transposed):
    x = draw(2, 5, 3, 24, dtype=dtype)
    seen = x.transpose(1, 2) if is_transposed else x
    plain, ours = nn.RMSNorm(24, eps=eps, dtype=dtype), RMSNorm(24, eps=eps, dtype=dtype)
    nn.init.normal_(plain.weight)
    ours.load_state_dict(plain.state_dict())
    wanted, got = plain(seen), ours(seen)
    assert type(got.grad_fn).__name__ != type(wanted.grad_fn).__name__
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(got, [x, ours.weight]), gradients(wanted, [x, plain.weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rms_norm_with_a_frozen_weight_or_input():
    norm = RMSNorm(24, eps=1e-5, dtype=torch.float64)
    x = draw(3, 24)
    (wanted,) = gradients(norm(x), [x])
    norm.weight.requires_grad_(False)
    torch.testing.assert_close(gradients(norm(x), [x])[0], wanted, rtol=0, atol=0)
    norm.weight.requires_grad_(True)
    assert torch.isfinite(gradients(norm(x.detach()), [norm.weight])[0]).all()


def test_rms_norm_of_zeros_is_finite():
    norm, x = RMSNorm(24, eps=1e-6), torch.zeros(2, 24, requires_grad=True)
    assert all(torch.isfinite(grad).all() for grad in gradients(norm(x), [x, norm.weight]))


@pytest.mark.parametrize("positions", [torch.arange(5)[None], torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rotation_equals_the_plain_formula(positions, is_transposed):
    x = draw(2, 5, 3, 8).transpose(1, 2) if is_transposed else draw(2, 3, 5, 8)
    tables = [table.double() for table in rope_tables(ModelConfig(head_dim=8), positions, (100.0, False), 5)]
    got = apply_rope(x, *tables)
    first, second = x.chunk(2, dim=-1)
    cos, sin = (table.unsqueeze(-3) for table in tables)
    wanted = x * cos + torch.cat([-second, first], dim=-1) * sin
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradients(got, [x])[0], gradients(wanted, [x])[0], rtol=0, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(apply_rope(x, *tables), wanted, rtol=0, atol=1e-14)


def test_rotation_keeps_the_layout_of_the_projections():
    x = torch.zeros(2, 5, 3, 8, requires_grad=True).transpose(1, 2)
    tables = [
        table.unsqueeze(-3) for table in rope_tables(ModelConfig(head_dim=8), torch.arange(5)[None], (100.0, False), 5)
    ]
    assert rotate(x, *tables).transpose(1, 2).is_contiguous()


def test_only_training_takes_the_written_out_passes():
    x = torch.zeros(2, requires_grad=True)
    assert trains_on_cpu(x)
    assert trains_on_cpu(x.detach(), x)
    assert not trains_on_cpu(x.detach())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not trains_on_cpu(x)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_model_has_the_gradients_of_finite_differences(build, ids, norm, positions):
    model = build(norm=norm, positions=positions, n_kv_heads=2, qk_norm=True)
    x = ids(2, 9)
    value = lambda: model(x).pow(2).mean()
    grads = torch.autograd.grad(value(), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = value()
            parameter.add_(direction, alpha=-2e-6)
            below = value()
            parameter.add_(direction, alpha=1e-6)
        torch.testing.assert_close((above - below) / 2e-6, (grad * direction).sum(), rtol=1e-6, atol=1e-8)
