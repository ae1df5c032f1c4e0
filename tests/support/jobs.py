"""Command lines of a tiny training run as processes of their own, for tests of launchers, signals and hosts.

A test waits for lines that a process writes, never for a time; whatever it has started ends with it.
"""

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.warm import WARM, Process

ROOT = Path(__file__).resolve().parents[2]
LLMCTL = [sys.executable, "-P", "-m", "llmctl"]
TINY = {
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "train.seq_len": 32,
    "train.eval_every": 10,
    "train.save_every": 2,
    "train.dtype": "float32",
    "train.device": "cpu",
    "data.split": "blank",
    "tokenizer.model_type": "char",
}
PATIENCE_SECONDS = 240
"""After this a process counts as hung."""


def write_text(folder: Path) -> Path:
    """Write a small text of many paragraphs and return its path."""
    draw = random.Random(1)
    words = ["the", "cat", "dog", "sat", "ran", "on", "mat", "hill", "big", "small", "red", "of", "and", "to", "was"]
    path = folder / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=40)) + "." for _ in range(120)), encoding="utf-8")
    return path


def pretrain(text: Path, *arguments: str, **settings: object) -> list[str]:
    """Return the arguments of llmctl that train the tiny model; settings have `__` for a dot."""
    values = TINY | {name.replace("__", "."): value for name, value in settings.items()}
    flags = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    return ["pretrain", str(text), *flags, "-v", *arguments]


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment with this checkout in front, one thread, and `extra`."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


class Job:
    """A process whose lines on stderr can be waited for."""

    def __init__(self, command: Sequence[str], **options) -> None:
        self.lines: list[str] = []
        self.said = threading.Condition()
        self.begun = time.monotonic()
        self.process = (Process if command[0] in WARM else subprocess.Popen)(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **({"env": environment()} | options),
        )
        self.out = ""
        self.readers = [threading.Thread(target=self._read, daemon=True), threading.Thread(target=self._keep)]
        for reader in self.readers:
            reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            with self.said:
                self.lines.append(line.rstrip("\n"))
                self.said.notify_all()
        with self.said:
            self.said.notify_all()

    def _keep(self) -> None:
        self.out = "".join(self.process.stdout or ())

    def wait_for(self, beginning: str, *, times: int = 1) -> None:
        """Wait until that many lines begin like this."""

        def is_there() -> bool:
            return sum(line.startswith(beginning) for line in self.lines) >= times

        with self.said:
            self.said.wait_for(lambda: is_there() or not self.readers[0].is_alive(), PATIENCE_SECONDS)
            assert is_there(), f"no line `{beginning}`:\n{self.err}"

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        code = self.process.wait(PATIENCE_SECONDS)
        for reader in self.readers:
            reader.join(PATIENCE_SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code

    @property
    def err(self) -> str:
        return "\n".join(self.lines)

    def rank(self, number: int) -> int:
        """Return the process id of a rank among this process's own descendants."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
        raise AssertionError(f"there is no rank {number}:\n{self.err}")

    def kill(self) -> None:
        """End the process and its descendants."""
        for pid in (*descendants(self.process.pid), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's children and theirs."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


@contextlib.contextmanager
def running(*commands: Sequence[str], **options) -> Iterator[list[Job]]:
    """Run commands side by side, and leave none behind."""
    jobs: list[Job] = []
    try:
        jobs.extend(Job(command, **options) for command in commands)
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.end()


def finish(command: Sequence[str], *, code: int = 0, **options) -> Job:
    """Run a command to its end and return it."""
    with running(command, **options) as (job,):
        assert job.end() == code, job.err
    return job


def finish_two_ranks(arguments: Sequence[str]) -> Job:
    """Run a command in two processes that know of each other, as a cluster starts them, and return the first."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(sock.getsockname()[1])}
    command = [*WARM, *arguments]
    with (
        running(command, env=environment(RANK="0", LOCAL_RANK="0", **world)) as (first,),
        running(command, env=environment(RANK="1", LOCAL_RANK="1", **world)) as (second,),
    ):
        assert (first.end(), second.end()) == (0, 0), first.err + second.err
    assert (sum(line.startswith("2 processes on 1 host") for line in first.lines), second.out) == (1, "")
    return first


def weights(run: Path) -> str:
    """Return a hash of the tensors of a run's model; its metadata holds the recipe, which may differ."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(run / "model.safetensors", "numpy") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).tobytes())
    return digest.hexdigest()
