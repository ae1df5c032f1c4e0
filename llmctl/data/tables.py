"""Read rows of jsonl, json, csv, tsv and parquet files, in bounded memory."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.data.text_files import BLOCK_BYTES, STDIN, _kind, is_csv, numbered_lines, text_blocks
from llmctl.errors import MissingExtraError, UsageError
from llmctl.tables.names import closest


def is_table(name: str) -> bool:
    """Tell whether a file has rows with fields; .tsv and plain text count as lines."""
    return _kind(Path(name)) in ROW_READERS and _kind(Path(name)) != ".tsv"


INDEX = re.compile(r"\s*|Unnamed: \d+|__index_level_\d+__")
"""Names of columns that pandas writes for row numbers: empty, or what it makes of an empty name when it reads it again."""


def is_index(name: Any) -> bool:
    """Tell whether a column has no name of its own: it holds row numbers and is no column of the data."""
    return isinstance(name, str) and INDEX.fullmatch(name) is not None


def without_index(row: Any) -> Any:
    """Return a row without the columns that have no name; other values unchanged."""
    if isinstance(row, dict) and any(map(is_index, row)):
        return {key: value for key, value in row.items() if not is_index(key)}
    return row


def read_rows(name: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of a table: a dict per row, or any JSON value; stdin is JSON lines.

    Columns without a name (the index of pandas) are left out.
    columns: the columns to read from parquet.
    Raises: UsageError for a file of another format.
    """
    kind = ".jsonl" if name == STDIN else _kind(Path(name))
    if kind not in ROW_READERS:
        raise UsageError(f"`{name}` is not a table", f"known extensions: {' '.join(ROW_READERS)}")
    rows = _parquet_rows(name, columns) if kind == ".parquet" else ROW_READERS[kind](name)
    for where, row in rows:
        yield where, without_index(row)


def read_cells(name: str, names: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (where, cells by column) of a csv file, or of tab-separated lines of any other file or stdin.

    `names` are the columns of a table without a header; otherwise the first line names them. Columns without a name
    (the index of pandas) are left out.

    Raises: UsageError naming a line with the wrong number of cells.
    """
    shown = "stdin" if name == STDIN else name
    reader = _csv_reader(name) if is_csv(name) else _tsv_reader(name)
    header = list(names)
    for number, cells in _numbered_cells(shown, reader):
        if not header:
            header = _header(shown, cells, "," if is_csv(name) else "\t")
        elif len(cells) != len(header):
            listed = ", ".join(f"`{column}`" for column in header)
            raise UsageError(
                f"`{shown}` line {number} has {len(cells)} cells, not {len(header)}: the columns are {listed}",
                "correct that line" if not names else "name every column, or correct that line",
            )
        else:
            yield f"`{shown}` line {number}", without_index(dict(zip(header, cells, strict=True)))


def row_text(row: Any, key: str, where: str, setting: str = "data.text_key") -> str:
    """Return a row's text: a string, or a list of strings joined by newlines; `setting` is the setting of `key`.

    Raises: UsageError with the location if the field is missing or not text.
    """
    value = row
    if isinstance(row, dict):
        if key not in row:
            close = closest(key, [str(k) for k in row])
            hint = f"did you mean `{close}`?" if close else f"name the field with --set {setting}=NAME"
            raise UsageError(f"{where} has no field `{key}`; it has {', '.join(f'`{k}`' for k in row)}", hint)
        value = row[key]
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise UsageError(
            f"{where}: `{key}` is of type {type(value).__name__}, not text",
            f"choose another field with --set {setting}=NAME",
        )
    return whole_characters(value)


def whole_characters(text: str) -> str:
    r"""Replace lone surrogates, which JSON can express (`"\ud800"`) but UTF-8 cannot, with U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class NotJsonError(ValueError):
    """A value that Python's parser accepts, but which is not JSON or says two things at once."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise NotJsonError(f"the key `{double[:40]}` occurs twice in an object")
    return values


def _refuse_constant(name: str) -> Any:
    raise NotJsonError(f"`{name}` is no value of JSON; a missing value is `null`")


JSON = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_refuse_constant)


def _jsonl_rows(name: str) -> Iterator[tuple[str, Any]]:
    for number, line in numbered_lines(name):
        if not line.strip():
            continue
        try:
            row = JSON.decode(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"`{name}` line {number} is not JSON: {error}", "write one JSON value per line") from error
        yield f"`{name}` line {number}", row


def _json_rows(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON array one by one, in bounded memory; also accepts one value or a sequence of values.

    `wanted` is how much text to buffer before parsing: it doubles while a value is incomplete.
    """
    # The library has no incremental parser, but raw_decode parses one value at a position of a buffer.
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
            row, position = JSON.raw_decode(buffer, position)
        except ValueError as error:
            if ended or isinstance(error, NotJsonError):
                raise UsageError(f"`{name}` item {index} is not JSON: {error}", "correct the file") from error
            wanted = 2 * (len(buffer) - position)  # the value may extend beyond the buffer: read more
            continue
        except RecursionError as error:
            raise UsageError(f"`{name}` item {index} is nested too deeply: {error}", "flatten the value") from error
        yield f"`{name}` item {index}", row
        index, wanted = index + 1, BLOCK_BYTES // 2


def _skip(text: str, position: int, signs: str) -> int:
    """Return the position of the next value, after whitespace and one bracket or comma (the last of `signs`)."""
    blanks, separator = signs[:-1], signs[-1]
    while position < len(text) and text[position] in blanks:
        position += 1
    if position < len(text) and text[position] == separator:
        position += 1
        while position < len(text) and text[position] in blanks:
            position += 1
    return position


def _csv_rows(name: str) -> Iterator[tuple[str, Any]]:
    yield from _delimited(name, _csv_reader(name), ",")


def _tsv_rows(name: str) -> Iterator[tuple[str, Any]]:
    yield from _delimited(name, _tsv_reader(name), "\t")


def _csv_reader(name: str) -> Any:
    return csv.reader(_csv_lines(name), strict=True)


def _tsv_reader(name: str) -> Any:
    return csv.reader(_csv_lines(name), delimiter="\t", quoting=csv.QUOTE_NONE)


def _csv_lines(name: str) -> Iterator[str]:
    csv.field_size_limit(1 << 30)  # documents exceed the default of 128 KB
    return (line for _, line in numbered_lines(name))


def _header(shown: str, cells: list[str], delimiter: str) -> list[str]:
    """Check the names of the columns, and return them.

    Raises: UsageError for a name that occurs twice, or a line that another delimiter splits.
    """
    names = [name for name in cells if not is_index(name)]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UsageError(f"`{shown}` has two columns `{double[:40]}`", "rename one of them in the first line")
    other = next((sign for sign in DELIMITERS if sign != delimiter and sign in cells[0]), "")
    if len(cells) == 1 and other and all(COLUMN.fullmatch(part) for part in cells[0].split(other)):
        raise UsageError(
            f"the columns of `{shown}` are separated by {DELIMITERS[other]}, not by {DELIMITERS[delimiter]}: `{cells[0][:60]}`",
            "save it with commas as .csv, or with tabs as .tsv",
        )
    return cells


DELIMITERS = {";": "`;`", "\t": "tabs", "|": "`|`", ",": "commas"}
COLUMN = re.compile(r'\s*"?[\w.-]*"?\s*')
"""What a column is called, if it is quoted or not."""


def _delimited(name: str, reader: Any, delimiter: str) -> Iterator[tuple[str, Any]]:
    header: list[str] | None = None
    for number, cells in _numbered_cells(name, reader):
        if header is None:
            header = _header(name, cells, delimiter)
        else:
            yield f"`{name}` line {number}", dict(zip(header, cells, strict=False))


def _numbered_cells(name: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise UsageError(
            f"`{name}` line {reader.line_num} is not valid csv: {error}", "check the quotes of that line"
        ) from error


def _parquet_rows(name: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError(f"reading `{name}`", "pyarrow") from error
    number = 0
    # The library finds some damage only when it decodes a page; values such as dates beyond the year 9999 are
    # ValueErrors of Python.
    damage = (ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError)
    try:
        file = parquet.ParquetFile(name)
        # Missing columns are not an error here: row_text names them, with the columns that exist.
        known = [column for column in columns if column in file.schema_arrow.names]
        batches = file.iter_batches(batch_size=1024, columns=known or None)
    except damage as error:
        raise UsageError(f"`{name}` is not a valid parquet file: {error}", "write the file again") from error
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except damage as error:
            raise UsageError(
                f"`{name}` is damaged after row {number}: {error}", "download or write the file again"
            ) from error
        if batch is None:
            return
        for row in rows:
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
