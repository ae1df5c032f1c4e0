"""`python -m llmctl` and the console script: answers `--version` at once, hands the rest to the Typer app."""

import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command line; the process ends with the table's exit code."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from llmctl import __version__

        sys.stdout.write(f"llmctl {__version__}\n")
        return
    from llmctl.cli import end_with_the_pipe, run

    end_with_the_pipe(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        # Text is UTF-8 whatever the locale says; what a terminal cannot show must not end a run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
