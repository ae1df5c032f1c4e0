"""What was measured is kept, per machine; a damaged file or a folder that cannot be written only costs time."""

import json

import pytest
import torch

from llmctl.kernels import product_table as products
from llmctl.kernels.product_table import Measured, measure, products_path, random_layer, render_survey
from llmctl.quant.products import PRODUCTS, ROWS, counted_as, plain, usual
from llmctl.quant.schemes import SCHEMES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("n_rows", [1, 40])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_product_that_fits_is_right(name: str, n_rows: int):
    layer = random_layer(SCHEMES[name], 96, 256, torch.Generator().manual_seed(0))
    x = torch.randn(2, n_rows, 256, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    expected = plain(layer)(x)
    for product in usual.fitting(layer.scheme, 96, 256):
        got = PRODUCTS[product].make(layer)(x)
        assert got.shape == expected.shape
        assert got.dtype == x.dtype
        assert (got - expected).norm() < 5e-3 * expected.norm(), product


def test_the_fastest_right_one_is_chosen_and_kept(cache):
    table = Measured()
    name = table(SCHEMES["int4"], 320, 256, 1)
    problems = json.loads(products_path().read_text())[table.machine]
    ((problem, times),) = problems.items()
    assert problem == "4-bit group 32 zeros inputs 0 512x256 1"
    own = {product: seconds for product, seconds in times.items() if product in PRODUCTS}
    assert own[name] == min(own.values())
    # What the file says is believed: nothing is measured twice.
    slowest = max(own, key=own.__getitem__)
    products_path().write_text(json.dumps({table.machine: {problem: {**own, slowest: 1e-9}}}))
    assert Measured()(SCHEMES["int4"], 320, 256, 1) == slowest


def test_a_wrong_product_is_not_taken(monkeypatch):
    wrong = {name: kind for name, kind in PRODUCTS.items() if name != "int4_groups"}
    kind = PRODUCTS["int4_groups"]
    wrong["int4_groups"] = type(kind)(lambda layer: lambda x: 1.1 * plain(layer)(x), kind.fits)
    monkeypatch.setattr(products, "PRODUCTS", wrong)
    assert "int4_groups" not in measure(Measured(), SCHEMES["int4"], 256, 256, 1)


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"b": {"plain": "fast"}}}'])
def test_a_damaged_file_is_written_anew(cache, content: str):
    products_path().write_text(content)
    assert Measured()(SCHEMES["int8"], 256, 256, 1) in PRODUCTS
    assert json.loads(products_path().read_text())


def test_a_folder_that_cannot_be_written(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("LLMCTL_CACHE", str(cache / "file"))
    assert Measured()(SCHEMES["int8"], 256, 256, 1) in PRODUCTS


def test_rows_are_counted_as_the_next_larger_number():
    assert [counted_as(n) for n in (1, 2, 4, 5, 256, 1000)] == [1, 4, 4, 16, 256, 256]


@pytest.mark.parametrize("name", SCHEMES)
def test_without_a_table_a_product_that_fits_is_taken(name: str):
    for shape in ((256, 256), (17, 64)):
        assert all(usual(SCHEMES[name], *shape, n_rows) in usual.fitting(SCHEMES[name], *shape) for n_rows in ROWS)


def test_the_survey_is_a_table_of_few_columns():
    rows = [
        {"scheme": name, "rows": n, "product": "int4_groups", "speed": 3.25} for name in ("int8", "int4") for n in ROWS
    ]
    lines = render_survey(rows)
    assert len(lines) == 4
    assert all(len(line) <= 79 for line in lines)
