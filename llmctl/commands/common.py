"""What every command shares: its Typer app, stdout for results, stderr for everything else."""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmctl.artifacts.find import Ability

# Of every command that uses a model as it is.
AdapterNames = Annotated[
    list[str] | None, typer.Option("--adapter", help="An adapter's folder, or FOLDER=WEIGHT; may be repeated.")
]

KeysAndValues = Annotated[
    str,
    typer.Option(
        "--kv",
        help="Keys and values of past tokens: float (the model's precision), or int8: half of bfloat16's memory, a little "
        "slower on short texts.",
    ),
]


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


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, right: Collection[str]) -> list[str]:
    """Return aligned lines with a header; the columns in `right` (numbers) stand on the right."""
    cells = [tuple(columns), *[tuple(str(row[column]) for column in columns) for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]


def find_model(name: str | None, able: "Ability", *, quiet: bool, adapters: Sequence[str] | None = None) -> Path:
    """Find the model that a command means and say which on stderr, before torch makes anybody wait.

    Where only adapters are named, it is the base of the first.
    """
    from llmctl.artifacts.adapters import base_of
    from llmctl.artifacts.find import announce, resolve_model

    if name is None and adapters:
        name = str(base_of(adapters))
    found = resolve_model(name, able=able)
    note(announce(found), quiet=quiet)
    return found.path


def note(text: str, *, quiet: bool = False) -> None:
    """Write one line for the person watching to stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)
