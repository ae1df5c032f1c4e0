"""`llmctl bench`: prefill and decoding speed of models on this machine, as a table or JSON on stdout."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer

from llmctl.commands.common import (
    SameModels,
    command_app,
    find_model,
    note,
    prepare_decoding,
    result,
    result_json,
    table,
)
from llmctl.errors import UsageError

app = command_app()

NAME_WIDTH = 24


@app.command()
def bench(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Model folders, files or runs.")
    ] = None,
    named: SameModels = None,
    shape: Annotated[
        str, typer.Option(help="Use random weights of these sizes: 30M, 135M, 1.1B or presets, comma-separated.")
    ] = "",
    scheme: Annotated[
        str, typer.Option(help="Precisions of --shape, comma-separated: fp32, bf16, int8, w8a8, int4, ...")
    ] = "bf16",
    kv: Annotated[str, typer.Option(help="KV cache, comma-separated: float, int8.")] = "float",
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,16",
    prompt: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 128,
    tokens: Annotated[int, typer.Option("-n", "--tokens", help="Tokens to generate.")] = 32,
    data: Annotated[
        str,
        typer.Option(
            "-d", "--data", help="Text file: also measure its loss token by token, and without a quantized cache."
        ),
    ] = "",
    cold: Annotated[bool, typer.Option("--cold", help="Also time a new process up to its first token.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the default of PyTorch.")] = 0,
    dtype: Annotated[str, typer.Option(help="Precision of MODEL: auto, float32, bfloat16 or float16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Measure tokens per second of prefill and decoding on this machine's CPU, for one or several models.

    Examples:

      llmctl bench --shape 30M --scheme bf16,int8,int4

      llmctl bench --shape 30M --kv float,int8 --prompt 1024

      llmctl bench teacher.safetensors student.safetensors --batch 1 --cold

      llmctl bench latest --kv float,int8 --data book.txt
    """
    sizes = parse_batches(batch)
    shapes = [name for name in shape.split(",") if name]
    if data and shapes:
        raise UsageError(
            f"`--data {data}` needs trained models, `--shape {shape}` has random weights",
            "name model folders instead of --shape",
        )
    paths = [find_model(name, "generate", quiet=quiet) for name in [*(models or []), *(named or [])]]
    if not paths and not shapes:
        paths = [find_model(None, "generate", quiet=quiet)]

    import torch

    from llmctl.benchmarking import bench as engine
    from llmctl.benchmarking.random_models import random_model, shape_config

    if threads > 0:
        torch.set_num_threads(threads)
    prepare_decoding(quiet=quiet)
    config = engine.BenchConfig(prompt, tokens, sizes)
    kinds = kv.split(",")
    engine.check_kv(kinds)
    subjects = [engine.load_subject(path, dtype, kind, data) for path in paths for kind in kinds]
    for name in shapes:
        config_of_shape = shape_config(name)
        for precision in scheme.split(","):
            note(f"initializing {name} in {precision}", quiet=quiet)
            make = partial(random_model, config_of_shape, precision)
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
    """Return the batch sizes.

    Raises: UsageError for text that is not a list of integers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`--batch {text}` is not a list of numbers", "--batch 1,4,16") from None


def render(record: Mapping[str, Any]) -> list[str]:
    """Return the report as lines of at most 79 columns."""
    rows = []
    for model in record["models"]:
        for position, batch in enumerate(model["batches"]):
            rows.append(
                {
                    "model": model["name"][-NAME_WIDTH:] if position == 0 else "",
                    "batch": batch["batch"],
                    "cache MB": f"{batch['cache_bytes'] / 1e6:,.1f}",
                    "prefill tok/s": f"{batch['prefill_tokens_per_second']:,.0f}",
                    "decode tok/s": f"{batch['decode_tokens_per_second']:,.1f}",
                    "ratio": f"{batch['decode_ratio']:.2f}",
                }
            )
    columns = ("model", "batch", "cache MB", "prefill tok/s", "decode tok/s", "ratio")
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
        lines.append(f"  decoding: {model['decoding']}")
        if loss := model["loss"]:
            lines.append(
                f"  loss {loss['read']:.3f} prefill, {loss['written']:.3f} decode: perplexity "
                f"{100 * loss['perplexity_change']:+.2f} %, top-1 agreement {100 * loss['same_best_frac']:.1f} %"
            )
    rate = record["read_bytes_per_second"] / 1e9
    lines.append(
        f"{record['threads']} threads, {rate:.1f} GB/s memory bandwidth; ratio: decode relative to first model"
    )
    return lines
