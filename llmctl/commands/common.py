"""Helpers shared by all commands: the Typer app, stdout for results, stderr for everything else."""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from llmctl.commands.grouped_help import GroupedCommand, GroupedGroup
from llmctl.runs.terminal import on_one_line, plain

if TYPE_CHECKING:
    from llmctl.artifacts.find import Ability
    from llmctl.artifacts.load import Loaded

# Shared by the commands that run a model.
AdapterNames = Annotated[
    list[str] | None, typer.Option("--adapter", help="Adapter folder, or FOLDER=WEIGHT; repeatable.")
]

# Of the commands that take a model as an argument too.
SameModel = Annotated[str | None, typer.Option("-m", "--model", help="Same as the argument.")]
SameModels = Annotated[list[str] | None, typer.Option("-m", "--model", help="Same as the arguments; repeatable.")]

KeysAndValues = Annotated[
    str,
    typer.Option(
        "--kv",
        help="KV cache: float (the model's precision) or int8 (half the memory of bfloat16, slightly slower on short texts).",
    ),
]


class App(typer.Typer):
    """A Typer app whose commands show their options in groups."""

    def command(  # type: ignore[override]
        self, *arguments: Any, cls: type[TyperCommand] = GroupedCommand, **settings: Any
    ) -> Any:
        """Register a command."""
        return super().command(*arguments, cls=cls, **settings)


def command_app(**settings: Any) -> typer.Typer:
    """Return a Typer app with plain help, `-h`, and no shell-completion options."""
    return App(
        cls=GroupedGroup,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def result(text: str) -> None:
    """Print one line of the result to stdout."""
    print(text, flush=True)


def result_json(record: Any) -> None:
    """Print a record as one line of JSON to stdout, non-ASCII characters unescaped."""
    print(json.dumps(record, ensure_ascii=False), flush=True)


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, right: Collection[str]) -> list[str]:
    """Return an aligned table with a header; columns in `right` (numbers) are right-aligned."""
    cells = [tuple(columns), *[tuple(on_one_line(str(row[column])) for column in columns) for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]


def find_model(name: str | None, able: "Ability", *, quiet: bool, adapters: Sequence[str] | None = None) -> Path:
    """Resolve the model of a command and print it to stderr before the slow import of torch.

    If only adapters are named, it is the base model of the first.
    """
    from llmctl.artifacts.adapters import base_of
    from llmctl.artifacts.find import announce, resolve_model

    if name is None and adapters:
        name = str(base_of(adapters))
    chosen = resolve_model(name, able=able)
    note(announce(chosen), quiet=quiet)
    return chosen.path


def one_name(argument: str | None, option: str | None) -> str | None:
    """Return the name of a model that may be given as an argument or with `-m`.

    Raises: UsageError for two names.
    """
    from llmctl.errors import UsageError

    if argument is not None and option is not None and argument != option:
        raise UsageError(f"two models are given: `{argument}` and `{option}`", "give one")
    return option if argument is None else argument


def prepare_decoding(*, device: str = "cpu", quiet: bool = False) -> None:
    """Compile or check the decoding library if this machine has not done so yet and a CPU is to decode.

    Raises: UsageError if the device is unknown or unavailable.
    """
    from llmctl.artifacts.load import choose_device
    from llmctl.kernels.compile import verdict

    if verdict() or choose_device(device) != "cpu":
        return
    from llmctl.benchmarking.compiled_step_check import prepare_library

    prepare_library(lambda text: note(text, quiet=quiet))


def prepare_products(loaded: "Loaded", *, quiet: bool) -> None:
    """Choose the fastest products of a quantized model, among them those of the compiled library."""
    from llmctl.kernels.product_table import Measured, give_table
    from llmctl.quant.linear import QuantLinear

    if any(isinstance(module, QuantLinear) for module in loaded.model.modules()):
        prepare_decoding(device=loaded.model.device.type, quiet=quiet)
        give_table(loaded.model, Measured())


def note_decoding(loaded: "Loaded", *, quiet: bool) -> None:
    """Print what computes the tokens."""
    if not quiet:
        from llmctl.kernels.decoder import decoding_by

        note(f"decoding: {decoding_by(loaded.decoder)}")


def note(text: str, *, quiet: bool = False) -> None:
    """Print one line of progress or information to stderr."""
    if not quiet:
        print(plain(text), file=sys.stderr, flush=True)
