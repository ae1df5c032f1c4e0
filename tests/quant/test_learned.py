from dataclasses import replace

import pytest
import torch

from llmctl.quant.grid import decode
from llmctl.quant.learned import LearnedLinear, ScaledLinear, learned_codes
from llmctl.quant.methods import nearest
from llmctl.quant.schemes import SCHEMES


def layer_of(name: str) -> tuple[LearnedLinear, torch.Tensor]:
    scheme, generator = SCHEMES[name], torch.Generator().manual_seed(0)
    original = torch.randn(24, 64, generator=generator) * 0.1
    layer = LearnedLinear(64, 24, scheme, bias=False)
    layer.put(nearest(original, scheme), original)
    return layer, original


def codes_of(layer: ScaledLinear):
    return learned_codes({name: tensor.detach() for name, tensor in layer.state_dict().items()}, layer.scheme)


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int3", "int2"])
def test_it_begins_with_the_codes_that_were_chosen(name: str) -> None:
    scheme, generator = SCHEMES[name], torch.Generator().manual_seed(0)
    original = torch.randn(24, 64, generator=generator) * 0.1
    chosen = nearest(original, scheme)
    layer = LearnedLinear(64, 24, scheme, bias=False)
    layer.put(chosen, original)
    assert torch.equal(codes_of(layer).codes_OI, chosen.codes_OI)
    assert torch.allclose(layer.rounded(), decode(chosen, scheme), atol=1e-7)


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int2"])
def test_what_it_computes_is_what_its_codes_mean_after_training_too(name: str) -> None:
    layer, original = layer_of(name)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 8, generator=generator) @ torch.randn(8, 64, generator=generator)  # there is room to make up
    losses = []
    for _ in range(200):
        loss = (layer(x) - x @ original.T).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses) < 0.9 * losses[0]
    assert torch.allclose(layer.rounded(), decode(codes_of(layer), SCHEMES[name]), atol=1e-6)


def test_gradients_are_those_of_the_paper() -> None:
    """Inside the range the weight's gradient passes and the scale's is the rounding error; outside, the end's code."""
    scheme = SCHEMES["int2"]
    layer = LearnedLinear(32, 1, scheme, bias=False)
    with torch.no_grad():
        layer.scales_OG.fill_(0.5)
        layer.zeros_OG.fill_(1)
        layer.weight.zero_()
        layer.weight[0, :3] = torch.tensor([0.3, 5.0, -5.0])  # rounds to 1 step; above 2 steps; below -1 step
    gradient = torch.zeros(1, 32)
    gradient[0, :3] = torch.tensor([1.0, 10.0, 100.0])
    layer.rounded().backward(gradient)
    assert layer.weight.grad is not None
    assert layer.weight.grad[0, :3].tolist() == [1.0, 0.0, 0.0]
    per_scale = 1.0 * (1 - 0.6) + 10.0 * 2 + 100.0 * -1
    assert layer.ratio.grad is not None
    assert float(layer.ratio.grad) == pytest.approx(per_scale * 0.5, rel=1e-5)


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int2"])
def test_scales_learn_under_codes_that_stay(name: str) -> None:
    scheme, generator = SCHEMES[name], torch.Generator().manual_seed(0)
    original = torch.randn(24, 64, generator=generator) * 0.1
    chosen = nearest(original, scheme)
    layer = ScaledLinear(64, 24, scheme, bias=True)
    layer.put(chosen, original)
    assert torch.equal(layer.rounded(), decode(chosen, scheme))
    x = torch.randn(128, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - x @ original.T).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    found = codes_of(layer)
    assert torch.equal(found.codes_OI, chosen.codes_OI)
    assert torch.allclose(layer.rounded(), decode(found, scheme), atol=1e-6)


@pytest.mark.parametrize("kind", [ScaledLinear, LearnedLinear])
def test_it_counts_the_numbers_of_its_weight(kind) -> None:
    layer = kind(64, 24, SCHEMES["int4-sym"], bias=False)
    assert sum(parameter.numel() for parameter in layer.parameters()) + layer.n_more == 64 * 24


def test_the_gradient_of_a_scale_is_that_of_plain_torch() -> None:
    scheme = replace(SCHEMES["int4"], group=64)
    layer = ScaledLinear(64, 8, scheme, bias=False)
    original = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    codes = nearest(original, scheme)
    layer.put(codes, original)
    weights = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    (layer.rounded() * weights).sum().backward()
    scales = codes.grid.scales_OG.clone().requires_grad_()
    steps = codes.codes_OI.float() - codes.grid.zeros_OG.float()  # one group a row
    ((steps * scales) * weights).sum().backward()
    assert layer.ratio.grad is not None
    assert scales.grad is not None
    torch.testing.assert_close(layer.ratio.grad, scales.grad * codes.grid.scales_OG)
