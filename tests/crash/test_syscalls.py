"""Some system calls of a save, killed or failed; `python -m tests.crash.syscalls` takes all of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tracing() -> None:
    """Skip where no process may be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace processes here")


@pytest.mark.usefixtures("tracing")
def test_no_call_of_a_save_can_lose_a_checkpoint():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.crash.syscalls", "--sample", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] == report["points"] == 12
