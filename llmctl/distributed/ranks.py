"""This process's rank and world size from the launcher's environment; does not import torch.

torchrun, `accelerate launch`, Kubeflow and dstack set RANK and WORLD_SIZE; the variables of Slurm steps and Open MPI
are translated to these. A launcher that was asked for several processes but started one is an error.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import StoppedError, UsageError

LAUNCHED = "LLMCTL_LAUNCHED"
"""Set by `--nproc`: a file with the path of the run folder, so that restarted processes resume it."""


@dataclass(frozen=True)
class Ranks:
    """Rank and world size, over all hosts and on this host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


SOURCES: tuple[tuple[str, str, str, str], ...] = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def read_ranks(environment: Mapping[str, str]) -> Ranks:
    """Read this process's ranks; a process without a launcher is rank 0 of 1.

    Raises: UsageError for incomplete or invalid variables.
    """
    for rank, world, local_rank, local_world in SOURCES:
        if rank.startswith("SLURM") and "SLURM_STEP_ID" not in environment:
            continue  # the batch script itself, outside srun
        if rank not in environment and world not in environment:
            continue
        try:
            numbers = Ranks(
                int(environment[rank]),
                int(environment[world]),
                int(environment.get(local_rank, "0")),
                int(environment.get(local_world, "1").split(",")[0].split("(")[0]),  # Slurm's form: `2(x3),1`
            )
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"the environment variables `{rank}` and `{world}` are incomplete or invalid: {error}",
                "start with --nproc, torchrun or srun, which set both",
            ) from None
        if not 0 <= numbers.rank < numbers.world_size:
            raise UsageError(
                f"`{rank}` is {numbers.rank}, but `{world}` is {numbers.world_size}", "check the launcher's settings"
            )
        return numbers
    return Ranks()


def is_guest(environment: Mapping[str, str]) -> bool:
    """Tell whether this process is not rank 0, which does all reporting."""
    return read_ranks(environment).rank > 0


def join(environment: MutableMapping[str, str], parent: Sequence[str] | None = None) -> Ranks:
    """Return this process's ranks and complete the environment variables for torch's rendezvous.

    Raises: UsageError if a launcher was asked for several processes but started one; StoppedError if the master's
    host name cannot be resolved.
    """
    if LAUNCHED in environment:
        end_with_parent()
    ranks = read_ranks(environment)
    if ranks.world_size == 1:
        requested = promised_by_accelerate(parent if parent is not None else parent_command(), environment)
        if requested > 1:
            raise UsageError(
                f"`accelerate launch` was asked for {requested} processes but started one",
                f"use llmctl COMMAND --nproc {requested}: accelerate cannot start several processes on a CPU",
            )
        return ranks
    environment["RANK"], environment["WORLD_SIZE"] = str(ranks.rank), str(ranks.world_size)
    environment.setdefault("LOCAL_RANK", str(ranks.local_rank))
    environment.setdefault("LOCAL_WORLD_SIZE", str(ranks.local_world_size))
    if "SLURM_STEP_ID" in environment:
        environment.setdefault("MASTER_ADDR", first_host(environment))
        environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", "29500")
    name = interface_towards(environment["MASTER_ADDR"])
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name:  # by default gloo uses the interface that the host's own name resolves to, often loopback
            environment.setdefault(variable, name)
    return ranks


def end_with_parent() -> None:
    """Request SIGTERM, on which a run saves, if the launcher dies without forwarding a signal."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def tell_launcher(text: str, environment: Mapping[str, str]) -> bool:
    """Leave this process's error message for the launcher to report; return False if there is no launcher.

    When one process dies, all others fail too; only the launcher can tell which of the errors is the cause.
    """
    if LAUNCHED not in environment:
        return False
    with suppress(OSError):
        path = Path(environment[LAUNCHED]).with_name(f"error-{environment.get('LOCAL_RANK', '0')}")
        path.write_text(text, encoding="utf-8")
        return True
    return False  # the launcher has died and its folder is gone


def parent_command() -> list[str]:
    """Return the command line of the parent process, empty if unavailable."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def promised_by_accelerate(parent: Sequence[str], environment: Mapping[str, str]) -> int:
    """Return the number of processes that a parent `accelerate launch` was asked for; 1 if there is none.

    With `--cpu` or a config of type MULTI_CPU, accelerate silently starts one process whatever the number (accelerate
    issue 2741).
    """
    words = [word for item in parent for word in item.split("=", 1)]
    if not any("accelerate" in word for word in words) or "launch" not in words:
        return 1
    for flag in ("--num_processes", "--num-processes"):
        if flag in words[:-1]:
            number = words[words.index(flag) + 1]
            return int(number) if number.isdigit() else 1
    cache = Path(environment.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    path = cache / "accelerate" / "default_config.yaml"
    for flag in ("--config_file", "--config-file"):
        if flag in words[:-1]:
            path = Path(words[words.index(flag) + 1])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 1
    numbers = [line.partition(":")[2].strip() for line in lines if line.startswith("num_processes:")]
    return int(numbers[0]) if numbers and numbers[0].isdigit() else 1


def first_host(environment: Mapping[str, str]) -> str:
    """Return the first host of a Slurm job; `scontrol` expands a list such as `node[1-4]`."""
    hosts = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
    try:
        result = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return result.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return hosts.split(",")[0]


def interface_towards(host: str) -> str | None:
    """Return the network interface on the route to a host, None if unknown.

    Raises: StoppedError if the host's name cannot be resolved.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise StoppedError(
            f"the master's address `{host}` cannot be resolved: {error}", "pass its IP address with --master"
        ) from None
    if family != socket.AF_INET:
        return None
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address)  # a UDP connect sends nothing, but consults the routing table
        except OSError:
            return None
        own = sock.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name[:15].encode())
            try:
                reply = fcntl.ioctl(sock.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(reply[20:24]) == own:
                return name
    return None
