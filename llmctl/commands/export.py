"""`llmctl export`: a model of ours -> one file, a Hugging Face folder or a GGUF file -> its path on stdout."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app, note, result, result_json
from llmctl.errors import UsageError

app = command_app()


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, X.safetensors, or an adapter.")],
    to: Annotated[str, typer.Option(help="single (one self-contained file), hf (a Hugging Face folder), or gguf.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="X.safetensors for single, a folder for hf, X.gguf for gguf.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="Of gguf: f32, f16, bf16, q8_0, q6_K, q5_0, q4_1, q4_0, q4_K; f16 if not given."),
    ] = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace what -o names.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the path only.")] = False,
) -> None:
    """Write a model as one file, a Hugging Face folder, or a GGUF file; prints where it is.

    An adapter is merged into its base. A GGUF file is read back and compared before it appears.

    Examples:

      llmctl export runs/latest --to single -o teacher.safetensors

      llmctl export teacher.safetensors --to hf -o teacher

      llmctl export teacher --to gguf --type q4_K -o teacher.gguf
    """
    if to == "gguf":
        from llmctl.converting.export_gguf import export_gguf

        record = export_gguf(model, out, kind=kind or "f16", force=force)
        for line in told(record):
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
        raise UsageError(f"`--type {kind}` is of GGUF files, not of `--to {to}`", "--to gguf, or leave --type out")
    if out is None:
        raise UsageError(f"`--to {to}` needs a place", "name it with -o")
    return export_model(model, out, to=to, force=force)


def told(record: dict[str, Any]) -> list[str]:
    """Return what was made and found, for the person watching."""
    proof = record["proof"]
    n_tokens = proof["llama_cpp_tokens"]
    compared = "not installed" if n_tokens is None else f"{n_tokens} of {proof['llama_cpp_of']} greedy tokens"
    equal = f"{proof['tensors_equal']} tensors and the ids of {proof['texts_equal']} texts are as meant"
    kept = f"KL {proof['kl']:.4g} nats/token, {proof['top1']:.1%} same best token ({proof['tokens']} tokens)"
    made = f"{record['type']}, {record['bits_per_weight']:.2f} bits per weight, {record['bytes'] / 1e6:.1f} MB"
    others = [
        f"note: {other['block']} for {other['tensors']} of the tensors: rows of {other['row']} are no whole blocks of "
        f"{other['wanted']}"
        for other in record["other_blocks"]
    ]
    return [
        *others,
        f"read back: {equal}, logits within {proof['logits_max_difference']:.1g}; llama_cpp: {compared}",
        f"against the original: {kept}",
        f"{record['path']}: {made}; next: llama-cli -m {record['path']}",
    ]
