import pytest
import torch

from llmctl.quant import columns, methods
from llmctl.quant.columns import descended, errors, fitted, inverse_root
from llmctl.quant.grid import Codes, decode, encode, search, whole_range
from llmctl.quant.methods import (
    Moments,
    gptq,
    method_of,
    output_error,
    weighted,
)
from llmctl.quant.schemes import SCHEMES, Scheme
from llmctl.tables.methods import METHODS


def weight(n_out: int = 48, n_in: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) * 0.1


def moments(n_in: int = 128, n_rows: int = 512, seed: int = 1) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    found = Moments.empty(n_in)
    mixing = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    found.add(torch.randn(n_rows, n_in, generator=generator) * torch.logspace(-1, 1, n_in) @ mixing)
    return found


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_what_lies_on_a_grid_stays_where_it_is(method: str, scheme: Scheme) -> None:
    on_grid = decode(method_of("nearest")(weight(), scheme, None), scheme)
    again = method_of(method)(on_grid, scheme, moments())
    if method == "hqq":  # moves zeros by design
        assert torch.nn.functional.mse_loss(decode(again, scheme), on_grid) < 1e-4
        return
    error = output_error(on_grid, decode(again, scheme), moments())
    assert error < {8: 1e-5, 6: 2e-4, 5: 6e-4, 4: 2e-3, 3: 2e-2, 2: 6e-2}[scheme.bits]


def test_eight_bits_are_within_half_a_step_of_the_weight() -> None:
    scheme = SCHEMES["int8"]
    grid = whole_range(weight(), scheme)
    off = decode(method_of("nearest")(weight(), scheme, None), scheme) - weight()
    assert (off.abs() <= 0.51 * grid.scales_OG + 0.004 * weight().abs()).all()


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int3", "int2"])
def test_searching_never_does_worse_than_the_whole_range(name: str) -> None:
    scheme, original = SCHEMES[name], weight()
    importance = torch.rand(128, generator=torch.Generator().manual_seed(2))

    def error(grid, weights):
        shown = (encode(original, grid, scheme).unflatten(1, (-1, scheme.group)) - grid.zeros_OG[..., None].float()) * (
            grid.scales_OG[..., None]
        )
        return ((shown.flatten(1) - original).square() * weights).unflatten(1, (-1, scheme.group)).sum(dim=2)

    for weights in (torch.ones(128), importance):
        assert (
            error(search(original, scheme, weights), weights) <= error(whole_range(original, scheme), weights)
        ).all()


def test_gptq_over_uncorrelated_inputs_of_equal_size_is_rounding() -> None:
    scheme, found = SCHEMES["int4"], Moments(torch.eye(128) * 3.0, torch.ones(128), 1)
    ours, plain = gptq(weight(), scheme, found), weighted(weight(), scheme, found)
    assert torch.equal(ours.codes_OI, plain.codes_OI)
    assert torch.equal(ours.grid.scales_OG, plain.grid.scales_OG)


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int3"])
def test_methods_that_see_inputs_lose_less_of_the_output(name: str) -> None:
    scheme, found = SCHEMES[name], moments()
    lost = {
        method: output_error(weight(), decode(method_of(method)(weight(), scheme, found), scheme), found)
        for method in ("nearest", "clip", "weighted", "gptq", "guided")
    }
    assert 1.03 * lost["guided"] < lost["gptq"] < lost["weighted"] < lost["nearest"]


@pytest.mark.parametrize("name", ["int8", "int4", "int4-sym", "int2"])
def test_scales_fit_all_codes_of_a_row_at_once(name: str) -> None:
    scheme, second_II = SCHEMES[name], moments().damped
    codes = gptq(weight(), scheme, moments())
    found = fitted(weight(), scheme, codes, second_II)
    assert torch.equal(found.codes_OI, codes.codes_OI)
    n_groups = codes.grid.scales_OG.shape[1]
    root_II = torch.linalg.cholesky(second_II.double()).T
    steps_OGg = codes.codes_OI.double().unflatten(1, (n_groups, -1)) - codes.grid.zeros_OG[..., None]
    for row in (0, 17, 47):
        parts_GI = torch.block_diag(*steps_OGg[row][:, None])
        wanted_G = torch.linalg.lstsq(root_II @ parts_GI.T, root_II @ weight()[row].double()[:, None]).solution[:, 0]
        unit = 0.0 if scheme.scale_bits == 16 else float(wanted_G.max()) / 128
        torch.testing.assert_close(found.grid.scales_OG[row].double(), wanted_G, rtol=2**-8, atol=unit / 2)
    before = errors(weight(), codes, scheme, second_II)  # eight bits leave little that the digits of a scale can mend
    assert errors(weight(), found, scheme, second_II).sum() < before.sum() * (1.01 if scheme.bits == 8 else 1.0)


def test_a_scale_that_would_be_none_is_kept() -> None:
    scheme, original = Scheme(4, 64, symmetric=False), weight()
    codes = gptq(original, scheme, moments())
    codes.codes_OI[:, :64] = codes.grid.zeros_OG[:, :1]  # one group says nothing
    codes.codes_OI[5, 64:] = scheme.levels - codes.codes_OI[5, 64:]  # and one the opposite
    found = fitted(original, scheme, codes, moments().damped)
    assert torch.equal(found.grid.scales_OG[:, 0], codes.grid.scales_OG[:, 0])
    assert torch.isfinite(found.grid.scales_OG).all()
    before = errors(original, codes, scheme, moments().damped)
    assert (errors(original, found, scheme, moments().damped) <= before).all()


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int2"])
def test_codes_end_where_no_other_code_is_better(name: str) -> None:
    scheme, original, second_II = SCHEMES[name], weight(n_out=12), moments().damped
    codes = gptq(original, scheme, moments())
    lost = [errors(original, codes, scheme, second_II)]
    for _ in range(30):
        codes = descended(original, scheme, codes, second_II)
        lost.append(errors(original, codes, scheme, second_II))
        assert (lost[-1] <= lost[-2] * (1 + 1e-5)).all()
    assert lost[-1].sum() < 0.98 * lost[0].sum()
    for column in range(0, 128, 7):
        for change in (-1, 1):
            other = codes.codes_OI.clone().int()
            other[:, column] = (other[:, column] + change).clamp(0, scheme.levels)
            changed = errors(original, Codes(other.to(torch.uint8), codes.grid), scheme, second_II)
            assert (changed >= lost[-1] * (1 - 1e-5)).all()


def test_gptq_takes_inputs_that_were_never_there() -> None:
    found = Moments.empty(128)
    inputs = torch.randn(8, 128)  # fewer rows than inputs: the moments are singular
    inputs[:, :64] = 0
    found.add(inputs)
    codes = gptq(weight(), SCHEMES["int4"], found)
    assert torch.isfinite(decode(codes, SCHEMES["int4"])).all()


def test_rows_of_zeros_stay_zeros() -> None:
    for name, scheme in SCHEMES.items():
        for method in map(method_of, METHODS):
            shown = decode(method(torch.zeros(16, 128), scheme, moments()), scheme)
            assert torch.equal(shown, torch.zeros(16, 128)), name


def test_the_table_says_which_methods_need_data() -> None:
    assert all(row.needs_data for row in METHODS.values() if row.weighs or row.equalizes)


def test_an_input_counts_as_often_as_its_weight_says() -> None:
    inputs = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0, 2.0, 0.0])
    found, repeated = Moments.empty(16), Moments.empty(16)
    found.add(inputs, weights)
    repeated.add(inputs[[0, 0, 2, 3, 4, 4]])
    torch.testing.assert_close(found.mean, repeated.mean)


def test_the_root_of_the_inverse_is_its_cholesky_factor() -> None:
    second_II = moments(n_in=300).damped.double()
    wanted = torch.linalg.cholesky(torch.linalg.inv(second_II), upper=True)
    torch.testing.assert_close(inverse_root(second_II.float()), wanted.float(), rtol=1e-4, atol=1e-6)


def test_outputs_in_parts_have_the_codes_of_all_at_once(monkeypatch) -> None:
    scheme, found = SCHEMES["int4"], moments()
    whole = method_of("guided")(weight(), scheme, found)
    monkeypatch.setattr(columns, "PART_FLOATS", 128 * 16)
    parts = method_of("guided")(weight(), scheme, found)
    assert torch.equal(parts.codes_OI, whole.codes_OI)
    assert torch.equal(parts.grid.scales_OG, whole.grid.scales_OG)


def test_second_moments_are_those_of_all_pairs_of_inputs(monkeypatch) -> None:
    monkeypatch.setattr(methods, "PART_INPUTS", 40)
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    weights = torch.rand(64, generator=torch.Generator().manual_seed(5))
    found = Moments.empty(128)
    found.add(rows, weights)
    torch.testing.assert_close(found.mean, (rows * weights[:, None]).T @ rows / 64)


def test_the_power_of_outputs_needs_half_of_the_second_moments(monkeypatch) -> None:
    found = moments()
    wanted = ((weight() @ found.mean) * weight()).sum(dim=1)
    found.second_II.triu_()
    for part in (1, 48, 128, 500):
        monkeypatch.setattr(methods, "PART_INPUTS", part)
        torch.testing.assert_close(found.power(weight()), wanted, rtol=1e-4, atol=1e-6)


def test_narrow_second_moments_are_summed_in_float32():
    """Products under autocast are in its type: no call may lose what was there before."""
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(64, 300, generator=generator), torch.rand(64, generator=generator) + 0.5
    wide, narrow = Moments.empty(300), Moments.empty(300)
    for _ in range(40):
        wide.add(inputs, weights)
        with torch.autocast("cpu", torch.bfloat16):
            narrow.add(inputs, weights)
    assert narrow.second_II.dtype == torch.float32
    assert (narrow.mean - wide.mean).norm() < 0.004 * wide.mean.norm()
    assert not torch.equal(narrow.mean, wide.mean)
