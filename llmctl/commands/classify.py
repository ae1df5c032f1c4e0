"""`llmctl classify`: texts -> labels, or numbers for regression, on stdout."""

import sys
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.commands.common import command_app, find_model, note, result, result_json
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmctl.inference.classify import Classified

app = command_app()
WINDOW_TEXTS = 256


@app.command()
def classify(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT", help="Text; `-`: one per line of standard input, answered with its labels, separated by |."
        ),
    ] = None,
    pair: Annotated[str | None, typer.Argument(metavar="TEXT2", help="Second text of a pair.")] = None,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="Model with a classification head: folder, file, run or `latest`."),
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Lines are pairs, separated by a tab.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text, with all labels.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Do not print which model is used.")] = False,
) -> None:
    """Label texts with a classifier: `probability<TAB>label` per label, or a number for regression.

    Examples:

      llmctl classify "a warm, funny film"

      llmctl classify - < reviews.txt > labels.txt
    """
    is_piped = text in (None, "-")
    if is_piped and text is None and sys.stdin.isatty():
        raise UsageError("no text", '`llmctl classify "a text"`, or `-` to read texts from standard input')
    from llmctl.commands.generate import argument, read_prompts

    texts: Iterator[tuple[str, ...]]
    if is_piped:
        lines = read_prompts(whole=False, null=False, quiet=quiet)
        texts = (tuple(line.split("\t", 1)) if pairs else (line,) for line in lines)
    else:
        texts = iter([(argument(text), *([] if pair is None else [argument(pair)]))])
    path = find_model(model, "classify", quiet=quiet)
    from llmctl.artifacts.load import load_model
    from llmctl.inference.classify import classify as classify_texts

    loaded = load_model(path, device=device, dtype=dtype, able="classify", packed=True)
    n_cut = 0
    while window := list(islice(texts, WINDOW_TEXTS)):
        for classified in classify_texts(loaded, window):
            n_cut += classified.n_cut > 0
            show(classified, json=json, is_piped=is_piped)
    if n_cut:
        note(f"{n_cut:,} texts were longer than the model's context and were truncated", quiet=quiet)


def show(classified: "Classified", *, json: bool, is_piped: bool) -> None:
    """Print the labels or numbers of one text."""
    numbers = " ".join(f"{value:.4f}" for value in classified.values)
    if json:
        record: dict[str, object] = dict(zip(("text", "pair"), classified.texts, strict=False))
        record |= {"values": [round(value, 6) for value in classified.values]} if classified.values else {}
        if classified.probabilities:
            record |= {"labels": list(classified.chosen)}
            record |= {"p": {name: round(share, 6) for name, share in classified.probabilities.items()}}
        result_json(record)
    elif is_piped or classified.values:
        result(numbers or "|".join(classified.chosen))
    else:
        for name, share in classified.probabilities.items():
            result(f"{share:.3f}\t{name}")
