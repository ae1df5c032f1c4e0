"""SIGKILL at random moments, a few; `python -m tests.crash.kill` does hundreds."""

import pytest

from tests.crash.report import report_of


@pytest.mark.parametrize(("trials", "ranks"), [(4, 1), (1, 2)])
def test_a_killed_run_is_resumed_to_the_same_bits(trials: int, ranks: int):
    report = report_of("kill", "--trials", str(trials), "--ranks", str(ranks))
    assert report["ok"] == trials
    assert report["kills"] > 0
