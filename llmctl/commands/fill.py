"""`llmctl fill`: texts with masks -> the filled texts on stdout."""

import sys
from itertools import islice
from typing import Annotated

import typer

from llmctl.commands.common import AdapterNames, command_app, find_model, prepare_products, result, result_json
from llmctl.errors import UsageError

app = command_app()
BATCH_TEXTS = 16


@app.command()
def fill(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="Text with <mask>; `-`: one per line of standard input, filled with the most likely tokens.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="Model folder, file, run or `latest`.")] = None,
    adapter: AdapterNames = None,
    top_k: Annotated[int, typer.Option("-k", "--top-k", help="Candidates per mask.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text, with all candidates.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Do not print which model is used.")] = False,
) -> None:
    r"""Predict the masked tokens of a text: `probability<TAB>filled text` per candidate.

    Examples:

      llmctl fill "a <mask> of strings"

      llmctl fill --json - < texts.txt
    """
    is_piped = text in (None, "-")
    if is_piped and text is None and sys.stdin.isatty():
        raise UsageError("no text", '`llmctl fill "a <mask> of strings"`, or `-` to read texts from standard input')
    from llmctl.commands.generate import argument, one_line, read_prompts

    texts = read_prompts(whole=False, null=False, quiet=quiet) if is_piped else iter([argument(text)])
    path = find_model(model, "fill", quiet=quiet, adapters=adapter)
    from llmctl.artifacts.adapters import apply_adapters
    from llmctl.artifacts.load import load_model
    from llmctl.inference.fill import Filled, put_in
    from llmctl.inference.fill import fill as fill_in

    loaded = load_model(path, device=device, dtype=dtype, able="fill", packed=True)
    loaded = apply_adapters(loaded, adapter or [], able="fill")
    prepare_products(loaded, quiet=quiet)

    def show(filled: Filled) -> None:
        if json:
            masks = [[{"token": token, "p": round(p, 6)} for token, p in mask] for mask in filled.masks]
            result_json({"text": filled.text, "filled": filled.filled, "masks": masks})
        elif is_piped:
            result(one_line(filled.filled))
        elif len(filled.masks) > 1:
            result(filled.filled)
        elif loaded.tokenizer is not None:
            for token, p in filled.masks[0]:
                result(f"{p:.3f}\t{one_line(put_in(loaded.tokenizer, filled.text, [token]))}")

    first = 1
    while window := list(islice(texts, BATCH_TEXTS)):
        for filled in fill_in(loaded, window, top_k=top_k, first=first):
            show(filled)
        first += len(window)
