"""Render an example as the model sees it: the prompt and the trained parts (`--show-example`)."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from llmctl.artifacts.load import Loaded
from llmctl.inference.encoding import require_tokenizer
from llmctl.preparing.example_rows import ExampleRow
from llmctl.tokenizer.base import Tokenizer


def show_example(base: Loaded, row: ExampleRow, task: Mapping[str, Any]) -> str:
    """Return an example as lines, given and trained parts alternating, special tokens by name."""
    tokenizer = require_tokenizer(base)
    head = f"example ({row.where}): {len(row.ids)} tokens"
    if row.trained:
        lines = [f"{head}, {sum(row.trained[1:])} of them trained"]
        for is_trained, group in groupby(zip(row.trained, row.ids, strict=True), key=lambda pair: pair[0]):
            lines.append(line("trained" if is_trained else "given", tokenizer, [index for _, index in group]))
        return "\n".join(lines)
    lines = [head, line("given", tokenizer, row.ids)]
    if row.target:
        return "\n".join([*lines, line("trained", tokenizer, row.target)])
    values = list(row.values)
    if task.get("problem") == "single":
        values = [task["labels"][int(values[0])]]
    elif task.get("problem") == "multi":
        values = [name for name, value in zip(task["labels"], values, strict=True) if value]
    return "\n".join([*lines, f"  label    {', '.join(map(str, values))}"])


def line(title: str, tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return one part as a line with its title."""
    return f"  {title:<8} {spelled(tokenizer, ids)}"


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return ids as text on one line, special tokens by name."""
    data = b"".join(tokenizer.decode_bytes([index]) or tokenizer.piece(index).encode() for index in ids)
    return data.decode("utf-8", "replace").replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
