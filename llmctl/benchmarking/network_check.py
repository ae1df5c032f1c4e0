"""Check the network between ranks: roll call, all-reduce, clocks, and the shared runs folder.

Ranks register in the master's store first, so that missing ones can be named; then they connect exactly as training does.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from llmctl import __version__
from llmctl.benchmarking.doctor import existing
from llmctl.config import ParallelConfig, TrainConfig
from llmctl.distributed.ranks import Ranks, interface_towards, join
from llmctl.distributed.runtime import Runtime, is_lost_peer, start
from llmctl.errors import StoppedError, UsageError
from llmctl.files import is_seen
from llmctl.runs.folder import runs_folder

PROBE_SECONDS = 3.0
"""Maximum delay until a file is visible on the other hosts."""


@dataclass(frozen=True)
class Group:
    """Layout of the processes: per host, number of hosts, this host, and HOST:PORT of the master."""

    nproc: int
    nnodes: int
    node_rank: int
    master: str


def start_ranks(group: Group, argv: Sequence[str]) -> int:
    """Run `llmctl ARGV` once per rank of this host and return the highest exit code.

    torch's launcher is not used: its rendezvous does not report which host is missing.
    """
    host, _, port = group.master.rpartition(":") if group.nnodes > 1 else ("127.0.0.1", "", str(free_port()))
    environment = os.environ | {
        "WORLD_SIZE": str(group.nproc * group.nnodes),
        "LOCAL_WORLD_SIZE": str(group.nproc),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    command = [sys.executable, "-P", "-m", "llmctl", *argv]
    ranks = []
    for local_rank in range(group.nproc):
        rank = {"RANK": str(group.node_rank * group.nproc + local_rank), "LOCAL_RANK": str(local_rank)}
        ranks.append(subprocess.Popen(command, env=environment | rank))
    try:
        codes = [process.wait() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return max(128 - code if code < 0 else code for code in codes)


def free_port() -> int:
    """Return a free port of this host."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def examine_group(timeout_seconds: int) -> tuple[Runtime, dict[str, Any]]:
    """Connect to the other ranks and return a record of the ranks and of the network between them.

    Raises: UsageError for a single process; StoppedError naming what is missing after the timeout.
    """
    ranks = join(os.environ)
    if ranks.world_size == 1:
        raise UsageError("`--distributed` needs several processes, got 1", "add `--nproc 2`, or use torchrun or srun")
    store = roll_call(ranks, timeout_seconds)
    runtime = start(TrainConfig(), ParallelConfig(timeout_seconds=timeout_seconds))
    try:
        report = measure_group(runtime)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        reason = str(error).strip().splitlines()[-1][:160]
        raise StoppedError(
            f"rank {ranks.rank} lost the connection to another rank ({reason})", "see the error of that rank"
        ) from error
    del store  # keep the server alive until torch has connected
    return runtime, report


def measure_group(runtime: Runtime) -> dict[str, Any]:
    """Return a record of the connected ranks and the results of the network checks."""
    rows = runtime.gather(describe_self())
    return {
        "world_size": runtime.world_size,
        "master": f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        "ranks": rows,
        "sums_are_right": {name: sums_are_right(runtime, name) for name in ("float32", "float64", "int64")},
        "sum_4_mib_milliseconds": runtime.probe(),
        "clock_offset_seconds": clock_offsets(runtime),
        "blind_ranks": blind_ranks(runtime),
    }


def roll_call(ranks: Ranks, timeout_seconds: int) -> Any:
    """Register in the master's store, wait for all ranks, and return the store.

    Raises: StoppedError naming the master if it cannot be reached, else the ranks that are missing at the timeout.
    """
    from torch._C._distributed_c10d import PrefixStore, TCPStore
    from torch.distributed import DistError

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout_seconds
    is_server = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    wait = timedelta(seconds=timeout_seconds)
    try:
        if not is_server:
            await_port(host, port, deadline)
        # torch's own rendezvous opens the same port in this process again, which multi_tenant allows.
        server = TCPStore(host, port, None, is_server, wait, wait_for_workers=False, multi_tenant=True)
        store = PrefixStore("llmctl/doctor", server)
        store.set(str(ranks.rank), socket.gethostname())
        missing = list(range(ranks.world_size))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([str(rank)])]
            time.sleep(0.05 if missing else 0)
    except (DistError, OSError, RuntimeError, ValueError) as error:
        what = "cannot open" if is_server else "cannot reach"
        raise StoppedError(
            f"rank {ranks.rank} {what} the master's port {host}:{port} within {timeout_seconds} s "
            f"({(str(error).strip() or type(error).__name__).splitlines()[0][:120]})",
            "check that rank 0 is running, that this is its address, and that no firewall blocks the port",
        ) from error
    if missing:
        names = ", ".join(map(str, missing))
        raise StoppedError(
            f"rank {names} of {ranks.world_size} did not connect to {host}:{port} within {timeout_seconds} s",
            "start the command on every host, and check the errors of those ranks",
        )
    return server


def await_port(host: str, port: int, deadline: float) -> None:
    """Wait until a port is open; torch would wait too, but print long stack traces.

    Raises: OSError if it stays closed until the deadline.
    """
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
        else:
            return


def describe_self() -> dict[str, Any]:
    """Return this rank's host, its network interface towards the master, and its versions."""
    master = os.environ["MASTER_ADDR"]
    address = None
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((master, 1))  # UDP connect sends nothing: it only queries the routing table
        address = sock.getsockname()[0]
    return {
        "host": socket.gethostname(),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME") or interface_towards(master),
        "address": address,
        "llmctl": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def sums_are_right(runtime: Runtime, dtype: str) -> bool:
    """Return whether all-reduce gives the exact sum on every process, in all elements of a tensor."""
    elements = torch.arange(1000, dtype=getattr(torch, dtype), device=runtime.device)
    total = runtime.sum(elements * (runtime.rank + 1))
    factor = runtime.world_size * (runtime.world_size + 1) // 2
    return all(runtime.gather(torch.equal(total, elements * factor)))


def clock_offsets(runtime: Runtime) -> list[float]:
    """Return how many seconds every clock is ahead of rank 0's, to the precision of a barrier."""
    rounds = []
    for _ in range(5):
        runtime.gather(None)  # a barrier: all leave it at nearly the same time
        times = runtime.gather(time.time())
        rounds.append([moment - times[0] for moment in times])
    return [statistics.median(offsets) for offsets in zip(*rounds, strict=True)]


def blind_ranks(runtime: Runtime) -> list[int]:
    """Return the ranks that do not see a file written by rank 0 into the runs folder."""
    folder = runs_folder().resolve()
    path = Path(runtime.first(str(existing(folder) / f".llmctl-doctor-{uuid.uuid4().hex}")))
    problem = ""
    if runtime.is_main:
        try:
            path.write_text(path.name, encoding="utf-8")
        except OSError as error:
            problem = str(error)
    problem = runtime.first(problem)
    deadline = time.monotonic() + (0 if problem else PROBE_SECONDS)
    while not (sees := is_seen(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = runtime.gather(sees)
    if runtime.is_main:
        path.unlink(missing_ok=True)
    return [rank for rank, sees in enumerate(seen) if not sees]


def render_group(record: Mapping[str, Any]) -> list[str]:
    """Return the report on a group of ranks as lines."""
    lines = [f"ranks      {record['world_size']} connected at {record['master']}"]
    for rank, row in enumerate(record["ranks"]):
        ahead = 1000 * record["clock_offset_seconds"][rank]
        lines.append(
            f"  rank {rank:<4} {row['host']}, {row['interface']} {row['address']}, torch {row['torch']}, "
            f"{row['threads']} threads, clock {ahead:+.0f} ms"
        )
    sums = ", ".join(
        f"{name} {'correct' if correct else 'WRONG'}" for name, correct in record["sums_are_right"].items()
    )
    blind = record["blind_ranks"]
    return [
        *lines,
        f"sums       {sums}; 4 MiB in {record['sum_4_mib_milliseconds']:.0f} ms",
        "runs       " + (f"not shared: rank {', '.join(map(str, blind))} sees no probe file" if blind else "shared"),
    ]
