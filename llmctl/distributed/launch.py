"""`--nproc N` and `--nnodes M`: the same command again in N processes, over torch's elastic launcher.

Ours are the exit codes, which it turns into 1, the report of at most three lines in place of its forty, that errors
which would come again are not restarted, and that processes which are started again go on with the run that they had
begun. Knows nothing of what is trained.
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

from llmctl.distributed.elastic_agent import agent_class
from llmctl.distributed.failures import LOST_PEER, last_words, report, resume_hint
from llmctl.distributed.ranks import LAUNCHED, interface_towards, read_ranks
from llmctl.errors import StoppedError, UsageError

SHUTDOWN_SECONDS = 120
"""Time that processes have for saving after a signal, before they are killed; torch's own is 30."""


@dataclass(frozen=True)
class Layout:
    """How many processes on how many hosts, which host this is, where they meet, and how long they wait."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master: str = ""
    max_restarts: int = 0
    timeout_seconds: int = 600

    def is_parent(self, environment: Mapping[str, str]) -> bool:
        """Tell whether this process has to start the others.

        Raises: UsageError for a layout that cannot be, or one beside another launcher's.
        """
        asked = (self.nproc, self.nnodes, self.node_rank, self.master, self.max_restarts)
        if LAUNCHED in environment or asked == (1, 1, 0, "", 0):
            return False
        # One launcher per host under srun is fine; one per task would start as many runs of the same name.
        if "RANK" in environment or (self.nnodes == 1 and read_ranks(environment).world_size > 1):
            raise UsageError(
                "`--nproc`, `--nnodes` and `--max-restarts` start processes, but RANK or the job step says that a "
                "launcher has started this one already",
                "leave them away under torchrun, accelerate launch or srun",
            )
        problems = self.problems()
        if problems:
            raise UsageError("; ".join(problems), "llmctl pretrain --nnodes 2 --node-rank 0 --master 10.0.0.1:29500")
        return True

    def problems(self) -> list[str]:
        """Return what is wrong with these numbers by themselves."""
        is_alone = self.nnodes == 1
        checks = [
            (self.nproc < 1, f"`--nproc {self.nproc}` must be at least 1"),
            (self.nnodes < 1, f"`--nnodes {self.nnodes}` must be at least 1"),
            (self.max_restarts < 0, f"`--max-restarts {self.max_restarts}` must be at least 0"),
            (is_alone and bool(self.master), f"`--master {self.master}` needs `--nnodes`, the number of hosts"),
            (is_alone and self.node_rank != 0, f"`--node-rank {self.node_rank}` needs `--nnodes`, the number of hosts"),
            (
                self.nnodes > 1 and not 0 <= self.node_rank < self.nnodes,
                f"`--node-rank {self.node_rank}` must be from 0 to {self.nnodes - 1}",
            ),
            (
                self.nnodes > 1 and not re.fullmatch(r".+:\d+", self.master),
                f"`--master {self.master}` must be HOST:PORT of the host with --node-rank 0",
            ),
        ]
        return [sentence for is_wrong, sentence in checks if is_wrong]


def relaunch(layout: Layout, argv: Sequence[str]) -> int:
    """Run `llmctl ARGV` in the processes of this host and return the exit code of the one that decides.

    Raises: StoppedError if the other hosts do not come, or go.
    """
    package = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings about hosts without names, one per connection
    # Shared with the agent, the store of torch 2.13 still holds the dead processes' addresses after a restart, and the
    # new ones wait for them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="llmctl-", ignore_cleanup_errors=True) as folder:
        os.environ[LAUNCHED] = str(Path(folder) / "run")
        old = signal.signal(signal.SIGUSR1, pass_on)
        try:
            return supervise(layout, argv, Path(folder))
        finally:
            signal.signal(signal.SIGUSR1, old)
            del os.environ[LAUNCHED]


def supervise(layout: Layout, argv: Sequence[str], folder: Path) -> int:
    """Start the processes, wait for their end, and report it.

    Raises: StoppedError if the other hosts do not come, or go.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api

    for name in ("torch", "torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = launch_config(layout, str(folder))
    agent = "LocalElasticAgent"
    original = getattr(api, agent)
    setattr(api, agent, agent_class(original, folder, layout.timeout_seconds))
    try:
        api.elastic_launch(config, sys.executable)("-u", "-P", "-m", "llmctl", *argv)
    except ChildFailedError as error:
        return report(error.failures, folder)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        sys.stderr.write(last_words(folder, 0) or f"error: stopped by {name} before the first step\n")
        return 128 + int(error.sigval)
    except (RendezvousError, DistError) as error:
        said = last_words(folder, 0)  # why this host's own processes ended says more
        if said:
            sys.stderr.write(said)
            return LOST_PEER
        raise lost_hosts(layout, error, folder) from error
    finally:
        setattr(api, agent, original)
    return 0


def launch_config(layout: Layout, folder: str) -> Any:
    """Return torch's configuration: a free port on one host; on several, the first one keeps the store.

    Left alone, torch decides by host names who keeps the store, and advertises what they resolve to: often loopback.
    Raises: StoppedError if the master's address means nothing here.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    several = layout.nnodes > 1
    waits = {"join_timeout": layout.timeout_seconds, "read_timeout": layout.timeout_seconds}
    configs: dict[str, Any] = {"is_host": layout.node_rank == 0, **waits} if several else {}
    # What was ignored when this process began (`nohup`, a job in the background) stays ignored.
    signals = [
        name for name in ("SIGTERM", "SIGINT", "SIGHUP") if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN
    ]
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
        signals_to_handle=",".join(signals),
        # The first process speaks for all; what another one said is shown if it is the one that failed.
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, layout.nproc), Std.ERR)),
    )


def own_address(master: str) -> str:
    """Return the address by which this host is seen from the master.

    Raises: StoppedError if there is no way to it.
    """
    import socket

    host, _, port = master.rpartition(":")
    interface_towards(host)  # raises if the name means nothing
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((host, int(port)))  # sends nothing; asks the routing table
            return str(sock.getsockname()[0])
    except (OSError, OverflowError) as error:
        raise StoppedError(
            f"there is no way to the master `{master}`: {error}", "give an IPv4 address that this host can reach"
        ) from None


def pass_on(number: int, _: FrameType | None) -> None:
    """Send a signal on to those processes of this host that heed it; the others, still loading, it would end."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for pid in children.read_text().split() if children.is_file() else ():
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
            if caught and int(caught[1], 16) >> (number - 1) & 1:
                os.kill(int(pid), number)


def lost_hosts(layout: Layout, error: Exception, folder: Path) -> StoppedError:
    """Return the error for hosts that did not come or went away."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    hint = resume_hint(folder).strip().removeprefix("hint: ")
    return StoppedError(
        f"host {layout.node_rank} of {layout.nnodes} does not reach the others at {layout.master} "
        f"within {layout.timeout_seconds} s, or no longer ({reason})",
        hint or "start the same command on all hosts; llmctl doctor --distributed checks who reaches whom",
    )
