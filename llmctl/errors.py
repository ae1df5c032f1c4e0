"""Every error a user can cause, with the exit code it ends the process with; imports nothing."""


class LlmctlError(Exception):
    """Say what is wrong (naming the key or path and its value) and the one thing to do next.

    `str(error)` is the message; `hint` is one sentence or empty; `exit_code` is the process's status.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(LlmctlError):
    """The command, the recipe or the input is wrong."""

    exit_code = 2


class NotFoundError(LlmctlError):
    """A model, a data file or a checkpoint does not exist."""

    exit_code = 3


class ArtifactError(LlmctlError):
    """A file on disk is damaged, hostile, or does not fit what it is used with."""

    exit_code = 4


class MemoryLimitError(LlmctlError):
    """The work does not fit into the memory at hand."""

    exit_code = 5


class DivergedError(LlmctlError):
    """Training left the finite numbers; the last good checkpoint is kept."""

    exit_code = 6


class MissingExtraError(LlmctlError):
    """An optional dependency is not installed."""

    exit_code = 7

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package `{package}`", f"pip install 'llmctl[{extra}]'")


class MissingCompilerError(LlmctlError):
    """What is to be compiled cannot be: there is no compiler."""

    exit_code = 7


class OutputError(LlmctlError):
    """A result cannot be written: full disk, read-only folder, or it exists already."""

    exit_code = 8


class BusyError(LlmctlError):
    """Another process holds the run folder."""

    exit_code = 9


class GateError(LlmctlError):
    """A quality or size gate that the user set was missed."""

    exit_code = 10


class StoppedError(LlmctlError):
    """Stopped early by a limit or a lost peer; the run can be resumed."""

    exit_code = 75


class InterruptedRunError(LlmctlError):
    """Stopped by a signal after saving; exit code 128 + signal number."""

    def __init__(self, message: str, hint: str, signal_number: int) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number
