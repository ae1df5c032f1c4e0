"""Some system calls of a save, killed or failed; `python -m tests.crash.syscalls` takes all of them."""

import shutil
import subprocess

import pytest

from tests.crash.report import report_of


@pytest.fixture
def tracing() -> None:
    """Skip where no process may be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace processes here")


@pytest.mark.usefixtures("tracing")
def test_no_call_of_a_save_can_lose_a_checkpoint():
    report = report_of("syscalls", "--sample", "12")
    assert report["ok"] == report["points"] == 12
