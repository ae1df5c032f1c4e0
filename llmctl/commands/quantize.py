"""`llmctl quantize`: flags -> QuantizeConfig -> one run -> the model's path on stdout, the report on stderr."""

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
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder, file or run.")] = None,
    bits: Annotated[int | None, typer.Option("-b", "--bits", help="8, 6, 5, 4, 3 or 2, for int8 ... int2.")] = None,
    scheme: Annotated[str | None, typer.Option(help="int8, w8a8, int4-sym, or int6 ... int2.")] = None,
    group: Annotated[int | None, typer.Option(help="Group size: inputs that share a scale; 0: the whole row.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="nearest, clip, weighted, hqq, awq, gptq, awq-gptq, guided or learned; default: by bits."),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Allocate bits over the layers within this model size: 60MB.")
    ] = None,
    target_bpw: Annotated[
        float | None, typer.Option(help="Allocate bits over the layers within this mean of bits per weight: 4.25.")
    ] = None,
    embedding: Annotated[str | None, typer.Option(help="Scheme of embedding and head: int8, int4 or float.")] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option("--calib", "-d", "--data", help="Text or examples; default: the built-in corpus."),
    ] = None,
    val: Annotated[list[str] | None, typer.Option(help="Validation data; default: a fraction of the data.")] = None,
    task: Annotated[
        str | None, typer.Option(help="text, chat, classify, translate, ...; default: the model's.")
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Exit with code 10 if the model gets worse by more: 0.05 or 1%.")
    ] = None,
) -> int:
    """Quantize a model, measure it before and after, and print its folder.

    Examples:

      llmctl quantize latest --bits 4

      llmctl quantize model.safetensors --bits 8 --calib corpus/ --max-drop 1% -o small.safetensors

      llmctl quantize latest --target-size 2MB

      llmctl quantize runs/0003 --bits 3 --method learned --steps 200 --calib corpus/
    """
    from llmctl.config import QuantizeConfig
    from llmctl.quant.schemes import BY_BITS

    if bits is not None and scheme is not None:
        raise UsageError(f"`--bits {bits}` and `--scheme {scheme}` set the same thing", "use only one")
    if bits is not None and bits not in BY_BITS:
        raise UsageError(f"`--bits {bits}` is not supported", "use 8, 6, 5, 4, 3 or 2")
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
