"""Several processes are one: the losses, the weights and the checkpoints of 2, 3 and 4 are those of 1."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.warm import WARM, Process

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, world_size: int, jobs: list[dict]) -> dict:
    """Run jobs of ranks_job.py in this many processes and return what the first one wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [*WARM, "-m", "tests.support.ranks_job", str(folder), json.dumps(jobs)]
    processes, logs = [], [folder / f"rank-{rank}.log" for rank in range(world_size)]
    for rank in range(world_size):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if world_size > 1:
            environment |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        with logs[rank].open("w") as log:
            processes.append(
                Process(command, stdin=subprocess.DEVNULL, stdout=log.fileno(), stderr=log.fileno(), env=environment)
            )
    codes = [process.wait(240) for process in processes]
    assert codes == [0] * world_size, "\n".join(log.read_text() for log in logs)
    return json.loads((folder / "results.json").read_text())


def jobs(*names: str) -> list[dict]:
    return [{"name": name} for name in names]


SAME_LOSSES = ["float64", "float64-uneven", "float64-micro", "float64-masked", "fsdp", "fsdp-muon", "fsdp-uneven"]
SAME_BITS = ["deterministic", "deterministic-uneven"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict]:
    """What 1, 2 and 4 processes make of every scenario."""
    base = tmp_path_factory.mktemp("ranks")
    every = jobs(*SAME_LOSSES, *SAME_BITS, "float32", "accumulate", "float64-muon")
    found = {world_size: start(base / str(world_size), world_size, every) for world_size in (1, 2)}
    found[4] = start(base / "4", 4, jobs("float64", "fsdp", *SAME_BITS))
    return found


def relative(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) > 0
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", SAME_LOSSES)
def test_two_processes_have_the_losses_of_one_in_float64(results, name: str):
    assert relative(results[1][name]["losses"], results[2][name]["losses"]) < 1e-12
    assert results[1][name]["tokens"] == results[2][name]["tokens"]
    assert results[1][name]["after"]["loss"] == pytest.approx(results[2][name]["after"]["loss"], rel=1e-12)


@pytest.mark.parametrize("name", ["float64", "fsdp"])
def test_four_processes_have_the_losses_of_one(results, name: str):
    assert relative(results[1][name]["losses"], results[4][name]["losses"]) < 1e-12


@pytest.mark.parametrize(("plain", "sharded"), [("float64", "fsdp"), ("float64-muon", "fsdp-muon")])
def test_sharded_weights_have_the_losses_of_whole_ones(results, plain: str, sharded: str):
    assert relative(results[2][plain]["losses"], results[2][sharded]["losses"]) < 1e-12


def test_two_hundred_steps_in_float32_stay_close(results):
    assert len(results[2]["float32"]["losses"]) == 200
    assert relative(results[1]["float32"]["losses"], results[2]["float32"]["losses"]) < 1e-5


def test_two_micro_batches_on_one_process_are_two_processes_bit_for_bit(results):
    assert results[1]["accumulate"]["losses"] == results[2]["accumulate"]["losses"]
    assert results[1]["accumulate"]["sha256"] == results[2]["accumulate"]["sha256"]


@pytest.mark.parametrize("name", SAME_BITS)
def test_deterministic_weights_do_not_depend_on_the_number_of_processes(results, name: str):
    assert {results[n][name]["threads"] for n in (1, 2, 4)} == {1}
    assert len({results[n][name]["sha256"] for n in (1, 2, 4)}) == 1
    assert results[1][name]["losses"] == results[2][name]["losses"] == results[4][name]["losses"]


def test_evaluation_sums_are_exact(results):
    # The same weights are measured before the first step, by other processes on other shares of the text.
    for name in SAME_BITS:
        assert results[1][name]["before"] == results[2][name]["before"] == results[4][name]["before"]
        assert results[1][name]["after"] == results[2][name]["after"] == results[4][name]["after"]


@pytest.mark.parametrize("name", ["deterministic", "fsdp-muon"])
def test_a_checkpoint_of_two_processes_opens_on_one_and_on_three(results, tmp_path, name: str):
    import shutil

    stopped = start(tmp_path / "two", 2, [{"name": name, "stop_after": 6}])
    assert stopped[name]["stopped"] == 6
    for world_size in (1, 3) if name != "deterministic" else (1, 4):
        folder = tmp_path / str(world_size)
        shutil.copytree(tmp_path / "two", folder)
        resumed = start(folder, world_size, jobs(name))
        joined = stopped[name]["losses"] + resumed[name]["losses"]
        if name == "deterministic":
            assert joined == results[1][name]["losses"]
            assert resumed[name]["sha256"] == results[1][name]["sha256"]
        else:
            assert relative(results[1][name]["losses"], joined) < 1e-12
            assert len(list((tmp_path / "two" / name / "checkpoints").glob("*/model-*-of-00002.safetensors"))) >= 2
