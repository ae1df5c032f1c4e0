import pytest
import torch
from torch.nn import functional as F

from llmctl.quant.linear import QuantEmbedding, QuantLinear
from llmctl.quant.methods import nearest
from llmctl.quant.products import PRODUCTS, plain, rounded_inputs, usual
from llmctl.quant.schemes import SCHEMES, Scheme


def layer_of(scheme: Scheme, n_out: int = 64, n_in: int = 128, *, bias: bool = False) -> QuantLinear:
    layer = QuantLinear(n_in, n_out, scheme, bias=bias)
    layer.put(nearest(torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * 0.1, scheme))
    return layer


@pytest.mark.parametrize("n_rows", [1, 3, 40])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_product_is_the_one_with_the_weight_multiplied_out(name: str, n_rows: int) -> None:
    layer = layer_of(SCHEMES[name])
    x = torch.randn(n_rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    expected = plain(layer)(x)
    assert torch.allclose(layer(x), expected, rtol=0.01, atol=0.02)
    # Where the inputs are bfloat16 numbers, only sums and zeros are rounded.
    assert (layer(x) - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", SCHEMES)
def test_no_product_rounds_scales_to_bfloat16(name: str, dtype: torch.dtype) -> None:
    """Rounding would make all outputs smaller by up to 2^-9: unlike other rounding, it does not average out."""
    scheme = SCHEMES[name]
    layer = layer_of(scheme, n_out=256)
    scales = layer.weight_scale.to(dtype) * (1 + 2**-9 - 2**-10)
    layer.load_state_dict(layer.state_dict() | {"weight_scale": scales})
    assert layer.weight_scale.dtype == dtype
    assert not layer.has_bfloat16_scales
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    expected = F.linear(x, layer.dequantized())
    for kind in usual.fitting(scheme, 256, 128):
        found = PRODUCTS[kind].make(layer)(x)
        ratio = (found * expected).sum() / expected.square().sum()
        assert abs(ratio - 1) < 3e-4, kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_that_bfloat16_represents_are_taken_as_such(dtype: torch.dtype) -> None:
    layer = layer_of(SCHEMES["int4"])
    expected, x = layer(torch.ones(1, 128)), torch.ones(1, 128)
    layer = layer_of(SCHEMES["int4"])
    layer.load_state_dict(layer.state_dict() | {"weight_scale": layer.weight_scale.to(dtype)})
    assert layer.has_bfloat16_scales
    assert torch.equal(layer(x), expected)


def test_the_weight_is_what_the_codes_say_whatever_precision_the_model_is_moved_to() -> None:
    layer = layer_of(SCHEMES["int4"], bias=True)
    before = layer.dequantized()
    layer.to(torch.float16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    assert torch.equal(layer.dequantized(), before)


@pytest.mark.parametrize("name", ["int8", "int4", "int3"])
def test_an_embedding_gives_the_rows_of_the_matrix(name: str) -> None:
    scheme = SCHEMES[name]
    table = QuantEmbedding(50, 128, scheme)
    table.put(nearest(torch.randn(50, 128), scheme))
    ids = torch.tensor([[0, 49, 7], [7, 1, 2]])
    assert torch.equal(table(ids), table.dequantized()[ids])
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_inputs_are_rounded_token_by_token() -> None:
    codes, scales = rounded_inputs(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    assert codes.tolist() == [[64, -127], [0, 0]]
    assert torch.isfinite(scales).all()


def test_buffers_survive_saving_and_loading() -> None:
    layer = layer_of(SCHEMES["int3"])
    other = QuantLinear(128, 64, SCHEMES["int3"], bias=False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantized(), layer.dequantized())
