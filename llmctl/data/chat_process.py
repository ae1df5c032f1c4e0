"""Render strangers' chat templates in a process that the operating system limits.

Forty doublings of a list take no time, and comparing it with another takes forever: no count of loops or characters
bounds a template. So a process of its own renders, with a limit of memory, of processor time for each rendering, and
without the right to write a file. It costs about 0.1 ms per rendering, and 0.1 s to start.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import llmctl

MAX_BYTES = 512 << 20
MAX_SECONDS = 1.25
"""Processor time of one rendering; more than the sandbox's own limit, whose message is better."""
PATIENCE_SECONDS = 60
"""How long to wait for an answer at all, on a machine that has no processor time left."""
KEPT_VARIABLES = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH")


class Renderer:
    """Renders one template; its process starts with the first rendering and is shared by threads, not by forks."""

    def __init__(self, source: str) -> None:
        self.source, self.lock = source, threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def __call__(self, values: Mapping[str, Any]) -> str:
        """Render the template with values.

        Raises: TemplateFailureError.
        """
        from llmctl.data.chat_sandbox import TemplateFailureError

        with self.lock:
            answer = self._ask(values)
        if "text" in answer:
            return str(answer["text"])
        raise TemplateFailureError(*map(str, answer["failure"]))

    def _ask(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self._start()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with suppress(OSError):  # a broken pipe: it has ended
            process.stdin.write(json.dumps(values, default=str).encode() + b"\n")
            process.stdin.flush()
            if os.name == "nt" or select.select([process.stdout], [], [], PATIENCE_SECONDS)[0]:
                line = process.stdout.readline()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.process = None
        stop(process, self.owner)
        if hasattr(signal, "SIGPROF") and process.returncode == -signal.SIGPROF:
            return {"failure": [f"was stopped: it takes more than {MAX_SECONDS:g} seconds"]}
        return {"failure": ["was stopped: the process that rendered it ended"]}

    def _start(self) -> None:
        # The child finds the same packages, and reads no settings, startup files or secrets of the environment.
        paths = [str(Path(llmctl.__file__).parents[1]), *sys.path]
        code = f"import sys; sys.path[:] = {paths!r}; from llmctl.data.chat_process import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            cwd=Path(llmctl.__file__).parent,
        )
        self.owner = os.getpid()
        weakref.finalize(self, stop, self.process, self.owner)
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(json.dumps(self.source).encode() + b"\n")


def stop(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """End a process, unless this one is a fork of its parent."""
    if owner != os.getpid():
        return
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    try:
        process.wait(timeout=0.5)  # it ends by itself when its input does, or has been ended by its timer
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- the process --------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Read a template, then values line by line, and answer each with a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    answers = os.fdopen(os.dup(1), "wb")
    requests = sys.stdin.buffer
    from llmctl.data.chat_sandbox import TemplateFailureError, compiled

    restrict()
    source = json.loads(requests.readline())
    render = None
    for line in requests:
        begin_timer()
        try:
            render = render or compiled(source)
            answer: dict[str, Any] = {"text": render(json.loads(line))}
        except TemplateFailureError as error:
            answer = {"failure": [str(error)[:2000], error.hint]}
        except Exception as error:  # noqa: BLE001 - whatever it is, the template caused it, and it is told
            answer = {"failure": [f"fails: {type(error).__name__}: {str(error)[:2000]}"]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def restrict() -> None:
    """Limit memory, files and core dumps; Windows has no such limits."""
    with suppress(ImportError):
        import resource

        for kind, most in (
            (resource.RLIMIT_AS, MAX_BYTES),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            with suppress(ValueError, OSError):  # macOS does not limit address space
                resource.setrlimit(kind, (most, most))


def begin_timer() -> None:
    """Give this rendering its processor time; the default action of SIGPROF ends the process, even inside C code."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
