"""`python -m llmctl` and the console script: answers `--version` at once, hands the rest to the Typer app."""

import sys


def main() -> None:
    """Run the command line; the process ends with the table's exit code."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from llmctl import __version__

        sys.stdout.write(f"llmctl {__version__}\n")
        return
    from llmctl.cli import end_with_the_pipe, run

    end_with_the_pipe(sys.argv[1:])
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
