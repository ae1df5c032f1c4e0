"""`llmctl use`: store the default model, used when no model is named and none is found nearby."""

from pathlib import Path
from typing import Annotated

import typer

from llmctl.commands.common import SameModel, command_app, one_name, result

app = command_app()


@app.command()
def use(
    model: Annotated[str | None, typer.Argument(help="Model folder, file or run; omit it to show the default.")] = None,
    named: SameModel = None,
) -> None:
    """Set the default model for all directories, or show it if no model is given.

    Examples:

      llmctl use runs/latest

      llmctl use
    """
    from llmctl.artifacts.find import default_file, find_named
    from llmctl.errors import NotFoundError
    from llmctl.files import write_text

    file, model = default_file(), one_name(model, named)
    if model is None:
        if not file.is_file():
            raise NotFoundError("no default model is set", "`llmctl use runs/latest` sets it")
        result(file.read_text(encoding="utf-8").strip())
        return
    path = Path(find_named(model, "any")).resolve()
    from llmctl.artifacts.with_adapters import read_model

    read_model(path)
    write_text(file, f"{path}\n")
    result(str(path))
