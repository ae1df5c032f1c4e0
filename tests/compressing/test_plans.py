"""Plans under a size: all combinations, the cheapest of them, and sizes that none reaches."""

import math
from itertools import product

import pytest

from llmctl.compressing.plans import Plan, Point, Room, Sensitivity, combined, find_plans, fractions
from llmctl.config import ModelConfig
from llmctl.errors import UsageError

SHAPE = ModelConfig(vocab_size=1000, d_model=64, n_layers=4, n_heads=4, d_ff=128, max_positions=64)
TABLE_BITS = {"int8": 8, "int4": 4}


def measured() -> Sensitivity:
    return Sensitivity(
        1000,
        3.0,
        {1000: 0.0, 600: 0.01, 300: 0.2},
        {"layers": [Point({"n_layers": 3}, 0.1), Point({"n_layers": 2}, 0.4)], "ffn": [Point({"d_ff": 64}, 0.05)]},
        {"int8": 0.001, "int4": 0.02},
        [(2.0, 3.0), (3.0, 0.6), (4.0, 0.1), (8.0, 0.001)],
        {},
    )


def rooms(size: int):
    def room_of(shape: ModelConfig, table: str) -> Room:
        n_weights = shape.n_layers * (4 * 64 * 64 + 3 * 64 * shape.d_ff)
        rest = shape.vocab_size * 64 * TABLE_BITS[table] // 8
        return Room(8 * (size - rest) / n_weights, 2.0, 8.0, n_weights, rest)

    return room_of


def brute_force(size: int) -> float:
    """Return the least predicted cost of everything that fits."""
    found, known = [], measured()
    whole = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    layers = [({}, 0.0), ({"n_layers": 3}, 0.1), ({"n_layers": 2}, 0.4)]
    widths = [({}, 0.0), ({"d_ff": 64}, 0.05)]
    for (words, vocabulary), (depth, first), (width, second), table in product(
        known.vocabulary.items(), layers, widths, TABLE_BITS
    ):
        n_weights = depth.get("n_layers", 4) * (4 * 64 * 64 + 3 * 64 * width.get("d_ff", 128))
        bits = min(8.0, 8 * (size - words * 64 * TABLE_BITS[table] // 8) / n_weights)
        if bits >= 2:
            cost = vocabulary + first + second + known.tables[table]
            found.append(cost + 0.4 * known.bits_cost(bits) * n_weights / whole)
    return min(found)


@pytest.mark.parametrize("size", [180_000, 120_000, 90_000, 60_000, 40_000])
def test_the_first_plan_is_the_cheapest_of_all_that_fit(size: int):
    plans = find_plans(SHAPE, measured(), rooms(size), size)
    assert plans[0].predicted == pytest.approx(brute_force(size))
    assert [plan.predicted for plan in plans] == sorted(plan.predicted for plan in plans)
    assert all(plan.n_bytes <= size for plan in plans)
    assert len({plan.structure for plan in plans}) == len(plans)


def test_more_bytes_are_as_a_larger_size():
    first = find_plans(SHAPE, measured(), rooms(60_000), 60_000, more_bytes=30_000)
    other = find_plans(SHAPE, measured(), rooms(90_000), 90_000)
    assert [plan.structure for plan in first] == [plan.structure for plan in other]
    assert first[0].predicted == pytest.approx(other[0].predicted)


def test_a_size_that_nothing_reaches_is_refused_with_the_smallest():
    with pytest.raises(UsageError, match=r"cannot be compressed to 0\.005 MB") as error:
        find_plans(SHAPE, measured(), rooms(5000), 5000)
    smallest = float(error.value.hint.split()[-2])
    assert find_plans(SHAPE, measured(), rooms(round(smallest * 1e6)), round(smallest * 1e6))
    with pytest.raises(UsageError):
        find_plans(SHAPE, measured(), rooms(round(smallest * 1e6) - 1100), round(smallest * 1e6) - 1100)


def test_levers_that_set_the_same_size_are_not_combined():
    levers = {"ffn": [Point({"d_ff": 64}, 1.0)], "dim": [Point({"d_model": 32, "d_ff": 64}, 2.0)]}
    assert [(point.changes, point.cost) for point in combined(levers)] == [
        ({}, 0.0),
        ({"d_model": 32, "d_ff": 64}, 2.0),
        ({"d_ff": 64}, 1.0),
    ]


def test_the_cost_of_bits_is_interpolated_and_constant_beyond_its_ends():
    known = measured()
    assert known.bits_cost(3.5) == pytest.approx(0.35)
    assert known.bits_cost(1.0) == 3.0
    assert known.bits_cost(9.0) == 0.001
    assert known.bits_cost(4.0) == pytest.approx(0.1)


def test_records_are_read_as_they_were_written():
    known = measured()
    assert Sensitivity.from_dict(known.to_dict()) == known
    plan = find_plans(SHAPE, known, rooms(60_000), 60_000)[0]
    assert Plan(**plan.to_dict()) == plan
    assert math.isfinite(plan.predicted)


def test_fractions_are_distinct_and_smaller():
    assert fractions(4, (0.9, 0.8, 0.5, 0.1)) == [3, 2, 1]
    assert fractions(128, (0.9, 0.75, 0.5), 32) == [96, 64]
