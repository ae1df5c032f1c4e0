"""`llmctl inspect`: the metadata of a model -> stdout, without loading torch."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from llmctl.commands.common import SameModel, command_app, find_model, one_name, result, result_json
from llmctl.runs.terminal import on_one_line

app = command_app()


@app.command()
def inspect(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Model or adapter folder, X.safetensors, X.gguf, run or `latest`; default: the newest run.",
        ),
    ] = None,
    named: SameModel = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its dtype and shape.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the metadata of a model without loading its weights.

    Examples:

      llmctl inspect latest

      llmctl inspect teacher.safetensors --tensors
    """
    from llmctl.formats.describe import describe

    name = one_name(name, named)
    record = describe(find_model(name, "any", quiet=name is not None or json))
    listed = record.pop("tensors")
    if json:
        result_json(record | ({"tensors": listed} if tensors else {}))
        return
    for line in lines(record):
        result(on_one_line(line))
    if tensors:
        for name, (dtype, shape) in listed.items():
            result(on_one_line(f"  {name}  {dtype} {shape}"))


def lines(record: dict[str, Any]) -> list[str]:
    """Return one line per entry, the long ones last."""
    long = ("config", "provenance", "metadata", "files", "dtypes")
    shown = {key: value for key, value in record.items() if key not in long}
    shown["parameters"], shown["bytes"] = f"{record['parameters']:,}", f"{record['bytes']:,}"
    shown["dtypes"] = ", ".join(f"{count} {dtype}" for dtype, count in record["dtypes"].items())
    shown["files"] = ", ".join(record.get("files", [])) or None
    if isinstance(labels := shown.get("labels"), list):
        shown["labels"] = one_line(", ".join(labels))
    shown["quantized"] = quantization(record.get("quantized") or {})
    rows = [f"{key:<13} {value}" for key, value in shown.items() if value is not None]
    for part in ("provenance", "metadata"):
        rows += [f"{part + ':':<13} {key} = {one_line(value)}" for key, value in flat(record.get(part, {}))]
    return rows


def quantization(schemes: dict[str, dict[str, Any]]) -> str | None:
    """Return the number of quantized modules per scheme."""
    counts: dict[str, int] = {}
    for scheme in schemes.values():
        group = f" in groups of {scheme['group']}" if scheme["group"] else ""
        name = f"in {scheme['bits']} bits{group}{', 8-bit activations' if scheme['activations'] else ''}"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or None


def flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries with dotted keys, and lists as text with commas."""
    for key, value in entries.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", value


def one_line(value: Any) -> str:
    """Return a value on one line of at most 200 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"
