"""Who this process is, from every launcher's environment; half an environment and false promises are refused."""

import pytest

from llmctl.distributed.ranks import Ranks, interface_towards, join, promised_by_accelerate, read_ranks
from llmctl.errors import StoppedError, UsageError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_JOB_ID": "45678",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        (TORCHRUN, Ranks(3, 4, 1, 2)),
        (SLURM, Ranks(1, 2, 0, 1)),
        (OPEN_MPI, Ranks(1, 2, 1, 2)),
        # torchrun inside a Slurm step: the nearer launcher counts
        (TORCHRUN | SLURM, Ranks(3, 4, 1, 2)),
        # the batch script itself, outside srun
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, Ranks()),
    ],
)
def test_every_launcher_is_understood(environment: dict[str, str], expected: Ranks):
    assert read_ranks(environment) == expected


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "`RANK` is 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "x"),
    ],
)
def test_half_an_environment_is_refused(environment: dict[str, str], part: str):
    with pytest.raises(UsageError, match=part):
        read_ranks(environment)


def test_a_slurm_step_gets_torchs_names():
    environment = dict(SLURM) | {"SLURM_STEP_NODELIST": "127.0.0.1"}
    join(environment, parent=[])
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")} == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_PORT": str(20000 + 45678 % 20000),
    }
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"


def test_what_the_user_has_set_stays():
    environment = dict(TORCHRUN) | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth7"}
    join(environment, parent=[])
    assert environment["GLOO_SOCKET_IFNAME"] == "eth7"


def test_accelerates_silent_single_process_is_refused(tmp_path):
    command = ["python", "/usr/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "llmctl", "pretrain"]
    with pytest.raises(UsageError, match="asked for 2 processes") as caught:
        join({}, parent=command)
    assert "--nproc 2" in caught.value.hint
    assert promised_by_accelerate(["accelerate", "launch", "--num_processes=3"], {}) == 3
    config = tmp_path / "config.yaml"
    config.write_text("distributed_type: MULTI_CPU\nnum_processes: 4\n")
    assert promised_by_accelerate(["accelerate", "launch", "--config_file", str(config)], {}) == 4
    assert promised_by_accelerate(["accelerate", "launch", "--num_processes", "1"], {}) == 1
    assert promised_by_accelerate(["bash", "-c", "llmctl pretrain --nproc 2"], {}) == 1
    # With ranks in the environment accelerate has kept its promise.
    assert join(dict(TORCHRUN) | {"MASTER_ADDR": "127.0.0.1"}, parent=command) == Ranks(3, 4, 1, 2)


def test_a_master_without_a_meaning_is_said(monkeypatch):
    with pytest.raises(StoppedError, match=r"nowhere\.invalid"):
        interface_towards("nowhere.invalid")
    assert interface_towards("127.0.0.1") == "lo"
