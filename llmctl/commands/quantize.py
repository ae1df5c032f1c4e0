"""`llmctl quantize`: flags -> QuantizeConfig -> one run -> the model's path on stdout, a report on stderr."""

from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app
from llmctl.commands.training import Options, run_training, with_model, with_options
from llmctl.errors import UsageError

app = command_app()


@app.command()
@with_options
def quantize(
    *,
    options: Options,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A model folder, a file or a run.")] = None,
    bits: Annotated[int | None, typer.Option("-b", "--bits", help="8, 6, 5, 4, 3 or 2: int8 ... int2.")] = None,
    scheme: Annotated[str | None, typer.Option(help="int8, w8a8, int4-sym, or int6 ... int2.")] = None,
    group: Annotated[int | None, typer.Option(help="Inputs that share a scale; 0 is the whole row.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="nearest, clip, weighted, hqq, awq, gptq, awq-gptq, guided or learned; else by bits."),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Share bits out among layers within a size of the model: 60MB.")
    ] = None,
    target_bpw: Annotated[
        float | None, typer.Option(help="Share bits out among layers within bits per weight: 4.25.")
    ] = None,
    embedding: Annotated[str | None, typer.Option(help="Embedding and head: int8, int4 or float.")] = None,
    calib: Annotated[
        list[str] | None, typer.Option("--calib", "-d", "--data", help="Text or examples; else the embedded corpus.")
    ] = None,
    val: Annotated[list[str] | None, typer.Option(help="What is measured on; else a share of the data.")] = None,
    task: Annotated[str | None, typer.Option(help="text, chat, classify, translate, ...; else the model's.")] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Exit with 10 if the model gets worse by more: 0.05, or 1%.")
    ] = None,
) -> int:
    """Hold a model's weights in few bits: smaller, often faster, and measured before and after.

    Prints the model's folder; the report is a table and `report.json`.

    Examples:

      llmctl quantize latest --bits 4

      llmctl quantize model.safetensors --bits 8 --calib corpus/ --max-drop 1% -o small.safetensors

      llmctl quantize latest --target-size 2MB

      llmctl quantize runs/0003 --bits 3 --method learned --steps 200 --calib corpus/
    """
    from llmctl.config import QuantizeConfig
    from llmctl.quant.schemes import BY_BITS

    if bits is not None and scheme is not None:
        raise UsageError("--bits and --scheme say the same", "leave one out")
    if bits is not None and bits not in BY_BITS:
        raise UsageError(f"`--bits {bits}` is not known", "8, 6, 5, 4, 3 or 2")
    flags: dict[str, Any] = {
        "weights.scheme": scheme if bits is None else BY_BITS[bits],
        "weights.group": group,
        "weights.method": method,
        "weights.embedding": embedding,
        "weights.target_size": target_size,
        "weights.target_bpw": target_bpw,
        "data.paths": calib or None,
        "data.val_paths": val or None,
        "task": task,
        "max_drop": max_drop,
    }
    resolved = options.resolve(QuantizeConfig, flags)
    if options.resume in (None, "auto"):
        resolved = with_model(resolved, model, quiet=options.quiet)

    return run_training("quantize", resolved, options)
