"""Figures are quotients of sums; the metrics file survives a kill; the pictures show what they should."""

import json
import math
from xml.etree import ElementTree as ET

import pytest

from llmctl.metrics.figures import Sums, brief, rounded, shown
from llmctl.runs.loss_curve import loss_svg, sparkline
from llmctl.runs.metrics_file import MetricsFile


def test_figures_of_a_sum_are_not_averages_of_figures():
    many, few = Sums(100.0, 100, 300, 10), Sums(30.0, 10, 20, 9)
    figures = (many + few).figures()
    assert figures["loss"] == pytest.approx(130 / 110)
    assert figures["bits_per_byte"] == pytest.approx(130 / math.log(2) / 320)
    assert figures["perplexity"] == pytest.approx(math.exp(130 / 110))
    assert figures["accuracy"] == pytest.approx(19 / 110)


def test_a_uniform_guess_over_bytes_costs_eight_bits_per_byte():
    assert Sums(1000 * math.log(256), 1000, 1000, 0).figures()["bits_per_byte"] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.345, "12.3"),
        (9_999_999.0, "9999999.0"),
        (1.234e130, "1.2e+130"),
        (math.exp(700), "1.0e+304"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (None, "-"),
    ],
)
def test_a_number_fits_into_a_line(value, text):
    assert shown(value, ".1f") == text
    assert brief({"perplexity": value}) == f"perplexity {text}"


def test_nothing_measured_is_not_a_number_and_no_crash():
    assert math.isnan(Sums().figures()["bits_per_byte"])
    assert json.loads(json.dumps(rounded(Sums().figures())))["bits_per_byte"] is None


def test_a_half_written_last_line_is_passed_over(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append({"step": step, "loss": 1 / step})
    with file.path.open("a") as raw:
        raw.write('{"step": 4, "lo')
    assert [line["step"] for line in file.read()] == [1, 2, 3]
    file.cut_after(2, 2)
    assert [line["step"] for line in file.read()] == [1, 2]


def test_a_sparkline_rises_and_falls_and_has_an_ascii_form():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3, 3]) == "▁▁▁"
    assert sparkline([]) == ""
    assert sparkline([1, math.nan, 2], ascii_only=True).isascii()


def test_the_loss_picture_is_well_formed_whatever_the_series():
    for train, held_out in ([], []), ([(1, 2.0)], []), ([(1, 2.0), (9, 1.0)], [(0, 3.0), (9, 1.5)]):
        root = ET.fromstring(loss_svg(train, held_out))
        assert root.tag.endswith("svg")
        circles = [element for element in root.iter() if element.tag.endswith("circle")]
        assert len(circles) == len(held_out)


def test_the_closing_evaluation_of_a_run_that_ended_too_early_is_made_again(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step, full in ((0, True), (4, False), (8, False), (8, True)):
        file.append({"kind": "eval", "step": step, "full": full})
    file.cut_after(8, 8)
    assert [(line["step"], line["full"]) for line in file.read()] == [(0, True), (4, False), (8, False)]
