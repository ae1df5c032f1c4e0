"""`llmctl quantize`: flags -> QuantizeConfig -> one run -> the model's path on stdout, the report on stderr."""

import time
from collections.abc import Mapping
from typing import Annotated

import typer

from llmctl.commands.before_torch import refuse_early
from llmctl.commands.common import SameModel, command_app, one_name, result, result_json
from llmctl.commands.grouped_help import settings_of
from llmctl.commands.model_argument import needs_model, with_model
from llmctl.commands.options import Options, help_of, with_options
from llmctl.commands.training import run_training
from llmctl.config import MIXED, QuantizeConfig
from llmctl.errors import UsageError
from llmctl.quant.schemes import BY_BITS

app = command_app()


SETTINGS = {
    "scheme": "weights.scheme",
    "group": "weights.group",
    "method": "weights.method",
    "embedding": "weights.embedding",
    "target_size": "weights.target_size",
    "target_bpw": "weights.target_bpw",
    "gguf": "weights.gguf",
    "calib": "data.paths",
    "val": "data.val_paths",
    "task": "task",
    "max_drop": "max_drop",
}
"""The config keys that the options set."""


@app.command(cls=help_of(QuantizeConfig, SETTINGS))
@with_options
def quantize(
    *,
    options: Options,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder, file or run.")] = None,
    named: SameModel = None,
    bits: Annotated[
        int | None, typer.Option("-b", "--bits", help=f"Bits per weight [{', '.join(map(str, BY_BITS))}]")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Scheme, instead of --bits")] = None,
    group: Annotated[int | None, typer.Option(help="Group size: inputs that share a scale; 0: the whole row.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How codes and scales are chosen; default: by bits"),
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
    task: Annotated[str | None, typer.Option(help="Task; default: the model's")] = None,
    to: Annotated[str | None, typer.Option(help="gguf: write a GGUF file for llama.cpp.")] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="GGUF type, as of `llmctl export`; default: q4_K, or mixed within a size."),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Exit with code 10 if the model gets worse by more: 0.05 or 1%.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the data, print memory and time, and exit.")] = False,
) -> int:
    """Quantize a model, measure it before and after, and print its folder.

    Examples:

      llmctl quantize latest --bits 4

      llmctl quantize model.safetensors --bits 8 --calib corpus/ --max-drop 1% -o small.safetensors

      llmctl quantize latest --target-size 2MB

      llmctl quantize model.safetensors --to gguf --target-size 90MB --calib corpus/ -o small.gguf

      llmctl quantize runs/0003 --bits 3 --method learned --steps 200 --calib corpus/
    """
    if bits is not None and scheme is not None:
        raise UsageError(f"`--bits {bits}` and `--scheme {scheme}` set the same thing", "use only one")
    if bits is not None and bits not in BY_BITS:
        raise UsageError(f"`--bits {bits}` is not supported", "use 8, 6, 5, 4, 3 or 2")
    if bits is not None:
        scheme = BY_BITS[bits]
    gguf = gguf_type(to, kind, target_size)
    if gguf is not None:
        refuse_ours({"--bits": bits, "--scheme": scheme, "--group": group, "--embedding": embedding})
    model = one_name(model, named)
    flags = settings_of(SETTINGS, locals())
    resolved = options.resolve(QuantizeConfig, flags)
    if needs_model(options, model, resolved.config):
        resolved = with_model(resolved, model, quiet=options.quiet)
    if dry_run and not options.print_config:
        refuse_early("quantize", resolved.config)
        from llmctl.jobs.quantize_dry_run import dry_run as plan

        estimate = plan(resolved.config, options.called_at or time.monotonic())
        result_json(estimate.to_dict()) if options.json else result(estimate.render())
        return 0
    return run_training("quantize", resolved, options)


def gguf_type(to: str | None, kind: str | None, target_size: str | None) -> str | None:
    """Return the GGUF type that `--to` and `--type` ask for.

    Raises: UsageError for one without the other, or another format.
    """
    if to is None:
        if kind is not None:
            raise UsageError(f"`--type {kind}` applies to `--to gguf`", "add `--to gguf`, or use --bits or --scheme")
        return None
    if to.lower() != "gguf":
        raise UsageError(
            f"`--to {to}` is not supported", "--to takes gguf; without it the model is written as safetensors"
        )
    if kind is not None and target_size is not None:
        raise UsageError(
            f"`--type {kind}` and `--target-size {target_size}` exclude each other: a size mixes types",
            "omit one of them",
        )
    if kind == "":
        raise UsageError("`--type` is empty", "--type takes a GGUF type, such as q4_K")
    return kind or ("q4_K" if target_size is None else MIXED)


def refuse_ours(given: Mapping[str, object]) -> None:
    """Refuse options of our own schemes.

    Raises: UsageError naming the first that is given.
    """
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"`{name} {value}` has no effect on a GGUF file", "--type names its format: q4_K, q2_K, ..."
            )
