"""ggml's blocks: the bytes mean what the quantizer says, bit for bit, and the error is the package's or less."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from llmctl.quant.columns import descended
from llmctl.quant.gguf_blocks import CHUNK_WEIGHTS
from llmctl.quant.gguf_layout import packed, unpacked
from llmctl.quant.gguf_schemes import BLOCK_SCHEMES
from llmctl.quant.methods import Moments, clipped, decode, fitted, gptq, guided, method_of, output_error, weighted

gguf = pytest.importorskip("gguf", reason="pip install gguf")

WITH_QUANTIZER = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


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


def moments(n_in=512, seed=1):
    generator = torch.Generator().manual_seed(seed)
    found = Moments.empty(n_in)
    mixing = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    found.add(torch.randn(4 * n_in, n_in, generator=generator) * torch.logspace(-1, 1, n_in) @ mixing)
    return found


def theirs(codes, name):
    return gguf.quants.dequantize(packed(codes, BLOCK_SCHEMES[name]).numpy(), gguf.GGMLQuantizationType[name])


def rounded(weight, name):
    return decode(clipped(weight, BLOCK_SCHEMES[name]), BLOCK_SCHEMES[name])


def error(values, weight):
    return float((torch.as_tensor(values) - weight).square().mean().sqrt() / weight.std())


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
@pytest.mark.parametrize("method", ["clip", "weighted", "guided"])
def test_a_reader_gets_what_the_quantizer_meant(name, method):
    scheme = BLOCK_SCHEMES[name]
    assert (scheme.block, scheme.n_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    for weight in (gaussian(), uneven()):
        codes = method_of(method)(weight, scheme, moments())
        assert packed(codes, scheme).shape == (weight.shape[0], weight.shape[1] // scheme.block * scheme.n_bytes)
        assert np.array_equal(theirs(codes, name), decode(codes, scheme).numpy())


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
@pytest.mark.parametrize("method", ["clip", "guided"])
def test_codes_and_scales_are_read_back_from_their_bytes(name, method):
    scheme = BLOCK_SCHEMES[name]
    for weight in (gaussian(), uneven()):
        codes = method_of(method)(weight, scheme, moments())
        back = unpacked(packed(codes, scheme), scheme)
        assert back.codes_OI.dtype == codes.codes_OI.dtype
        assert torch.equal(back.codes_OI, codes.codes_OI)
        stored = slice(None) if scheme.affine else slice(-1)  # without offsets, their integers mean nothing
        for one, other in zip(back.grid[stored], codes.grid[stored], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
def test_simple_rows(name):
    values = rounded(uneven(), name)
    assert torch.equal(values[5], torch.zeros(512))
    assert values[4] == pytest.approx(0.25, rel=0.02)
    assert torch.all(values[6].abs() <= 1e-6)


@pytest.mark.parametrize("name", WITH_QUANTIZER)
def test_the_error_is_less_than_that_of_nearest_codes_over_the_whole_range(name):
    kind = gguf.GGMLQuantizationType[name]
    for weight in (gaussian(), torch.distributions.StudentT(4.0).sample((64, 512))):
        whole_range = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        assert error(rounded(weight, name), weight) <= error(whole_range, weight) * (1.001 if name == "Q8_0" else 0.999)


def test_more_bits_and_better_scales_are_less_error():
    weight = gaussian()
    lost = {name: error(rounded(weight, name), weight) for name in BLOCK_SCHEMES}
    assert lost["Q8_0"] < lost["Q6_K"] / 2 < lost["Q5_0"] / 4
    assert lost["Q4_K"] < 0.9 * lost["Q4_0"]
    assert lost["Q5_K"] < lost["Q5_0"] < lost["IQ4_NL"] < lost["IQ4_XS"] < lost["Q4_0"] < lost["Q3_K"] < lost["Q2_K"]


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
def test_methods_that_see_inputs_lose_less_of_the_output(name):
    scheme, found, weight = BLOCK_SCHEMES[name], moments(), gaussian()
    lost = [
        output_error(weight, decode(method(weight, scheme, found), scheme), found)
        for method in (guided, gptq, weighted)
    ]
    assert 1.05 * lost[0] < lost[1] < lost[2] / 2


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
def test_no_refit_makes_a_row_worse(name):
    scheme, weight = BLOCK_SCHEMES[name], torch.cat([gaussian(16), uneven()])
    second_II = moments().damped
    codes = gptq(weight, scheme, moments())
    lost = [errors_of(weight, codes, scheme, second_II)]
    for refit in (fitted, descended, fitted, descended):
        codes = refit(weight, scheme, codes, second_II)
        lost.append(errors_of(weight, codes, scheme, second_II))
    for before, after in pairwise(lost):
        assert (after <= before * (1 + 1e-3) + 1e-9).all()
    assert lost[-1].sum() < 0.95 * lost[0].sum()


def errors_of(weight, codes, scheme, second_II):
    error_OI = (decode(codes, scheme) - weight).double()
    return ((error_OI @ second_II.double()) * error_OI).sum(dim=1)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_offsets_and_scales_fit_all_codes_of_a_row_at_once(name):
    scheme, weight, second_II = BLOCK_SCHEMES[name], gaussian(4, 128), moments(128).damped
    codes = gptq(weight, scheme, moments(128))
    root_II = torch.linalg.cholesky(second_II.double()).T
    for row, found in enumerate(decode(fitted(weight, scheme, codes, second_II), scheme)):
        levels = [codes.codes_OI[row].double().view(4, 32), torch.ones(4, 32, dtype=torch.float64)]
        parts_KI = torch.cat([torch.block_diag(*part[:, None]) for part in levels])
        solution = torch.linalg.lstsq(root_II @ parts_KI.T, root_II @ weight[row].double()[:, None]).solution
        torch.testing.assert_close(found.double(), (parts_KI.T @ solution)[:, 0], rtol=0.01, atol=2e-4)


def test_what_is_on_the_grid_stays():
    codes = torch.arange(512).view(2, 256) * 7 % 16
    weight = codes * 0.125 - 0.75
    assert torch.equal(rounded(weight, "Q4_1"), weight)
    # 0.125 / 63 is no 16-bit float.
    assert torch.allclose(rounded(weight, "Q4_K"), weight, rtol=2**-11, atol=1e-4)


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
def test_rows_are_independent_of_each_other_and_of_chunks(name):
    weight = gaussian(CHUNK_WEIGHTS // 512 + 3)
    scheme = BLOCK_SCHEMES[name]
    whole = packed(clipped(weight, scheme), scheme)
    for row in (0, CHUNK_WEIGHTS // 512, weight.shape[0] - 1):
        assert torch.equal(packed(clipped(weight[row : row + 1], scheme), scheme)[0], whole[row])


def test_a_scale_beyond_16_bits_shows():
    for name in BLOCK_SCHEMES:
        assert not rounded(torch.full((1, 256), 1e9), name).isfinite().all()
