"""`llmctl export`: a model -> a single file, a Hugging Face folder, a GGUF or an ONNX file -> its path on stdout."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.commands.common import SameModel, command_app, find_model, note, one_name, result, result_json
from llmctl.errors import UsageError

app = command_app()


@app.command()
def export(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Model folder, X.safetensors, run, `latest`, or adapter (merged into its base); default: the newest run.",
        ),
    ] = None,
    named: SameModel = None,
    *,
    to: Annotated[
        str,
        typer.Option(
            help="single (one self-contained file), hf (Hugging Face folder), gguf, or onnx (encoders); gguf and onnx are verified."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="X.safetensors for single, folder for hf and onnx, X.gguf for gguf."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="GGUF type: f32, f16, bf16, q8_0, q6_K, q5_K, q5_1, q5_0, q4_K, q4_1, q4_0, iq4_nl, iq4_xs, q3_K or q2_K; "
            "default: f16.",
        ),
    ] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(
            "--calib", help="gguf: text to choose the codes on, as `llmctl quantize --to gguf` does; default: nearest."
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx: weights in 8 bits per output, inputs in 8 bits per token.")
    ] = False,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the path.")] = False,
) -> None:
    """Export a model as a single file, a Hugging Face folder, a GGUF or an ONNX file, and print its path.

    Examples:

      llmctl export latest --to single -o teacher.safetensors

      llmctl export teacher.safetensors --to hf -o teacher

      llmctl export teacher --to gguf --type q4_K -o teacher.gguf

      llmctl export classifier --to onnx --int8 -o classifier-onnx
    """
    check_flags(to, kind, calib, int8=int8)
    name = one_name(name, named)
    model = find_model(name, "any", quiet=quiet or name is not None)
    if calib:
        record = calibrated(model, out, kind, calib, force=force, quiet=quiet)
    elif to == "gguf":
        from llmctl.converting.export_gguf import export_gguf, report

        record = export_gguf(model, out, kind=kind or "f16", force=force)
        for line in report(record):
            note(line, quiet=quiet)
    elif to == "onnx":
        from llmctl.converting.export_onnx import export_onnx
        from llmctl.converting.export_onnx import report as report_onnx

        record = export_onnx(model, out, int8=int8, force=force)
        for line in report_onnx(record):
            note(line, quiet=quiet)
    else:
        record = {"path": str(write(model, out, to, force=force)), "to": to}
    if json:
        result_json(record)
    else:
        result(record["path"])


def check_flags(to: str, kind: str | None, calib: list[str] | None, *, int8: bool) -> None:
    """Refuse flags of another format.

    Raises: UsageError.
    """
    if kind is not None and to != "gguf":
        raise UsageError(
            f"`--type {kind}` applies to `--to gguf`, not to `--to {to}`", "use `--to gguf` or omit `--type`"
        )
    if calib and to != "gguf":
        raise UsageError(
            f"`--calib` applies to `--to gguf`, not to `--to {to}`", "`llmctl quantize MODEL --calib DATA`"
        )
    if int8 and to != "onnx":
        hint = "use `--to gguf --type q8_0`" if to == "gguf" else "`llmctl quantize --bits 8` first, or omit `--int8`"
        raise UsageError(f"`--int8` applies to `--to onnx`, not to `--to {to}`", hint)


def calibrated(
    model: Path, out: Path | None, kind: str | None, calib: list[str], *, force: bool, quiet: bool
) -> dict[str, Any]:
    """Quantize on data into a GGUF file and return the record of the run."""
    from llmctl.commands.launching import refuse_existing
    from llmctl.config import QuantizeConfig
    from llmctl.jobs.begin import begin

    kind = kind or "q4_K"
    if out is not None and out.suffix != ".gguf":
        raise UsageError(f"`--to gguf` writes a file X.gguf, but `{out}` is not one", "use `-o X.gguf`")
    out = out or Path(f"{model.resolve().stem if model.is_file() else model.resolve().name}-{kind}.gguf")
    refuse_existing(out, force=force)
    plain = QuantizeConfig()
    weights, data = replace(plain.weights, gguf=kind), replace(plain.data, paths=tuple(calib))
    config = replace(plain, model=str(model), data=data, weights=weights)
    trained = begin("quantize", config, invocation=shlex.join(["llmctl", *sys.argv[1:]]), out=out, quiet=quiet)
    assert trained is not None  # in one process
    return {**trained.summary["report"]["gguf"], "path": str(trained.path)}


def write(model: Path, out: Path | None, to: str, *, force: bool) -> Path:
    """Write a safetensors file or folder."""
    from llmctl.converting.convert import export_model

    if out is None:
        raise UsageError(f"`--to {to}` needs an output path", "name it with `-o`")
    return export_model(model, out, to=to, force=force)
