"""`llmctl doctor`: what it reports, and that a group which is not whole ends with a name and a code, not never."""

import json
import os
import shutil
import socket

import pytest

from llmctl.cli import run
from llmctl.quant.products import PRODUCTS
from tests.support.jobs import LLMCTL, environment, finish, running
from tests.support.warm import WARM

KEYS = {
    "llmctl",
    "python",
    "packages",
    "optional",
    "device",
    "cores",
    "threads",
    "compiled_step",
    "dtype",
    "product_flops",
    "free_memory_bytes",
    "runs_folder",
    "runs_folder_is_writable",
    "free_disk_bytes",
    "products",
}


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def test_a_machine_is_described(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMCTL_NATIVE", "0")  # whatever is compiled on this machine
    monkeypatch.setenv("LLMCTL_RUNS", str(tmp_path / "not" / "yet"))
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS
    assert found["runs_folder"] == str(tmp_path / "not" / "yet")
    assert found["runs_folder_is_writable"]
    assert not (tmp_path / "not").exists(), "looking makes nothing"
    assert set(found["product_flops"]) == {"float32", "bfloat16"}
    assert found["packages"]["torch"]
    assert found["dtype"] in found["product_flops"]
    assert {row["scheme"] for row in found["products"]} - {"bfloat16"} == {"int8", "w8a8", "int4"}
    assert all(row["product"] in PRODUCTS and row["speed"] > 0 for row in found["products"])


def test_a_person_reads_the_same(capsys):
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if not line.startswith(" ") and " is slower than float32 " not in line]
    assert [line.split()[0] for line in titles] == [
        "llmctl",
        "packages",
        "optional",
        "missing",
        "device",
        "precision",
        "compiled",
        "memory",
        "runs",
        "products",
    ]


def test_ranks_meet_and_report(tmp_path):
    done = finish([*WARM, "doctor", "--distributed", "--nproc", "2", "--json"], cwd=tmp_path)
    found = json.loads(done.out)
    assert found["world_size"] == len(found["ranks"]) == 2
    assert {row["host"] for row in found["ranks"]} == {socket.gethostname()}
    assert {row["address"] for row in found["ranks"]} == {"127.0.0.1"}
    assert found["sums_are_right"] == {"float32": True, "float64": True, "int64": True}
    assert found["blind_ranks"] == []
    assert found["clock_offset_seconds"][0] == 0
    assert abs(found["clock_offset_seconds"][1]) < 1, "one clock, read twice"
    assert list(tmp_path.iterdir()) == [], "no probe file is left"


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can give up the right to look"
)
def test_a_folder_that_is_not_shared_is_told(tmp_path):
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
    # Rank 1 may not look into the first one's folder, which is what another host's disk comes to.
    hidden = tmp_path / "0"
    command = [*LLMCTL, "doctor", "--distributed", "--timeout", "60"]
    with (
        running(command, cwd=hidden, env=environment(RANK="0", **world)) as (first,),
        running(
            ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command],
            cwd=tmp_path / "1",
            env=environment(RANK="1", **world),
        ) as (second,),
    ):
        hidden.chmod(0o000)
        assert (first.end(), second.end()) == (2, 2), first.err + second.err
    assert "not shared: rank 1 sees no probe file" in first.out
    assert "error: the runs folder is not shared by all hosts" in first.lines


def test_ranks_that_do_not_come_are_named():
    world = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [*WARM, "doctor", "--distributed", "--timeout", "5"]
    with (
        running(command, env=environment(RANK="0", **world)) as (first,),
        running(command, env=environment(RANK="2", **world)) as (third,),
    ):
        codes = {first.end(), third.end()}
    assert codes == {75}, first.err + third.err
    assert first.lines[0].startswith("error: rank 1 of 3 did not connect to 127.0.0.1:")


def test_a_master_that_is_not_there_is_named():
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = finish([*WARM, "doctor", "--distributed", "--timeout", "1"], code=75, env=environment(RANK="1", **world))
    assert done.lines[0].startswith(
        f"error: rank 1 cannot reach the master's port 127.0.0.1:{world['MASTER_PORT']} within 1 s"
    )
    assert len(done.lines) == 3


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--distributed"], "needs several processes"),
        (["--nproc", "2"], "`--nproc 2 --nnodes 1` needs `--distributed`"),
        (["--timeout", "0"], "`--timeout 0` must be at least 1"),
        (["--distributed", "--nnodes", "2"], "`--master ` must be HOST:PORT"),
    ],
)
def test_wrong_questions(capsys, arguments, part: str):
    assert run(["doctor", *arguments]) == 2
    assert part in capsys.readouterr().err
