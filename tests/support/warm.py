"""llmctl in processes of their own that find torch imported: forked from one that has done it, once for many commands.

Such a process is a child of the tests' own, as one that `subprocess` starts: signals, pipes and exit codes are real. What
a command imports, and what imports read from the environment, is not what is tested with it. (huggingface_hub reads
where its cache is: it is not imported before.)
"""

import atexit
import ctypes
import fcntl
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WARM = ["(warm)"]
"""Begins the command line of such a process; arguments of llmctl follow, or `-m`, a module and its arguments."""
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of Linux: processes whose parent has ended are given to this one."""


class Process:
    """A process as `subprocess.Popen` has it, of text."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        text: bool = True,
    ) -> None:
        assert [*command[:1], text] == [*WARM, True]
        request = {
            "arguments": [str(part) for part in command[1:]],
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "is_leader": start_new_session,
        }
        ends, given, opened = [], [], []
        for own, target in enumerate((stdin, stdout, stderr)):
            if target == subprocess.PIPE:
                pair = os.pipe()[:: 1 if own else -1]
                ends.append(open(pair[0], "r" if own else "w", encoding="utf-8"))  # noqa: SIM115, PTH123
                opened.append(pair[1])
            elif target == subprocess.DEVNULL:
                opened.append(os.open(os.devnull, os.O_RDWR))
            ends += [None] * (own + 1 - len(ends))
            if target in (subprocess.PIPE, subprocess.DEVNULL):
                given.append(opened[-1])
            elif target == subprocess.STDOUT:
                given.append(given[1])
            else:
                given.append(own if target is None else target)
        self.stdin, self.stdout, self.stderr = ends
        self.args, self.returncode = command, None
        self.pid = fork(request, given)
        self.pidfd = os.pidfd_open(self.pid)
        for descriptor in opened:
            os.close(descriptor)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code, negative after a signal."""
        if self.returncode is None:
            if not select.select([self.pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.pidfd)
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        is_over = self.returncode is not None or select.select([self.pidfd], [], [], 0)[0]
        return self.wait() if is_over else None

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end with an empty standard input."""
    outputs = [cwd / f".warm-{os.getpid()}-{name}" for name in ("out", "err")]
    with outputs[0].open("w") as out, outputs[1].open("w") as err:
        process = Process(
            [*WARM, *arguments], stdin=subprocess.DEVNULL, stdout=out.fileno(), stderr=err.fileno(), cwd=cwd, env=env
        )
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
        process.wait()
        texts = [path.read_text(encoding="utf-8") for path in outputs]
        for path in outputs:
            path.unlink()
    return subprocess.CompletedProcess(list(arguments), code, *texts)


@cache
def server() -> socket.socket:
    """Start the process that has torch, and return what it is asked by; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.support.warm", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def fork(request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
    """Ask for a process and return its id; it becomes this one's child."""
    asked, libc = server(), ctypes.CDLL(None)
    libc.prctl(SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(asked, [json.dumps(request).encode()], descriptors)
        return int(asked.recv(32))
    finally:
        libc.prctl(SUBREAPER, 0, 0, 0, 0)


def serve(asked: socket.socket) -> None:
    """Fork a process for each request. Returns in those, ready to run the command, and at the end of the tests."""
    while True:
        content, descriptors, _, _ = socket.recv_fds(asked, 2**20, 3)
        if not content:
            sys.exit()
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid == 0:
                break
            os.write(writer, str(pid).encode())
            os._exit(0)
        os.waitpid(middle, 0)  # its child has another parent from here on
        asked.send(os.read(reader, 32))
        for descriptor in (reader, writer, *descriptors):
            os.close(descriptor)
    asked.close()
    become(json.loads(content), [reader, writer, *descriptors])


def become(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Take over arguments, environment, folder and streams, as a new process has them."""
    if request["is_leader"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for target, descriptor in enumerate(descriptors[2:]):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        os.close(descriptor)
    if request["is_leader"] and os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the process's own, so that Ctrl-C reaches it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["llmctl", *request["arguments"]]
    for target, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        binary = open(target, f"{mode}b", closefd=False)  # noqa: SIM115
        errors = {"stdin": "strict", "stdout": "strict", "stderr": "backslashreplace"}[name]
        is_by_line = name == "stderr" or os.isatty(target)
        stream = io.TextIOWrapper(binary, encoding="utf-8", errors=errors, line_buffering=is_by_line)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def prepare() -> None:
    """Import what most commands do, and nothing that reads the environment of one."""
    import torch
    import torch._dynamo
    import torch.distributed.tensor

    import llmctl.artifacts.load
    import llmctl.inference.generate
    import llmctl.jobs.begin
    import llmctl.training.loop  # noqa: F401

    # A fork keeps no thread but its own: the pool of a parallel region would be waited for without end.
    torch.set_num_threads(1)
    assert "huggingface_hub" not in sys.modules
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    prepare()
    serve(socket.socket(fileno=int(sys.argv[1])))
    module = "llmctl"
    if sys.argv[1:2] == ["-m"]:
        module, sys.argv[1:] = sys.argv[2], sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
