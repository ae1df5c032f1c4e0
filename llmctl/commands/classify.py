"""`llmctl classify`: texts -> labels, numbers, named entities, or answers to questions, on stdout."""

import shlex
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.commands.common import command_app, find_model, note, prepare_products, result, result_json
from llmctl.errors import UsageError
from llmctl.files import parse_json
from llmctl.runs.terminal import on_one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmctl.artifacts.load import Loaded
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
    pair: Annotated[
        str | None, typer.Argument(metavar="TEXT2", help="Second text of a pair; the context of a question.")
    ] = None,
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

    A token classifier prints the named entities of a text: `probability<TAB>label<TAB>start<TAB>end<TAB>text`. A
    question-answering model finds the answer to TEXT in TEXT2: `probability<TAB>start<TAB>end<TAB>answer`.

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

    loaded = load_model(path, device=device, dtype=dtype, able="classify", packed=True)
    prepare_products(loaded, quiet=quiet)
    run = {"text": label_texts, "tokens": find_entities, "span": find_answers}[loaded.model.config.head]
    n_cut = 0
    while window := list(islice(texts, WINDOW_TEXTS)):
        n_cut += run(loaded, window, json=json, is_piped=is_piped)
    if n_cut:
        note(f"{n_cut:,} texts were longer than the model's context and were truncated", quiet=quiet)


def label_texts(loaded: "Loaded", texts: list[tuple[str, ...]], *, json: bool, is_piped: bool) -> int:
    """Print the labels of texts; return how many were truncated."""
    from llmctl.inference.classify import classify as classify_texts

    results = classify_texts(loaded, texts)
    for classified in results:
        show(classified, json=json, is_piped=is_piped)
    return sum(classified.n_cut > 0 for classified in results)


def find_entities(loaded: "Loaded", texts: list[tuple[str, ...]], *, json: bool, is_piped: bool) -> int:
    """Print the entities of texts, in a pipe with an empty line after those of each; none is truncated.

    Raises: UsageError for pairs of texts.
    """
    from llmctl.inference import entities

    if any(len(parts) > 1 for parts in texts):
        raise UsageError(
            f"`{loaded.artifact.path}` is a token classifier, which labels the tokens of one text, not of a pair",
            f'llmctl classify -m {shlex.quote(str(loaded.artifact.path))} "a text"',
        )
    for (text,), found in zip(texts, entities.find_entities(loaded, [text for (text,) in texts]), strict=True):
        if json:
            listed = [asdict(entity) | {"score": round(entity.score, 6)} for entity in found]
            result_json({"text": text, "entities": listed})
            continue
        for each in found:
            result(f"{each.score:.3f}\t{each.label}\t{each.start}\t{each.end}\t{on_one_line(each.text)}")
        if is_piped:
            result("")
    return 0


def find_answers(loaded: "Loaded", texts: list[tuple[str, ...]], *, json: bool, is_piped: bool) -> int:  # noqa: ARG001
    """Print the answers to questions; return how many questions were truncated."""
    from llmctl.inference import spans

    questions = [question_in(parts, loaded.artifact.path) for parts in texts]
    answers = spans.find_answers(loaded, questions)
    for (question, context), answer in zip(questions, answers, strict=True):
        if json:
            found = {"answer": answer.text, "score": round(answer.score, 6), "start": answer.start, "end": answer.end}
            result_json({"question": question, "context": context} | found)
        else:
            result(f"{answer.score:.3f}\t{answer.start}\t{answer.end}\t{on_one_line(answer.text)}")
    return sum(answer.is_cut for answer in answers)


def question_in(parts: tuple[str, ...], path: Path) -> tuple[str, str]:
    """Return a question and its context: two texts, a line with a tab, or a JSON object.

    Raises: UsageError for one text without a context.
    """
    whole = parts[0]
    if len(parts) == 1:
        try:
            row = parse_json(whole.encode()) if whole.lstrip().startswith("{") else None
        except ValueError:
            row = None
        given = [row.get(key) for key in ("question", "context")] if isinstance(row, dict) else whole.split("\t", 1)
        parts = tuple(text for text in given if isinstance(text, str))
    if len(parts) == 2:
        return parts[0], parts[1]
    raise UsageError(
        f"`{path}` is a question-answering model, which needs a question and a context to find the answer in, not "
        f"`{on_one_line(whole[:60])}` alone",
        f'llmctl classify -m {shlex.quote(str(path))} "QUESTION" "CONTEXT"; a line of standard input is '
        '`QUESTION<TAB>CONTEXT`, or `{"question": ..., "context": ...}`',
    )


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
