"""Rows of jsonl, json, csv, tsv and parquet files."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmctl.data.text_files import BLOCK_BYTES, STDIN, _kind, is_csv, numbered_lines, text_blocks
from llmctl.errors import MissingExtraError, UsageError


def is_table(name: str) -> bool:
    """Say whether the file has rows with fields; .tsv and plain text are lines."""
    return _kind(Path(name)) in ROW_READERS and _kind(Path(name)) != ".tsv"


def read_rows(name: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of a table file: a dict per line or row, or the bare JSON value; `columns` narrows parquet.

    Raises: UsageError for a file without rows; stdin is JSON lines.
    """
    kind = ".jsonl" if name == STDIN else _kind(Path(name))
    if kind not in ROW_READERS:
        raise UsageError(f"`{name}` has no rows with fields", f"known endings: {' '.join(ROW_READERS)}")
    if kind == ".parquet":
        yield from _parquet_rows(name, columns)
    else:
        yield from ROW_READERS[kind](name)


def read_cells(name: str, names: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (where, cells by column) of a csv, or of tab-separated lines under any other ending or from stdin.

    `names` are the columns of a table without a header; otherwise the first line names them.

    Raises: UsageError naming the line whose cells are fewer or more than the columns.
    """
    shown = "stdin" if name == STDIN else name
    reader = _csv_reader(name) if is_csv(name) else _tsv_reader(name)
    header = list(names)
    for number, cells in _numbered_cells(shown, reader):
        if not header:
            header = cells
        elif len(cells) != len(header):
            listed = ", ".join(f"`{column}`" for column in header)
            raise UsageError(
                f"`{shown}` line {number} has {len(cells)} cells, not {len(header)}: the columns are {listed}",
                "mend that line" if not names else "name every column, or mend that line",
            )
        else:
            yield f"`{shown}` line {number}", dict(zip(header, cells, strict=True))


def row_text(row: Any, key: str, where: str, setting: str = "data.text_key") -> str:
    """Return a row's text: a string, or a list of strings joined by newlines; `setting` is what chooses the key.

    Raises: UsageError naming the place when the field is missing or no text.
    """
    value = row
    if isinstance(row, dict):
        if key not in row:
            close = get_close_matches(key, [str(k) for k in row], n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"name the field with --set {setting}=NAME"
            raise UsageError(f"{where} has no field `{key}`; it has {', '.join(f'`{k}`' for k in row)}", hint)
        value = row[key]
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise UsageError(f"{where}: `{key}` is {type(value).__name__}, not text", "name another field")
    return whole_characters(value)


def whole_characters(text: str) -> str:
    """Replace lone surrogates, which JSON can spell but UTF-8 cannot hold, with U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _jsonl_rows(name: str) -> Iterator[tuple[str, Any]]:
    for number, line in numbered_lines(name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"`{name}` line {number} is not JSON: {error}", "one JSON value per line") from error
        yield f"`{name}` line {number}", row


def _json_rows(name: str) -> Iterator[tuple[str, Any]]:
    """Read a JSON array value by value, whatever its size, or one value, or values in a row."""
    decoder = json.JSONDecoder()
    blocks = text_blocks(name)
    buffer, position, index, wanted, ended = "", 0, 0, BLOCK_BYTES // 2, False
    while True:
        while not ended and len(buffer) - position < wanted:
            block = next(blocks, None)
            buffer, position, ended = buffer[position:] + (block.text if block else ""), 0, block is None
        position = _skip(buffer, position, " \t\r\n[" if index == 0 else " \t\r\n,")
        if position == len(buffer) or buffer[position] == "]":
            return
        try:
            row, position = decoder.raw_decode(buffer, position)
        except ValueError as error:
            if ended:
                raise UsageError(f"`{name}` item {index} is not JSON: {error}", "check the file") from error
            wanted = 2 * (len(buffer) - position)  # the value may be longer than what was read
            continue
        except RecursionError as error:
            raise UsageError(f"`{name}` item {index} is not JSON we can read: {error}", "check the file") from error
        yield f"`{name}` item {index}", row
        index, wanted = index + 1, BLOCK_BYTES // 2


def _skip(text: str, position: int, signs: str) -> int:
    """Return the place of the next value, past blanks and one bracket or comma."""
    blanks, mark = signs[:-1], signs[-1]
    while position < len(text) and text[position] in blanks:
        position += 1
    if position < len(text) and text[position] == mark:
        position += 1
        while position < len(text) and text[position] in blanks:
            position += 1
    return position


def _csv_rows(name: str) -> Iterator[tuple[str, Any]]:
    yield from _delimited(name, _csv_reader(name))


def _tsv_rows(name: str) -> Iterator[tuple[str, Any]]:
    yield from _delimited(name, _tsv_reader(name))


def _csv_reader(name: str) -> Any:
    return csv.reader(_csv_lines(name), strict=True)


def _tsv_reader(name: str) -> Any:
    return csv.reader(_csv_lines(name), delimiter="\t", quoting=csv.QUOTE_NONE)


def _csv_lines(name: str) -> Iterator[str]:
    csv.field_size_limit(1 << 30)  # the default of 128 KB is a limit for spreadsheets, not for documents
    return (line for _, line in numbered_lines(name))


def _delimited(name: str, reader: Any) -> Iterator[tuple[str, Any]]:
    header: list[str] | None = None
    for number, cells in _numbered_cells(name, reader):
        if header is None:
            header = cells
        else:
            yield f"`{name}` line {number}", dict(zip(header, cells, strict=False))


def _numbered_cells(name: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise UsageError(f"`{name}` line {reader.line_num}: {error}", "check the quotes of that line") from error


def _parquet_rows(name: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise MissingExtraError(f"reading `{name}`", "pyarrow", "data") from error
    try:
        file = parquet.ParquetFile(name)
    except (ArrowInvalid, OSError) as error:
        raise UsageError(f"`{name}` is not a parquet file: {error}", "check the file") from error
    known = [column for column in columns if column in file.schema_arrow.names]
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=known or None):
        for row in batch.to_pylist():
            yield f"`{name}` row {number}", row
            number += 1


ROW_READERS: Mapping[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
}
