"""`python -m llmctl` and the console script: answers `--version` at once, hands the rest to the Typer app."""

import os
import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command line; the process ends with the table's exit code."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from llmctl import __version__

        sys.stdout.write(f"llmctl {__version__}\n")
        return
    # Threads of a matrix product wait for each other by spinning, by default so long that one other busy process on
    # the machine makes training 20 times slower. A short spin costs nothing on an idle machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        code = answer()
    except KeyboardInterrupt:  # before the command line has its own answer to it
        if sys.stderr is not None:
            sys.stderr.write("interrupted\n")
        code = 130
    distributed = sys.modules.get("torch.distributed")
    is_rank = distributed is not None and distributed.is_available() and distributed.is_initialized()
    # A launcher may have threads that wait for a host which is gone, and would wait for them.
    if is_rank or "torch.distributed.launcher.api" in sys.modules:
        from llmctl.distributed.runtime import leave

        leave(code)
    sys.exit(code)


def answer() -> int:
    """Prepare the standard streams, run the command line and return its exit code."""
    from llmctl.cli import end_with_the_pipe, run, show
    from llmctl.runs.closed_pipe import Closed, Unbreakable
    from llmctl.runs.terminal import guarded

    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)  # or the first file that is opened would be the standard input of others
        sys.stdin = Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process ends
    if sys.stdout is None:
        return show("standard output is closed: results could not be printed", "redirect it, as in `> /dev/null`", 8)
    end_with_the_pipe(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        # Text is UTF-8 whatever the locale says; what a terminal cannot show must not end a run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    sys.stdout = guarded(sys.stdout, always=False)
    sys.stderr = guarded(Unbreakable(sys.stderr), always=True)
    return run(sys.argv[1:])


if __name__ == "__main__":
    main()
