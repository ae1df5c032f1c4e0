"""Two network namespaces, joined by a cable, act as two hosts that train one model, lose each other, and go on.

usage: python -m tests.netns.two_hosts [VARIANT ...]   as root, with `ip` of iproute2; without a variant, all of them

  equal      both hosts finish: the weights are those of one process
  killed     every process of host 1 is killed in mid-run; host 0 ends with 75 within seconds; both are started again
  master     the same with host 0, which keeps the store of the rendezvous
  unplugged  the cable is cut; both ends notice after `parallel.timeout_seconds`; plugged in again, both go on
  restarted  host 0 has --max-restarts and waits; host 1 alone is started again, and host 0 never ends

Each variant must end with the weights of the one process, bit for bit (`--deterministic`). Prints a log with the
seconds since a variant's start, and leaves no namespace behind.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.jobs import LLMCTL, Job, finish, pretrain, running, weights, write_text

STEPS = 200
TIMEOUT_SECONDS = 15
GRACE_SECONDS = 5
LOST_PEER = 75
PORT = 29541


def ip(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Make namespaces lm0 (10.77.0.1) and lm1 (10.77.0.2) with a cable between them, and remove them at the end."""
    remove_hosts()
    try:
        for name in ("lm0", "lm1"):
            ip("netns", "add", name)
        ip("link", "add", "lmv0", "netns", "lm0", "type", "veth", "peer", "name", "lmv1", "netns", "lm1")
        for number in (0, 1):
            ip("-n", f"lm{number}", "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"lmv{number}")
            ip("-n", f"lm{number}", "link", "set", "lo", "up")
            ip("-n", f"lm{number}", "link", "set", f"lmv{number}", "up")
        yield
    finally:
        remove_hosts()


def remove_hosts() -> None:
    """Remove the namespaces, and with them the cable."""
    for name in ("lm0", "lm1"):
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Log:
    """Lines with the seconds since the start of a variant."""

    def __init__(self, name: str) -> None:
        self.name, self.begun = name, time.monotonic()

    def __call__(self, text: str) -> None:
        sys.stdout.write(f"{self.name:>9} {time.monotonic() - self.begun:6.1f} s  {text}\n")
        sys.stdout.flush()


def on_host(number: int, arguments: list[str], *more: str) -> list[str]:
    """Return the command that runs llmctl on a host, one process of two."""
    # A host has a name of its own, which nobody can resolve.
    host = ["unshare", "--uts", "sh", "-c", f'hostname host{number} && exec "$@"', "sh"]
    command = ["ip", "netns", "exec", f"lm{number}", *host, *LLMCTL, *arguments]
    return [*command, "--nnodes", "2", "--node-rank", str(number), "--master", f"10.77.0.1:{PORT}", *more]


def ended(log: Log, number: int, job: Job, since: float) -> None:
    """Wait for the end of a host that has lost the other, and see that it is the promised one."""
    code = job.end()
    words = next((line for line in job.lines if line.startswith("error:")), "")
    log(f"host {number} ended with {code}, {time.monotonic() - since:.1f} s after: {words}")
    assert code == LOST_PEER, job.err


class Trial:
    """A text, a place for runs, and the weights that every variant must end with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = write_text(folder)
        finish([*LLMCTL, *self.arguments(folder / "one")])
        self.expected = weights(folder / "one")

    def arguments(self, out: Path) -> list[str]:
        """Return the arguments of a run; the same command starts it and goes on with it."""
        settings = {"parallel__timeout_seconds": TIMEOUT_SECONDS, "train__eval_every": 50, "train__save_every": 10}
        flags = ("--deterministic", "--steps", str(STEPS), "--resume", "auto", "-o", str(out))
        return pretrain(self.text, *flags, **settings)

    def both(self, log: Log, out: Path) -> None:
        """Run both hosts to the end and compare the weights."""
        arguments = self.arguments(out)
        with running(on_host(0, arguments), on_host(1, arguments)) as (first, second):
            assert (first.end(), second.end()) == (0, 0), first.err + second.err
        for line in first.lines:
            if line.startswith(("resuming", "2 processes on")):
                log(line)
        self.compare(log, out)

    def compare(self, log: Log, out: Path) -> None:
        """See that a run's weights are those of the one process."""
        assert weights(out) == self.expected
        log("the weights are those of the one process, bit for bit")

    def lose(self, log: Log, out: Path, action: Callable[[Job, Job], None], survivors: tuple[int, ...]) -> float:
        """Start both hosts, let something happen in mid-run, and return how long the survivors took to end."""
        arguments = self.arguments(out)
        with running(on_host(0, arguments), on_host(1, arguments)) as hosts:
            hosts[0].wait_for("step 60/")
            since = time.monotonic()
            action(*hosts)
            log("step 60 is done; " + (action.__doc__ or ""))
            for number in survivors:
                ended(log, number, hosts[number], since)
            return time.monotonic() - since

    def equal(self, log: Log) -> None:
        """Both hosts finish."""
        self.both(log, self.folder / "equal")

    def killed(self, log: Log, victim: int = 1) -> None:
        """One host is gone at once."""

        def kill(*hosts: Job) -> None:
            """every process of one host is killed"""
            hosts[victim].kill()

        out = self.folder / f"killed{victim}"
        seconds = self.lose(log, out, kill, (1 - victim,))
        assert seconds < TIMEOUT_SECONDS, "a closed connection is noticed without waiting for the timeout"
        self.both(log, out)

    def master(self, log: Log) -> None:
        """The host that keeps the store is gone at once."""
        self.killed(log, victim=0)

    def unplugged(self, log: Log) -> None:
        """Nobody dies, but nothing arrives any more."""

        def cut(*_: Job) -> None:
            """the cable is cut"""
            ip("-n", "lm1", "link", "set", "lmv1", "down")

        out = self.folder / "unplugged"
        seconds = self.lose(log, out, cut, (0, 1))
        assert seconds < TIMEOUT_SECONDS + GRACE_SECONDS
        ip("-n", "lm1", "link", "set", "lmv1", "up")
        self.both(log, out)

    def restarted(self, log: Log) -> None:
        """Only the lost host is started again."""
        out = self.folder / "restarted"
        arguments = self.arguments(out)
        arguments[arguments.index(f"parallel.timeout_seconds={TIMEOUT_SECONDS}")] = "parallel.timeout_seconds=120"
        with running(on_host(0, arguments, "--max-restarts", "3"), on_host(1, arguments)) as (first, second):
            first.wait_for("step 60/")
            second.kill()
            log("step 60 is done; every process of host 1 is killed")
            first.wait_for("rank ")
            log(next(line for line in first.lines if "restarting" in line))
            with running(on_host(1, arguments, "--max-restarts", "3")) as (again,):
                log("host 1 is started again")
                assert (first.end(), again.end()) == (0, 0), first.err + again.err
        log(next(line for line in first.lines if line.startswith("resuming")))
        self.compare(log, out)


VARIANTS = ("equal", "killed", "master", "unplugged", "restarted")


def main(names: list[str]) -> None:
    """Run variants, each between hosts of its own."""
    unknown = set(names) - set(VARIANTS)
    if unknown:
        sys.exit(f"there is no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        for name in names or VARIANTS:
            with two_hosts():
                getattr(trial, name)(Log(name))


if __name__ == "__main__":
    main(sys.argv[1:])
