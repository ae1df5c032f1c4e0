"""Children that have torch already: forked from a process that imported it once, waited for by their descriptors."""

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import accelerate
import sentencepiece
import torch
import torch._dynamo
import torch.distributed.tensor

from llmctl.errors import LlmctlError

IMPORTED = (accelerate, sentencepiece, torch._dynamo, torch.distributed.tensor)
"""What a training run imports on its way, so that no child does it again."""

# A fork keeps no thread but its own: the pool of a parallel region would be waited for without end.
torch.set_num_threads(1)

ESCAPED = 97
"""Exit code of a child that ended with an error of another class than ours."""


@dataclass
class Child:
    """A forked process; `pidfd` becomes readable at its end."""

    pid: int
    pidfd: int
    exit_code: int | None = None

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for the end, or as long as is said; return the exit code, negative after a signal, None if it runs."""
        if self.exit_code is None and select.select([self.pidfd], [], [], seconds)[0]:
            self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.pidfd)
        return self.exit_code

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)  # its number is not given away before it is waited for


def start(action: Callable[[], None], log: Path, environment: Mapping[str, str] | None = None) -> Child:
    """Fork a child that does something and ends with the exit code of the error it raises; it writes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        run(action, log, environment or {})
    return Child(pid, os.pidfd_open(pid))


def run(action: Callable[[], None], log: Path, environment: Mapping[str, str]) -> NoReturn:
    code = ESCAPED
    try:
        os.environ.update(environment)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        action()
        code = 0
    except LlmctlError as error:
        code = error.exit_code
        os.write(2, f"error: {error}\nhint: {error.hint}\n".encode())
    except BaseException:  # noqa: BLE001  this is the top of a process
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)  # nothing of the parent's may run in the child: no fixture, no exit handler, no thread's end
