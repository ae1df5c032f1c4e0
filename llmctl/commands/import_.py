"""`llmctl import`: a published model -> a model folder or single file -> its path on stdout."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from llmctl.commands.common import command_app, note, result, result_json

app = command_app()


@app.command()
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Hugging Face folder, X.gguf, X.safetensors, or org/name of the Hub.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder, or X.safetensors for a single file.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = "",
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the path.")] = False,
) -> None:
    """Convert a published model to a model folder or file and print its path.

    Examples:

      llmctl import stories260K-q8_0.gguf -o models/stories

      llmctl import ./bert-base-uncased -o bert.safetensors --dtype bfloat16

      llmctl import HuggingFaceTB/SmolLM2-135M -o models/smol
    """
    from llmctl.artifacts.find import find_named
    from llmctl.converting.convert import import_model
    from llmctl.formats.describe import describe

    path = import_model(find_named(source, "any"), out, dtype=dtype, force=force)
    record = describe(path)
    note(
        f"{record['architecture']}, {record['parameters']:,} parameters; next: llmctl inspect {shlex.quote(str(path))}",
        quiet=quiet,
    )
    if json:
        keys = ("path", "architecture", "parameters", "bytes", "dtypes", "context", "vocabulary", "tokenizer")
        result_json({key: record[key] for key in keys})
    else:
        result(str(path))
