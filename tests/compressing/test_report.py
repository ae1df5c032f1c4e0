"""The report of a compression: gates, the table, the best file of an unfinished run."""

import json

import pytest

from llmctl.compressing.plans import Plan
from llmctl.compressing.report import best_so_far, frontier, frontier_svg, missed, render
from llmctl.config import ModelConfig

SHAPE = ModelConfig(vocab_size=1000, d_model=64, n_layers=4, n_heads=4, d_ff=128)
PLAN = Plan(600, {"n_layers": 3, "d_ff": 64}, "int8", 3.5, 2_000_000, 0.25, 0.1)


def record(**after: float) -> dict:
    return {
        "size": "2MB",
        "metric": "loss",
        "plan": PLAN.to_dict(),
        "stages": [
            {"stage": "original", "cost": 0.0, "perplexity": 20.0},
            {"stage": "trimmed and pruned", "cost": 0.1},
            {"stage": "result", "cost": 0.2, "perplexity": 24.0},
        ],
        "models": {
            "teacher": {"loss": 3.0, "accuracy": 0.9},
            "after": {"loss": 3.2, "kl": 0.2, "accuracy": 0.8} | after,
        },
        "bytes": 2_000_000,
        "bytes_before": 8_000_000,
    }


@pytest.mark.parametrize(
    ("gate", "is_missed"), [("", False), ("10%", True), ("20%", False), ("3", True), ("4.1", False)]
)
def test_the_gate_compares_perplexities_per_original_token(gate: str, is_missed: bool):
    assert bool(missed(record(), gate)) is is_missed


def test_the_gate_compares_the_metric_of_a_task():
    own = record() | {"metric": "accuracy"}
    assert missed(own, "0.05").startswith("accuracy: 0.8 compressed against 0.9")
    assert not missed(own, "0.11")


def test_the_table_names_the_plan_and_fits_a_terminal():
    lines = render(record(), SHAPE)
    assert lines[0] == "plan: vocabulary 600, layers 3, ffn 64, 3.50 bits, tables int8"
    assert lines[-1] == "2.000 MB of 8.000 MB (25.0%)"
    assert max(map(len, lines)) <= 79


def test_a_size_that_nothing_can_fill_is_named():
    lines = render(record() | {"size": "5MB"}, SHAPE)
    assert lines[-1] == "all layers have the most bits: a larger file would gain nothing"


def test_plans_are_shown_best_first():
    assert frontier([PLAN], SHAPE)[1].split()[:2] == ["2.00", "0.2500"]
    drawn = frontier_svg([PLAN, Plan(1000, {}, "int8", 4.0, 3_000_000, 0.05, 0.01)], 2_000_000)
    assert drawn.count("<circle") == 2
    assert frontier_svg([], 1).startswith("<svg")


def test_the_best_file_of_an_unfinished_run_is_named(tmp_path):
    assert best_so_far(tmp_path) == ""
    for number, cost in ((1, 0.5), (2, 0.25), (3, 0.1)):
        (tmp_path / f"trial-{number}.json").write_text(json.dumps({"cost": cost}))
        if number < 3:
            (tmp_path / f"trial-{number}.safetensors").write_bytes(bytes(20_000))
    assert best_so_far(tmp_path) == f"the best so far: {tmp_path}/trial-2.safetensors, 0.02 MB, cost 0.2500"
