"""SIGKILL at random moments, a few; `python -m tests.crash.kill` does hundreds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("trials", "ranks"), [(6, 1), (2, 2)])
def test_a_killed_run_is_resumed_to_the_same_bits(trials: int, ranks: int):
    # A process of its own: one that pytest has made threads in must not be forked.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.crash.kill", "--trials", str(trials), "--ranks", str(ranks)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] == trials
    assert report["kills"] > 0
