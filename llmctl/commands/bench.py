"""`llmctl bench`: how fast models read and write on this machine, side by side."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app, find_model, note, result, result_json, table
from llmctl.errors import UsageError

app = command_app()

NAME_WIDTH = 24


@app.command()
def bench(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Model folders, files or runs.")
    ] = None,
    shape: Annotated[
        str, typer.Option(help="Random weights instead: 30M, 135M, 1.1B or a preset; several with commas.")
    ] = "",
    scheme: Annotated[str, typer.Option(help="Of --shape: fp32, bf16, int8, w8a8, int4, ... with commas.")] = "bf16",
    kv: Annotated[str, typer.Option(help="Keys and values of past tokens: float, int8; both with a comma.")] = "float",
    batch: Annotated[str, typer.Option(help="Rows side by side, several with commas.")] = "1,4,16",
    prompt: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 128,
    tokens: Annotated[int, typer.Option("-n", "--tokens", help="Tokens that follow it.")] = 32,
    data: Annotated[
        str,
        typer.Option(
            "-d", "--data", help="A text: also tell its loss when written token by token, and without rounding."
        ),
    ] = "",
    cold: Annotated[bool, typer.Option("--cold", help="Also time a fresh process up to its first token.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of the products; 0 leaves torch's number.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of MODEL: auto, float32, bfloat16 or float16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on standard error but errors.")] = False,
) -> None:
    """Measure tokens per second on this machine's CPU, reading and writing, of one model or several side by side.

    Examples:

      llmctl bench --shape 30M --scheme bf16,int8,int4

      llmctl bench --shape 30M --kv float,int8 --prompt 1024

      llmctl bench teacher.safetensors student.safetensors --batch 1 --cold

      llmctl bench latest --kv float,int8 --data book.txt
    """
    sizes = parse_batches(batch)
    shapes = [name for name in shape.split(",") if name]
    if data and shapes:
        raise UsageError("--data needs models that know its language, --shape draws their weights", "name models")
    paths = [find_model(name, "generate", quiet=quiet) for name in models or []]
    if not paths and not shapes:
        paths = [find_model(None, "generate", quiet=quiet)]

    import torch

    from llmctl.benchmarking import bench as engine
    from llmctl.benchmarking.random_models import random_model, shape_config

    if threads > 0:
        torch.set_num_threads(threads)
    config = engine.BenchConfig(prompt, tokens, sizes)
    kinds = kv.split(",")
    engine.check_kv(kinds)
    subjects = [engine.load_subject(path, dtype, kind, data) for path in paths for kind in kinds]
    for name in shapes:
        found = shape_config(name)
        for precision in scheme.split(","):
            note(f"drawing {name} in {precision}", quiet=quiet)
            make = partial(random_model, found, precision)
            subjects += [engine.subject_of(f"{name} {precision}", make, kind) for kind in kinds]
    engine.measure(subjects, config)
    if cold:
        for subject, path in zip(subjects, [path for path in paths for _ in kinds], strict=False):
            subject.cold_seconds = engine.cold_seconds(path, dtype, subject.kv)
    record = engine.report(subjects, config)
    if json:
        result_json(record)
        return
    for line in render(record):
        result(line)


def parse_batches(text: str) -> tuple[int, ...]:
    """Return the numbers of rows.

    Raises: UsageError for what is none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`--batch {text}` is not a list of numbers", "--batch 1,4,16") from None


def render(record: Mapping[str, Any]) -> list[str]:
    """Return the lines a person reads, none wider than 79 columns."""
    rows = []
    for model in record["models"]:
        for position, found in enumerate(model["batches"]):
            rows.append(
                {
                    "model": model["name"][-NAME_WIDTH:] if position == 0 else "",
                    "batch": found["batch"],
                    "cache MB": f"{found['cache_bytes'] / 1e6:,.1f}",
                    "read tok/s": f"{found['prefill_tokens_per_second']:,.0f}",
                    "write tok/s": f"{found['decode_tokens_per_second']:,.1f}",
                    "ratio": f"{found['decode_ratio']:.2f}",
                }
            )
    columns = ("model", "batch", "cache MB", "read tok/s", "write tok/s", "ratio")
    lines = table(columns, rows, right=set(columns) - {"model"})
    lines.append("")
    for model in record["models"]:
        facts = [f"{model['memory_bytes'] / 1e6:,.0f} MB"]
        if model["first_token_seconds"] is not None:
            facts.append(f"first token {1000 * model['first_token_seconds']:,.0f} ms")
            facts.append(f"roofline {100 * model['roofline_frac']:.0f} %")
        if model["cold_seconds"] is not None:
            facts.append(f"cold {model['cold_seconds']:.1f} s")
        lines.append(f"{model['name'][-NAME_WIDTH:]}: {', '.join(facts)}")
        if loss := model["loss"]:
            lines.append(
                f"  loss {loss['read']:.3f} read, {loss['written']:.3f} written: perplexity "
                f"{100 * loss['perplexity_change']:+.2f} %, same best token {100 * loss['same_best_frac']:.1f} %"
            )
    rate = record["read_bytes_per_second"] / 1e9
    lines.append(f"{record['threads']} threads read {rate:.1f} GB/s; ratio: writing, to the first model")
    return lines
