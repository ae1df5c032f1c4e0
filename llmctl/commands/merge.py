"""`llmctl merge`: models of one architecture -> one model whose weights are a mean of theirs -> its path on stdout."""

from pathlib import Path
from typing import Annotated

import typer

from llmctl.commands.common import command_app, note, result, result_json
from llmctl.tables.merges import MERGES

app = command_app()


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Models: folders, files, runs or adapters.")],
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder, or X.safetensors for a single file.")],
    weights: Annotated[str | None, typer.Option(help="One weight per model: 0.7,0.3; default: equal.")] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=f"Method: {', '.join(MERGES)}.")] = "linear",
    base: Annotated[str | None, typer.Option(help="ties: the model that the others were trained from.")] = None,
    density: Annotated[float, typer.Option(help="ties: the share of each model's changes that is kept.")] = 0.2,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the path.")] = False,
) -> None:
    """Merge models that were trained from one model, and print the path of the result.

    linear: the weighted mean of their weights. slerp: a point on the arc between two. ties: the base, plus the changes that
    most models agree on. Evaluate the result before you use it.

    Examples:

      llmctl merge runs/0003 runs/0004 -o merged

      llmctl merge poems chat --weights 0.7,0.3 --method slerp -o merged

      llmctl merge poems chat code --method ties --base smol -o merged
    """
    from llmctl.artifacts.find import find_named
    from llmctl.converting.merge import merge_models
    from llmctl.errors import UsageError

    if method not in MERGES:
        raise UsageError(f"`--method {method}` is unknown", f"use one of {', '.join(MERGES)}")
    record = merge_models(
        [find_named(name, "any") for name in models],
        out,
        weights=numbers_of(weights),
        method=method,
        base=None if base is None else find_named(base, "any"),
        density=density,
        force=force,
    )
    if json:
        result_json(record)
        return
    note(f"merged {len(models)} models ({method})", quiet=quiet)
    note(f"next: llmctl evaluate {record['path']} {' '.join(models)} -d DATA", quiet=quiet)
    result(record["path"])


def numbers_of(text: str | None) -> list[float]:
    """Return numbers separated by commas.

    Raises: UsageError naming what is no number.
    """
    from llmctl.errors import UsageError

    found = []
    for part in (text or "").split(",") if text else []:
        try:
            found.append(float(part))
        except ValueError:
            raise UsageError(f"`--weights {text}`: `{part}` is no number", "one weight per model: 0.7,0.3") from None
    return found
