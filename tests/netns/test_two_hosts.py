"""Two hosts on one, as far as the network is concerned; see two_hosts.py for what happens to them."""

import os
import shutil
import subprocess

import pytest

from tests.netns.two_hosts import VARIANTS, Log, Trial, two_hosts


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "lmprobe"], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "del", "lmprobe"], check=False, capture_output=True)
    return made.returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces need root and `ip`"),
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    return Trial(tmp_path_factory.mktemp("hosts"))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_hosts(trial: Trial, name: str):
    with two_hosts():
        getattr(trial, name)(Log(name))
