"""`llmctl export`: a model -> a single file, a Hugging Face folder, a GGUF or an ONNX file -> its path on stdout."""

import shlex
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
        typer.Option("--type", help="GGUF type: f32, f16, bf16, q8_0, q6_K, q5_0, q4_1, q4_0 or q4_K; default: f16."),
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
    check_flags(to, kind, int8=int8)
    name = one_name(name, named)
    model = find_model(name, "any", quiet=quiet or name is not None)
    if to == "gguf":
        from llmctl.converting.export_gguf import export_gguf

        record = export_gguf(model, out, kind=kind or "f16", force=force)
        for line in report(record):
            note(line, quiet=quiet)
    elif to == "onnx":
        from llmctl.converting.export_onnx import export_onnx

        record = export_onnx(model, out, int8=int8, force=force)
        for line in report_onnx(record):
            note(line, quiet=quiet)
    else:
        record = {"path": str(write(model, out, to, force=force)), "to": to}
    if json:
        result_json(record)
    else:
        result(record["path"])


def check_flags(to: str, kind: str | None, *, int8: bool) -> None:
    """Refuse flags of another format.

    Raises: UsageError.
    """
    if kind is not None and to != "gguf":
        raise UsageError(
            f"`--type {kind}` applies to `--to gguf`, not to `--to {to}`", "use `--to gguf` or omit `--type`"
        )
    if int8 and to != "onnx":
        hint = "use `--to gguf --type q8_0`" if to == "gguf" else "`llmctl quantize --bits 8` first, or omit `--int8`"
        raise UsageError(f"`--int8` applies to `--to onnx`, not to `--to {to}`", hint)


def write(model: Path, out: Path | None, to: str, *, force: bool) -> Path:
    """Write a safetensors file or folder."""
    from llmctl.converting.convert import export_model

    if out is None:
        raise UsageError(f"`--to {to}` needs an output path", "name it with `-o`")
    return export_model(model, out, to=to, force=force)


def report(record: dict[str, Any]) -> list[str]:
    """Return the lines that report what was written and verified."""
    proof = record["proof"]
    n_tokens, vectors = proof["llama_cpp_tokens"], proof["llama_cpp_cosine"]
    compared = "not installed" if n_tokens is None else f"{n_tokens} of {proof['llama_cpp_of']} greedy tokens"
    compared = compared if vectors is None else f"vectors with a cosine of at least {vectors:.4f}"
    equal = f"{proof['tensors_equal']} tensors and the token ids of {proof['texts_equal']} texts are as expected"
    kept = f"vectors with a cosine of at least {proof['cosine']:.4f}" if proof["cosine"] is not None else ""
    if proof["kl"] is not None:
        kept = f"KL {proof['kl']:.4g} nats/token, {proof['top1']:.1%} top-1 agreement ({proof['tokens']} tokens)"
    made = f"{record['type']}, {record['bits_per_weight']:.2f} bits per weight, {record['bytes'] / 1e6:.1f} MB"
    others = [
        f"note: {other['tensors']} tensors are {other['block']}: rows of {other['row']} do not divide into blocks of "
        f"{other['wanted']}"
        for other in record["other_blocks"]
    ]
    if window := record["ignored_window"]:
        others.append(f"note: llama.cpp ignores the attention window of {window:,} tokens: longer texts differ there")
    program = "llama-cli" if proof["cosine"] is None else "llama-embedding"
    return [
        *others,
        f"read back: {equal}, logits within {proof['logits_max_difference']:.1g}; llama_cpp: {compared}",
        f"compared with the original: {kept}",
        f"{record['path']}: {made}; next: {program} -m {shlex.quote(record['path'])}",
    ]


def report_onnx(record: dict[str, Any]) -> list[str]:
    """Return the lines that report what was written and verified."""
    proof = record["proof"]
    what = "our model" if proof["cosine"] is None else "our model with the same rounding"
    lines = [f"note: {reason}" for reason in record["missing"]]
    equal = f"the token ids of {proof['texts_equal']} texts are as expected, " if proof["texts_equal"] else ""
    lines.append(
        f"read back in ONNX Runtime: {equal}outputs of {proof['rows']} padded texts within {proof['difference']:.1g} of "
        f"{what} (relative to the largest)"
    )
    if proof["cosine"] is not None:
        lines.append(f"compared with the original: outputs with a cosine of at least {proof['cosine']:.4f}")
    made = f"{record['type']}, opset {record['opset']}, {record['bytes'] / 1e6:.1f} MB"
    return [*lines, f"{record['file']}: {made}; inputs {', '.join(record['inputs'])}"]
