"""Find the root cause among several failed processes and report it in at most three lines."""

import json
import shlex
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LOST_PEER = 75

FINAL = frozenset({2, 3, 4, 6, 7, 9, 10, 128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM})
"""Exit codes after which there is no restart: the error would occur again, or a user stopped the run."""


def exit_code(failure: Any) -> int:
    """Return a failed process's exit code as a shell reports it: 128 + signal number if killed."""
    code = int(failure.exitcode)
    return 128 - code if code < 0 else code


def culprit(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """Return the rank that caused the failure of the others, and its failure.

    Processes that lost a peer, or were terminated because of it, are not the cause. If several failed with the same
    exit code as the earliest, the lowest rank is returned.
    """
    ordered = sorted(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    causes = [item for item in ordered if exit_code(item[1]) not in (LOST_PEER, 128 + signal.SIGTERM)] or ordered
    code = exit_code(causes[0][1])
    return min((item for item in causes if exit_code(item[1]) == code), key=lambda item: item[0])


def report(failures: Mapping[int, Any], folder: Path) -> int:
    """Print in at most three lines which process failed and why; return its exit code."""
    rank, failure = culprit(failures)
    sys.stderr.write(describe(rank, failure, folder))
    return exit_code(failure)


def describe(rank: int, failure: Any, folder: Path) -> str:
    """Return the error message of a process: the one it left, or one made from its exit status, with a hint."""
    message = last_words(folder, failure.local_rank)
    if message and failure.exitcode > 0:
        return message if failure.local_rank == 0 else message.replace("error: ", f"error: rank {rank}: ", 1)
    if failure.exitcode < 0:
        message = f"error: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}"
        message += ", possibly for lack of memory" if failure.exitcode == -signal.SIGKILL else ""
    else:
        logs = folder.rglob(f"{failure.local_rank}/stderr.log")
        lines = [line for path in logs for line in path.read_text(errors="replace").splitlines() if line.strip()]
        message = f"error: rank {rank} exited with {failure.exitcode}" + "".join(f": {line}" for line in lines[-1:])
    return message + "\n" + resume_hint(folder)


def last_words(folder: Path, local_rank: int) -> str:
    """Return the error message that a process left for its launcher, or an empty string."""
    path = folder / f"error-{local_rank}"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def resume_hint(folder: Path) -> str:
    """Return a hint with the resume command, empty if no run was created yet."""
    begun = folder / "run"
    if not begun.is_file():
        return ""
    run = begun.read_text(encoding="utf-8").strip()
    command = "pretrain"
    with suppress(OSError, ValueError, AttributeError):  # a record that cannot be read must not hide the failure
        command = json.loads((Path(run) / "run.json").read_text(encoding="utf-8")).get("command", command)
    return f"\nhint: resume from the last checkpoint with: llmctl {command} --resume {shlex.quote(run)}\n"
