"""`llmctl export`: a model -> a single file, a Hugging Face folder or a GGUF file -> its path on stdout."""

from pathlib import Path
from typing import Annotated

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
            help="single (one self-contained file), hf (Hugging Face folder), or gguf (verified by reading it back)."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="X.safetensors for single, folder for hf, X.gguf for gguf.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="GGUF type: f32, f16, bf16, q8_0, q6_K, q5_K, q5_1, q5_0, q4_K, q4_1, q4_0, iq4_nl, iq4_xs, q3_K or q2_K; "
            "default: f16.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the path.")] = False,
) -> None:
    """Export a model as a single file, a Hugging Face folder or a GGUF file, and print its path.

    Examples:

      llmctl export latest --to single -o teacher.safetensors

      llmctl export teacher.safetensors --to hf -o teacher

      llmctl export teacher --to gguf --type q4_K -o teacher.gguf
    """
    name = one_name(name, named)
    model = find_model(name, "any", quiet=quiet or name is not None)
    if to == "gguf":
        from llmctl.converting.export_gguf import export_gguf, report

        record = export_gguf(model, out, kind=kind or "f16", force=force)
        for line in report(record):
            note(line, quiet=quiet)
    else:
        record = {"path": str(write(model, out, to, kind, force=force)), "to": to}
    if json:
        result_json(record)
    else:
        result(record["path"])


def write(model: Path, out: Path | None, to: str, kind: str | None, *, force: bool) -> Path:
    """Write a safetensors file or folder."""
    from llmctl.converting.convert import export_model

    if kind is not None:
        raise UsageError(
            f"`--type {kind}` applies to `--to gguf`, not to `--to {to}`", "use `--to gguf` or omit `--type`"
        )
    if out is None:
        raise UsageError(f"`--to {to}` needs an output path", "name it with `-o`")
    return export_model(model, out, to=to, force=force)
