"""`llmctl export`: a model of ours -> one file or a Hugging Face folder -> its path on stdout."""

from pathlib import Path
from typing import Annotated

import typer

from llmctl.commands.common import command_app, result, result_json

app = command_app()


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, X.safetensors, or an adapter.")],
    to: Annotated[str, typer.Option(help="single (one self-contained file) or hf (a Hugging Face folder).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="X.safetensors for single, a folder for hf.")],
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace what -o names.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model as one file or as a Hugging Face folder; prints where it is.

    An adapter is merged into its base.

    Examples:

      llmctl export runs/latest --to single -o teacher.safetensors

      llmctl export teacher.safetensors --to hf -o teacher
    """
    from llmctl.engine.convert import export_model

    path = export_model(model, out, to=to, force=force)
    if json:
        result_json({"path": str(path), "to": to})
    else:
        result(str(path))
