"""`--nproc N` and `--nnodes M`: run the same command in N processes per host, with torch's elastic launcher.

Added to torch's launcher: the failed process's exit code instead of 1, a report of at most three lines instead of
forty, no restart after permanent errors, and restarted processes resume their run. Knows nothing about training.
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
"""The time processes have to save a checkpoint after a signal before they are killed; torch's default is 30."""


@dataclass(frozen=True)
class Layout:
    """The launch options: processes per host, hosts, this host's number, the rendezvous address, restarts, timeout."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master: str = ""
    max_restarts: int = 0
    timeout_seconds: int = 600

    def is_parent(self, environment: Mapping[str, str]) -> bool:
        """Tell whether this process must launch the others.

        Raises: UsageError for an invalid layout, or if another launcher already started this process.
        """
        options = (self.nproc, self.nnodes, self.node_rank, self.master, self.max_restarts)
        if LAUNCHED in environment or options == (1, 1, 0, "", 0):
            return False
        # One launcher per host under srun is fine; one per task would start the same run several times.
        if "RANK" in environment or (self.nnodes == 1 and read_ranks(environment).world_size > 1):
            raise UsageError(
                "`--nproc`, `--nnodes` and `--max-restarts` start processes, but this process was already started by "
                "a launcher (RANK or a job step is set)",
                "omit them under torchrun, accelerate launch or srun",
            )
        problems = self.problems()
        if problems:
            raise UsageError(
                "; ".join(problems), "for example: llmctl pretrain --nnodes 2 --node-rank 0 --master 10.0.0.1:29500"
            )
        return True

    def problems(self) -> list[str]:
        """Return a message for every invalid option."""
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
    """Run `llmctl ARGV` in this host's processes and return 0, or the exit code of the process that failed first.

    Raises: StoppedError if other hosts do not join or are lost.
    """
    package = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides one warning per connection about unnamed hosts
    # If workers share the agent's store, torch 2.13 keeps the dead processes' addresses in it after a restart, and the
    # new processes wait for them.
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
    """Start the processes, wait for them to end, and report a failure.

    Raises: StoppedError if other hosts do not join or are lost.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api

    for name in ("torch", "torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = launch_config(layout, str(folder))
    # torch has no hook for its agent's behavior: replace the class for the duration of the launch.
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
        message = last_words(folder, 0)  # the error of this host's own process is more specific
        if message:
            sys.stderr.write(message)
            return LOST_PEER
        raise lost_hosts(layout, error, folder) from error
    finally:
        setattr(api, agent, original)
    return 0


def launch_config(layout: Layout, folder: str) -> Any:
    """Return torch's launch configuration: a free port on a single host; with several, host 0 runs the store.

    By default torch decides by host name which host runs the store, and advertises the address that name resolves to,
    often loopback.
    Raises: StoppedError if the master's address cannot be resolved.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    several = layout.nnodes > 1
    waits = {"join_timeout": layout.timeout_seconds, "read_timeout": layout.timeout_seconds}
    configs: dict[str, Any] = {"is_host": layout.node_rank == 0, **waits} if several else {}
    # Signals ignored when this process started (`nohup`, background jobs) stay ignored.
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
        # Only the first process writes to stderr; another one's output is shown if it is the one that failed.
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, layout.nproc), Std.ERR)),
    )


def own_address(master: str) -> str:
    """Return this host's address on the route to the master.

    Raises: StoppedError if there is no route.
    """
    import socket

    host, _, port = master.rpartition(":")
    interface_towards(host)  # raises if the name cannot be resolved
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((host, int(port)))  # a UDP connect sends nothing, but consults the routing table
            return str(sock.getsockname()[0])
    except (OSError, OverflowError) as error:
        raise StoppedError(
            f"there is no route to the master `{master}`: {error}", "pass an IPv4 address that this host can reach"
        ) from None


def pass_on(number: int, _: FrameType | None) -> None:
    """Forward a signal to this host's processes that handle it; it would kill those that are still starting."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for pid in children.read_text().split() if children.is_file() else ():
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)  # bit mask of handled signals
            if caught and int(caught[1], 16) >> (number - 1) & 1:
                os.kill(int(pid), number)


def lost_hosts(layout: Layout, error: Exception, folder: Path) -> StoppedError:
    """Return the error for hosts that did not join or were lost."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    hint = resume_hint(folder).strip().removeprefix("hint: ")
    return StoppedError(
        f"host {layout.node_rank} of {layout.nnodes} cannot reach the other hosts at {layout.master} "
        f"(waited {layout.timeout_seconds} s), or lost them ({reason})",
        hint or "start the same command on all hosts; `llmctl doctor --distributed` checks their connections",
    )
