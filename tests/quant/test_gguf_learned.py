"""Learned scales of ggml's blocks: what a layer computes is what its bytes mean, before and after training."""

import pytest
import torch

from llmctl.quant.gguf_blocks import decode, parameters
from llmctl.quant.gguf_layout import packed, unpacked
from llmctl.quant.gguf_learned import STORED, BlockLinear, learned_codes
from llmctl.quant.gguf_schemes import BLOCK_SCHEMES
from llmctl.quant.grid import Codes
from llmctl.quant.methods import guided, nearest
from tests.quant.test_gguf_blocks import gaussian, moments

gguf = pytest.importorskip("gguf", reason="pip install gguf")


def layer_of(codes: Codes, name: str) -> BlockLinear:
    n_out, n_in = codes.codes_OI.shape
    layer = BlockLinear(n_in, n_out, BLOCK_SCHEMES[name], bias=False)
    layer.put(codes)
    return layer


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
def test_an_untrained_layer_is_what_was_chosen_bit_for_bit(name):
    scheme = BLOCK_SCHEMES[name]
    codes = guided(gaussian(), scheme, moments())
    layer = layer_of(codes, name)
    assert torch.equal(layer.rounded(), decode(codes, scheme))
    assert torch.equal(packed(learned_codes(layer.state_dict(), scheme), scheme), packed(codes, scheme))


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
def test_trained_scales_survive_writing_and_reading_bit_for_bit(name):
    scheme, original = BLOCK_SCHEMES[name], gaussian()
    codes = nearest(original, scheme)
    layer = layer_of(codes, name)
    x = moments().sample_NI
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = (layer(x) - x @ original.T).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    found = learned_codes(layer.state_dict(), scheme)
    assert torch.equal(found.codes_OI, codes.codes_OI)
    assert not torch.equal(found.grid.units_OS, codes.grid.units_OS)
    stored = packed(found, scheme)
    values = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(torch.from_numpy(values), layer.rounded())
    back = unpacked(stored, scheme)
    assert torch.equal(back.codes_OI, layer.codes_OI)
    for one, other in zip(parameters(scheme, *back.grid[2:]), parameters(scheme, *found.grid[2:]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q3_K", "IQ4_XS"])
def test_gradients_are_those_of_plain_torch_on_the_stored_scales(name):
    scheme = BLOCK_SCHEMES[name]
    codes = nearest(gaussian(8), scheme)
    layer = layer_of(codes, name)
    wanted = torch.randn(8, 512, generator=torch.Generator().manual_seed(3))
    (layer.rounded() * wanted).sum().backward()
    scales, offsets = (part.clone().requires_grad_() for part in parameters(scheme, *codes.grid[2:]))
    levels = (codes.codes_OI.float() - scheme.middle).unflatten(1, (-1, scheme.group))
    (((levels * scales[..., None] + offsets[..., None]).flatten(1)) * wanted).sum().backward()
    pace = 2.0 ** (4 - scheme.bits)
    torch.testing.assert_close(layer.ratio.grad, scales.grad * scales.detach() * pace, rtol=1e-4, atol=1e-6)
    if scheme.affine:
        reach = scales.detach().abs() * scheme.levels / 2 * pace
        torch.testing.assert_close(layer.shift.grad, offsets.grad * reach, rtol=1e-4, atol=1e-6)
    else:
        assert layer.shift is None


def test_with_each_additional_bit_scales_move_half_as_far():
    moved = {}
    for name in ("Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        scheme = BLOCK_SCHEMES[name]
        codes = nearest(gaussian(8), scheme)
        layer = layer_of(codes, name)
        with torch.no_grad():
            layer.ratio.fill_(0.08)
        after = learned_codes(layer.state_dict(), scheme).grid.scales_OG
        moved[name] = float((after / codes.grid.scales_OG).log().mean())
    assert moved["Q3_K"] == pytest.approx(moved["Q4_K"] * 2, rel=0.05)
    assert moved["Q5_K"] == pytest.approx(moved["Q4_K"] / 2, rel=0.05)
    assert moved["Q6_K"] == pytest.approx(moved["Q4_K"] / 4, rel=0.05)


def test_it_counts_the_numbers_of_its_weight():
    for name in ("Q4_0", "Q4_K"):
        layer = layer_of(nearest(gaussian(8), BLOCK_SCHEMES[name]), name)
        assert sum(parameter.numel() for parameter in layer.parameters()) + layer.n_more == 8 * 512
        assert set(STORED) < set(layer.state_dict())
