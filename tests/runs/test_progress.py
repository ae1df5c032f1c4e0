"""What people are told while they wait."""

from llmctl.runs import progress
from llmctl.runs.progress import paced


def test_how_far_something_has_come_is_said_not_too_often(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    done = paced(said.append, "layer", 10)
    for number in range(1, 11):
        now[0] += 2.0
        done(number)
    assert said == [f"layer {number} of 10, eta 0:{20 - 2 * number:02d}" for number in range(2, 11, 2)]


def test_what_is_over_soon_is_not_mentioned():
    said: list[str] = []
    done = paced(said.append, "layer", 3)
    for number in range(1, 4):
        done(number)
    assert said == []


def test_the_time_left_is_within_fifty_columns():
    record = {
        "step": 12_345,
        "loss": 2.345,
        "lr": 1e-3,
        "tokens_per_second": 1e5,
        "memory_bytes": 2**30,
        "utilization": 0.3,
    }
    assert "eta 1:02:03" in progress.describe(record, 100_000, 3723.0)[:50]
