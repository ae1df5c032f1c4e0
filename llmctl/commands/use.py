"""`llmctl use`: remember the model that commands take when none is named and no run is near."""

from pathlib import Path
from typing import Annotated

import typer

from llmctl.commands.common import command_app, result

app = command_app()


@app.command()
def use(
    model: Annotated[
        str | None, typer.Argument(help="A model folder or file, or a run. None shows the choice.")
    ] = None,
) -> None:
    """Choose the default model, from any directory; without a model, show the choice.

    Examples:

      llmctl use runs/latest

      llmctl use
    """
    from llmctl.artifacts.find import default_file, find_named
    from llmctl.errors import NotFoundError
    from llmctl.files import write_text

    place = default_file()
    if model is None:
        if not place.is_file():
            raise NotFoundError("no default model is set", "llmctl use runs/latest sets one")
        result(place.read_text(encoding="utf-8").strip())
        return
    path = Path(find_named(model, "any")).resolve()
    from llmctl.artifacts.with_adapters import read_model

    read_model(path)
    write_text(place, f"{path}\n")
    result(str(path))
