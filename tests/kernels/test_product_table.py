"""What was measured is kept, per machine; a damaged file or a folder that cannot be written only costs time."""

import json
from collections import Counter

import pytest
import torch

from llmctl.kernels import product_table as products
from llmctl.kernels.product_table import (
    MOST_MEASUREMENTS,
    Entry,
    Measured,
    is_doubtful,
    measure,
    products_path,
    random_layer,
    render_survey,
)
from llmctl.quant import products as quant_products
from llmctl.quant.products import PRODUCTS, ROWS, Kind, counted_as, plain, usual
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
    ((problem, (times, *_)),) = problems.items()
    assert problem == "4-bit group 32 zeros inputs 0 512x256 1"
    own = {product: seconds for product, seconds in times.items() if product in PRODUCTS}
    assert own[name] == min(own.values())
    # What the file says is believed: nothing is measured twice.
    slowest = max(own, key=own.__getitem__)
    products_path().write_text(json.dumps({table.machine: {problem: [{**own, slowest: 1e-9}, 1, False]}}))
    assert Measured()(SCHEMES["int4"], 320, 256, 1) == slowest


INT4 = "4-bit group 32 zeros inputs 0 256x256"


def stored(table: Measured, **entries: list) -> None:
    """Write entries of 4-bit problems by number of rows."""
    content = {f"{INT4} {key.removeprefix('rows')}": entry for key, entry in entries.items()}
    products_path().write_text(json.dumps({table.machine: content}))


def test_what_was_disturbed_is_measured_again_by_the_next_process(monkeypatch):
    monkeypatch.setattr(products, "measure", lambda *_: Entry({"plain": 3.0, "unpacked": 2.0}))
    stored(Measured(), rows1=[{"plain": 1.0, "narrow": 4.0}, 1, True])
    # The minimum counts of both, and the entry is good then.
    assert Measured()(SCHEMES["int4"], 256, 256, 1) == "plain"
    entry = json.loads(products_path().read_text())[Measured().machine][f"{INT4} 1"]
    assert entry == [{"plain": 1.0, "narrow": 4.0, "unpacked": 2.0}, 2, False]


def test_few_rows_that_took_longer_than_more_are_measured_again(monkeypatch):
    measured: Counter[int] = Counter()

    def measure(_table, _scheme, _n_out, _n_in, n_rows: int) -> Entry:
        measured[n_rows] += 1
        return Entry({"plain": 12.0, "unpacked": 5.0})

    monkeypatch.setattr(products, "measure", measure)
    stored(
        Measured(),
        rows64=[{"plain": 11.6, "unpacked": 14.1}, 1, False],
        rows256=[{"plain": 20.0, "unpacked": 10.0}, 1, False],
    )
    table = Measured()
    for _ in range(2):  # once in a process
        assert table(SCHEMES["int4"], 256, 256, 256) == "unpacked"
        assert table(SCHEMES["int4"], 256, 256, 64) == "unpacked"
    assert measured == {64: 1}


def test_no_problem_is_measured_for_ever():
    slow, fast = Entry({"plain": 3.0}, MOST_MEASUREMENTS - 1), Entry({"plain": 1.0}, 1)
    assert is_doubtful(slow, [fast])
    assert not is_doubtful(slow.joined(slow), [fast])
    assert not is_doubtful(fast, [slow])


def test_the_fastest_product_may_not_be_missing_with_few_rows():
    few = Entry({"plain": 3.0, "float32": 0.5})
    assert is_doubtful(few, [Entry({"unpacked": 1.0, "float32": 2.0})])
    assert not is_doubtful(few, [Entry({"unpacked": 3.0, "float32": 2.0})])
    assert not is_doubtful(few, [Entry({"float32": 2.0, "bfloat16": 0.1, "unpacked": 4.0})])


def test_a_measurement_does_not_undo_a_better_one_of_another_process(monkeypatch):
    monkeypatch.setattr(products, "measure", lambda *_: Entry({"plain": 1.0, "unpacked": 3.0}))
    table = Measured(again=True)
    stored(table, rows1=[{"unpacked": 2.0}, 1, False])
    assert table(SCHEMES["int4"], 256, 256, 1) == "plain"
    entry = json.loads(products_path().read_text())[table.machine][f"{INT4} 1"]
    assert entry == [{"plain": 1.0, "unpacked": 2.0}, 2, False]


def test_a_wrong_product_is_not_taken(monkeypatch):
    wrong = {name: kind for name, kind in PRODUCTS.items() if name != "int4_groups"}
    kind = PRODUCTS["int4_groups"]
    wrong["int4_groups"] = type(kind)(lambda layer: lambda x: 1.1 * plain(layer)(x), kind.fits)
    monkeypatch.setattr(products, "PRODUCTS", wrong)
    assert "int4_groups" not in measure(Measured(), SCHEMES["int4"], 256, 256, 1).seconds


@pytest.mark.parametrize("n_rows", [1, 64])
def test_rounded_inputs_have_products_in_float32_to_choose_from(n_rows: int):
    seconds = measure(Measured(), SCHEMES["w8a8"], 256, 256, n_rows).seconds
    assert {"plain", "unpacked", "float32"} <= set(seconds)


@pytest.mark.parametrize("has_bfloat16_scales", [True, False])
def test_rounded_inputs_are_exact_in_the_kernel_for_few_rows(has_bfloat16_scales: bool):
    layer = random_layer(SCHEMES["w8a8"], 96, 256, torch.Generator().manual_seed(0))
    if not has_bfloat16_scales:
        layer.weight_scale = layer.weight_scale.float() * 1.001
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 5)[:, None]
    found, expected = PRODUCTS["int8_rows"].make(layer)(x), plain(layer)(x)
    assert found.dtype == torch.float32
    # Only the result is rounded to bfloat16.
    assert ((found - expected).norm(dim=-1) < 2**-8 * expected.norm(dim=-1)).all()


def test_a_product_that_is_far_behind_with_few_rows_is_not_tried_with_all(monkeypatch):
    rows: Counter[int] = Counter()

    def make(layer):
        product = plain(layer)

        def slow(x):
            rows[len(x)] += 1
            for _ in range(200):
                product(x)
            return product(x)

        return slow

    monkeypatch.setattr(products, "PRODUCTS", {**PRODUCTS, "slow": Kind(make, lambda *_: True)})
    assert "slow" not in measure(Measured(), SCHEMES["int8"], 256, 256, 64).seconds
    assert rows == {1: 2}


@pytest.mark.parametrize("is_fast", [True, False])
def test_bfloat16_takes_part_where_the_cpu_has_it(monkeypatch, is_fast: bool):
    monkeypatch.setattr(products, "is_native", lambda _: is_fast)
    products.references.cache_clear()
    tried: set[str] = set()
    kind = PRODUCTS["narrow"]
    narrow = Kind(lambda layer: tried.add("narrow") or kind.make(layer), kind.fits)
    monkeypatch.setattr(products, "PRODUCTS", {**PRODUCTS, "narrow": narrow})
    assert ("bfloat16" in measure(Measured(), SCHEMES["int8"], 256, 256, 4).seconds) == is_fast
    assert bool(tried) == is_fast
    products.references.cache_clear()


@pytest.mark.parametrize(
    ("has", "n_rows", "name"), [(True, 64, "int8_both"), (False, 64, "unpacked"), (False, 1, "int8_rows")]
)
def test_without_instructions_for_int8_the_usual_product_is_another(monkeypatch, has: bool, n_rows: int, name: str):
    monkeypatch.setattr(quant_products, "has_int8_products", lambda: has)
    assert usual(SCHEMES["w8a8"], 256, 256, n_rows) == name


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"a": 1}', '{"a": {"b": {"plain": 0.5}}}', '{"a": {"b": [{"plain": "fast"}, 1, false]}}'],
)
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


def test_the_survey_says_what_is_slower_than_float32():
    rows = [{"scheme": "w8a8", "rows": n, "product": "unpacked", "speed": 1.0 if n > 4 else 0.7} for n in ROWS]
    assert render_survey(rows)[-1] == "w8a8 is slower than float32 on this machine with 1, 4 rows"
