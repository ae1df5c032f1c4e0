"""What every command shares: its Typer app, stdout for results, stderr for everything else."""

import json
import sys
from typing import Any

import typer


def command_app(**settings: Any) -> typer.Typer:
    """Return the Typer app of one command file: plain help, `-h`, no completion clutter."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def result(text: str) -> None:
    """Write one line of the product to stdout."""
    print(text, flush=True)


def result_json(record: Any) -> None:
    """Write one JSON record as one line to stdout; Chinese stays readable."""
    print(json.dumps(record, ensure_ascii=False), flush=True)


def note(text: str, *, quiet: bool = False) -> None:
    """Write one line for the person watching to stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)
