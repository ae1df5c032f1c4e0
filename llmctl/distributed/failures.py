"""Which of several failed processes is the cause, and the three lines that say so."""

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOST_PEER = 75

FINAL = frozenset({2, 3, 4, 6, 7, 9, 10, 128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM})
"""Exit codes after which a restart is no use: the same error would come again, or somebody wanted the end."""


def exit_code(failure: Any) -> int:
    """Return a failed process's exit code as a shell tells it."""
    code = int(failure.exitcode)
    return 128 - code if code < 0 else code


def culprit(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """Return the rank that the others' ends follow from, and its failure.

    Processes that lost the one that failed, or were stopped for it, are not the cause. Where all found the same thing
    wrong, the lowest speaks.
    """
    ordered = sorted(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    causes = [item for item in ordered if exit_code(item[1]) not in (LOST_PEER, 128 + signal.SIGTERM)] or ordered
    code = exit_code(causes[0][1])
    return min((item for item in causes if exit_code(item[1]) == code), key=lambda item: item[0])


def report(failures: Mapping[int, Any], folder: Path) -> int:
    """Say in at most three lines which process failed and why, and return its exit code."""
    rank, failure = culprit(failures)
    sys.stderr.write(describe(rank, failure, folder))
    return exit_code(failure)


def describe(rank: int, failure: Any, folder: Path) -> str:
    """Return the error of a process: its own last words, or what became of it, with a hint."""
    said = last_words(folder, failure.local_rank)
    if said and failure.exitcode > 0:
        return said if failure.local_rank == 0 else said.replace("error: ", f"error: rank {rank}: ", 1)
    if failure.exitcode < 0:
        what = f"error: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}"
        what += ", perhaps for want of memory" if failure.exitcode == -signal.SIGKILL else ""
    else:
        logs = folder.rglob(f"{failure.local_rank}/stderr.log")
        lines = [line for path in logs for line in path.read_text(errors="replace").splitlines() if line.strip()]
        what = f"error: rank {rank} exited with {failure.exitcode}" + "".join(f": {line}" for line in lines[-1:])
    return what + "\n" + resume_hint(folder)


def last_words(folder: Path, local_rank: int) -> str:
    """Return the error that a process left to its launcher, or nothing."""
    path = folder / f"error-{local_rank}"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def resume_hint(folder: Path) -> str:
    """Return how to go on, if a run was begun."""
    run = folder / "run"
    if not run.is_file():
        return ""
    return f"\nhint: go on from the last checkpoint with: llmctl pretrain --resume {run.read_text().strip()}\n"
