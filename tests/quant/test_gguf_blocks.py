"""ggml's blocks: the bytes mean what the quantizer says, bit for bit, and the error is the package's or less."""

import numpy as np
import pytest
import torch

from llmctl.quant.gguf_blocks import CHUNK_WEIGHTS, KINDS, encode

gguf = pytest.importorskip("gguf", reason="pip install gguf")

WITH_QUANTIZER = ("Q8_0", "Q5_0", "Q4_1", "Q4_0")


def gaussian(n_out=64, n_in=512, seed=0):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) * 0.03


def uneven():
    """Rows of every kind: heavy tails, one outlier, one sign only, constant, zero, tiny, and neighbors far apart."""
    weight = gaussian(8) ** 3 * 1000
    weight[1, 5] = 40.0
    weight[2] = weight[2].abs() + 0.1
    weight[3] = -weight[3].abs() - 0.1
    weight[4] = 0.25
    weight[5] = 0.0
    weight[6] *= 1e-30
    weight[7, ::2] += 3.0
    return weight


def theirs(blocks, name):
    return gguf.quants.dequantize(blocks.bytes_OB.numpy(), gguf.GGMLQuantizationType[name])


def error(values, weight):
    return float((torch.as_tensor(values) - weight).square().mean().sqrt() / weight.std())


@pytest.mark.parametrize("name", KINDS)
def test_a_reader_gets_what_the_quantizer_meant(name):
    kind = KINDS[name]
    assert (kind.n_weights, kind.n_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    for weight in (gaussian(), uneven()):
        blocks = encode(weight, name)
        assert blocks.bytes_OB.shape == (weight.shape[0], weight.shape[1] // kind.n_weights * kind.n_bytes)
        assert np.array_equal(theirs(blocks, name), blocks.values_OI.numpy())


@pytest.mark.parametrize("name", KINDS)
def test_simple_rows(name):
    weight = uneven()
    values = encode(weight, name).values_OI
    assert torch.equal(values[5], torch.zeros(512))
    assert values[4] == pytest.approx(0.25, rel=0.02)
    assert torch.all(values[6].abs() <= 1e-6)


@pytest.mark.parametrize("name", WITH_QUANTIZER)
def test_the_error_is_less_than_that_of_nearest_codes_over_the_whole_range(name):
    kind = gguf.GGMLQuantizationType[name]
    for weight in (gaussian(), torch.distributions.StudentT(4.0).sample((64, 512))):
        whole_range = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        assert error(encode(weight, name).values_OI, weight) < error(whole_range, weight)


def test_more_bits_and_better_scales_are_less_error():
    weight = gaussian()
    errors = {name: error(encode(weight, name).values_OI, weight) for name in KINDS}
    assert KINDS["Q4_K"].n_bytes / 256 == KINDS["Q4_0"].n_bytes / 32  # 4.5 bits both
    assert errors["Q8_0"] < errors["Q6_K"] / 2 < errors["Q5_0"] / 4
    assert errors["Q4_K"] < 0.9 * errors["Q4_0"]


def test_what_is_on_the_grid_stays():
    codes = torch.arange(512).view(2, 256) * 7 % 16
    weight = codes * 0.125 - 0.75
    assert torch.equal(encode(weight, "Q4_1").values_OI, weight)
    # 0.125 / 63 is no 16-bit float.
    assert torch.allclose(encode(weight, "Q4_K").values_OI, weight, rtol=2**-11, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_independent_of_each_other_and_of_chunks(name):
    weight = gaussian(CHUNK_WEIGHTS // 512 + 3)
    whole = encode(weight, name)
    for row in (0, CHUNK_WEIGHTS // 512, weight.shape[0] - 1):
        assert torch.equal(encode(weight[row : row + 1], name).bytes_OB[0], whole.bytes_OB[row])


def test_a_scale_beyond_16_bits_shows():
    for name in KINDS:
        assert not encode(torch.full((1, 256), 1e9), name).values_OI.isfinite().all()
