"""Every error that a user can cause, with its exit code; imports nothing."""


class LlmctlError(Exception):
    """Base class: the message names the wrong key or path and its value, `hint` is the one thing to do next.

    `exit_code` becomes the exit status of the process.
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
    """A file on disk is damaged, malicious, or incompatible with what it is used with."""

    exit_code = 4


class UnsupportedModelError(ArtifactError):
    """A model of an architecture, or with a setting, that is not read."""


class MemoryLimitError(LlmctlError):
    """The work does not fit into the available memory."""

    exit_code = 5


class DivergedError(LlmctlError):
    """Training produced a non-finite loss or gradient; the last good checkpoint is kept."""

    exit_code = 6


class MissingExtraError(LlmctlError):
    """An optional dependency is not installed. The hint names the package itself, which every index has."""

    exit_code = 7

    def __init__(self, what: str, package: str, extra: str = "") -> None:
        super().__init__(
            f"{what} needs the package `{package}`", f"pip install {repr(package + extra) if extra else package}"
        )


class MissingCompilerError(LlmctlError):
    """Compilation was requested but there is no compiler."""

    exit_code = 7


class OutputError(LlmctlError):
    """A result cannot be written: full disk, read-only folder, or it already exists."""

    exit_code = 8


class BusyError(LlmctlError):
    """Another process has locked the run folder."""

    exit_code = 9


class GateError(LlmctlError):
    """The result misses a quality or size gate set by the user."""

    exit_code = 10


class StoppedError(LlmctlError):
    """Stopped early by a limit or a lost peer; the run can be resumed."""

    exit_code = 75


class InterruptedRunError(LlmctlError):
    """Stopped by a signal after saving a checkpoint; exit code 128 + signal number."""

    def __init__(self, message: str, hint: str, signal_number: int) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number
