"""`--nproc N` and `--nnodes M`: the same command again in N processes, over torch's elastic launcher.

Ours are the exit codes, which it turns into 1, the report of at most three lines in place of its forty, and that
processes which are started again go on with the run that they had begun. Knows nothing of what is trained.
"""

import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llmctl.engine.ranks import LAUNCHED, interface_towards
from llmctl.errors import UsageError

SHUTDOWN_SECONDS = 120
"""Time that processes have for saving after a signal, before they are killed; torch's own is 30."""

LOST_PEER = 75


@dataclass(frozen=True)
class Layout:
    """How many processes on how many hosts, which host this is, and where they meet."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master: str = ""
    max_restarts: int = 0

    def is_parent(self, environment: Mapping[str, str]) -> bool:
        """Tell whether this process has to start the others.

        Raises: UsageError for a layout that cannot be, or one beside another launcher's.
        """
        if LAUNCHED in environment or (self.nproc == 1 and self.nnodes == 1):
            return False
        if "RANK" in environment:
            raise UsageError(
                "`--nproc` and `--nnodes` start processes, but RANK says that this one was started by a launcher already",
                "leave them away under torchrun, accelerate launch or srun",
            )
        problems = []
        if self.nproc < 1 or self.nnodes < 1:
            problems.append(f"`--nproc {self.nproc} --nnodes {self.nnodes}` must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            problems.append(f"`--node-rank {self.node_rank}` must be from 0 to {self.nnodes - 1}")
        if self.nnodes > 1 and not re.fullmatch(r".+:\d+", self.master):
            problems.append(f"`--master {self.master}` must be HOST:PORT of the host with --node-rank 0")
        if problems:
            raise UsageError("; ".join(problems), "llmctl pretrain --nnodes 2 --node-rank 0 --master 10.0.0.1:29500")
        return True


def relaunch(layout: Layout, argv: Sequence[str]) -> int:
    """Run `llmctl ARGV` in the processes of this host and return the exit code of the one that decides."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("torch", "torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    package = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    with tempfile.TemporaryDirectory(prefix="llmctl-") as folder:
        os.environ[LAUNCHED] = str(Path(folder) / "run")
        old = signal.signal(signal.SIGUSR1, pass_on)
        try:
            elastic_launch(launch_config(layout, folder), sys.executable)("-u", "-P", "-m", "llmctl", *argv)
        except ChildFailedError as error:
            return report(error.failures, Path(folder))
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:
            signal.signal(signal.SIGUSR1, old)
            del os.environ[LAUNCHED]
    return 0


def launch_config(layout: Layout, folder: str) -> Any:
    """Return torch's configuration: a free port on one host; on several, the first one keeps the store.

    Left alone, torch decides by host names who keeps the store, and advertises what they resolve to: often loopback.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    several = layout.nnodes > 1
    configs: dict[str, Any] = {"is_host": layout.node_rank == 0} if several else {}
    return LaunchConfig(
        min_nodes=layout.nnodes,
        max_nodes=layout.nnodes,
        nproc_per_node=layout.nproc,
        run_id="llmctl",
        rdzv_backend="c10d",
        rdzv_endpoint=layout.master if several else "localhost:0",
        rdzv_configs=configs,
        local_addr=own_address(layout.master) if several else "127.0.0.1",
        max_restarts=layout.max_restarts,
        monitor_interval=0.1,
        start_method="spawn",
        # The first process speaks for all; what another one said is shown if it is the one that failed.
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, layout.nproc), Std.ERR)),
    )


def own_address(master: str) -> str:
    """Return the address by which this host is seen from the master."""
    import socket

    host, _, port = master.rpartition(":")
    interface_towards(host)  # raises if the name means nothing
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, int(port)))
        return str(sock.getsockname()[0])


def pass_on(number: int, _: FrameType | None) -> None:
    """Send a signal on to the processes of this host."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for pid in children.read_text().split() if children.is_file() else ():
        with suppress(ProcessLookupError):
            os.kill(int(pid), number)


def report(failures: Mapping[int, Any], folder: Path) -> int:
    """Say in at most three lines which process failed and why, and return its exit code.

    Processes that lost the one that failed, or were stopped for it, are not the cause.
    """
    ordered = sorted(failures.items(), key=lambda item: item[1].timestamp)
    causes = [item for item in ordered if item[1].exitcode not in (LOST_PEER, -signal.SIGTERM, 128 + signal.SIGTERM)]
    rank, failure = (causes or ordered)[0]
    code = int(failure.exitcode)
    lines = []
    if code < 0:
        name = signal.Signals(-code).name
        lines.append(
            f"error: rank {rank} was killed by {name}" + (", perhaps for want of memory" if code == -9 else "")
        )
    elif failure.local_rank == 0 and code != LOST_PEER:
        lines = []  # it has said so itself
    else:
        said = [
            line for path in folder.rglob(f"{failure.local_rank}/stderr.log") for line in path.read_text().splitlines()
        ]
        told = [line for line in said if line.startswith(("error:", "hint:"))][-2:] or said[-2:]
        lines = [f"rank {rank} exited with {code}", *told]
    run = folder / "run"
    if run.is_file() and (code < 0 or code == LOST_PEER):
        lines.append(f"hint: go on from the last checkpoint with --resume {run.read_text().strip()}")
    if lines:
        sys.stderr.write("\n".join(lines[:3]) + "\n")
    return 128 - code if code < 0 else code
