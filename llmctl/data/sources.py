"""Documents out of files: text, JSON lines, JSON, CSV, TSV, parquet, compressed or not, as a stream.

Bounded memory whatever the corpus. Knows no tokens: a document is a string, a row is a mapping.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmctl.errors import MissingExtraError, NotFoundError, UsageError

COMPRESSIONS = {".gz", ".zst"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".text", ""}
ROW_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}
MAX_DOCUMENT_BYTES = 4 << 20
"""A text file larger than this becomes several documents, cut at line ends."""

Row = Mapping[str, Any]


def list_files(paths: Sequence[str]) -> list[Path]:
    """Return the data files that files, folders and globs name, each once, folders in sorted order.

    Raises: NotFoundError for a path that names nothing.
    """
    files: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and is_data(p))
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(text, recursive=True) if Path(name).is_file())
        if not found:
            raise NotFoundError(f"there is no data at `{text}`", suggest(path))
        files.update(dict.fromkeys(found))
    return list(files)


def suggest(path: Path) -> str:
    """Return a hint with the likeliest name beside a missing one."""
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    return f"did you mean `{folder / close[0]}`?" if close else "name a file, a folder or a quoted glob, or - for a pipe"


def is_data(path: Path) -> bool:
    """Tell whether a file in a folder is meant to be read: a known kind, and not hidden."""
    return not path.name.startswith(".") and kind_of(path) in (TEXT_SUFFIXES | ROW_SUFFIXES) - {""}


def kind_of(path: Path) -> str:
    """Return the suffix that says what is in a file, the compression's left out."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed.

    Raises: MissingExtraError for .zst without its package.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if suffix == ".zst":
        return cast("BinaryIO", zstd_module().open(path, "rb"))
    return path.open("rb")


def zstd_module() -> Any:
    """Return the zstd module: the standard library's from Python 3.14, else the extra's."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise MissingExtraError("reading `.zst` files", "backports.zstd", "data") from None
    return zstd


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends, any of LF and CR LF kept.

    Raises: UsageError naming the file and the offset of the first byte that is not UTF-8 text.
    """
    offset = 0
    try:
        with open_bytes(path) as file:
            for line in file:
                yield decode(line, path, offset)
                offset += len(line)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UsageError(f"`{path}` is not a whole gzip file: {error}", "fetch it again") from None


def decode(data: bytes, path: Path | str, offset: int) -> str:
    """Decode UTF-8, or say where it is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        kind = "it looks like a binary file" if b"\0" in data else "it is not UTF-8 text"
        raise UsageError(
            f"`{path}` has an invalid byte 0x{data[error.start]:02x} at byte {at}: {kind}",
            f"convert it: iconv -f GB18030 -t UTF-8 {path}" if b"\0" not in data else "name text files only",
        ) from None


def read_documents(paths: Sequence[str], *, text_key: str = "text", split: str = "file") -> Iterator[str]:
    """Yield the documents of all files in order; empty ones are left out.

    split: what a document of a text file is: `file`, `line`, or `blank` (a paragraph). A row of a table or of JSON
    lines is one document, its `text_key`.
    Raises: NotFoundError, UsageError naming file and line.
    """
    for path in list_files(paths):
        for document in documents_of(path, text_key, split):
            if document:
                yield document


def documents_of(path: Path, text_key: str, split: str) -> Iterator[str]:
    """Yield the documents of one file."""
    if kind_of(path) in ROW_SUFFIXES:
        for number, row in read_rows(path):
            yield field_of(row, text_key, path, number)
        return
    lines = read_lines(path)
    if split == "line":
        yield from (line.rstrip("\r\n") for line in lines)
    else:
        yield from blocks(lines, at_blank=split == "blank")


def blocks(lines: Iterator[str], *, at_blank: bool) -> Iterator[str]:
    """Join lines to paragraphs (without the blank lines between), or to documents of bounded size."""
    held: list[str] = []
    size = 0
    for line in lines:
        if at_blank and not line.strip():
            yield "".join(held).rstrip("\r\n")
            held, size = [], 0
            continue
        held.append(line)
        size += len(line)
        if size >= MAX_DOCUMENT_BYTES:
            yield "".join(held)
            held, size = [], 0
    text = "".join(held)
    yield text.rstrip("\r\n") if at_blank else text


def field_of(row: Any, key: str, path: Path, number: int) -> str:
    """Return a row's text; a row that is a plain string is its own text.

    Raises: UsageError naming file, line and the keys there are.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping) or key not in row:
        known = ", ".join(f"`{name}`" for name in row) if isinstance(row, Mapping) else type(row).__name__
        raise UsageError(f"`{path}` row {number} has no field `{key}`; it has {known}", "--set data.text_key=... names the field")
    value = row[key]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise UsageError(f"`{path}` row {number}: the field `{key}` is a {type(value).__name__}, not text")
    return str(value)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of a JSON, JSON-lines, CSV, TSV or parquet file."""
    kind = kind_of(path)
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".json": json_rows,
        ".csv": table_rows,
        ".tsv": table_rows,
        ".parquet": parquet_rows,
    }
    return readers.get(kind, json_lines)(path)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the values of JSON lines; blank lines are passed over."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"`{path}` line {number} is not valid JSON: {error.msg} at column {error.colno}") from None


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON file that holds a list."""
    text = "".join(read_lines(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"`{path}` line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(content, list):
        raise UsageError(f"`{path}` holds a JSON {type(content).__name__}, not a list of rows")
    yield from enumerate(content, start=1)


def table_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a CSV or TSV file by the names in its first line."""
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(read_lines(path), delimiter=delimiter)
    try:
        for row in reader:
            yield reader.line_num, {str(name): value for name, value in row.items() if name is not None}
    except csv.Error as error:
        raise UsageError(f"`{path}` line {reader.line_num} is not a table row: {error}") from None


def parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a parquet file."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise MissingExtraError("reading `.parquet` files", "pyarrow", "data") from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except ArrowInvalid as error:
        raise UsageError(f"`{path}` is not a parquet file: {error}") from None


def source_sha256(paths: Sequence[str]) -> str:
    """Return one digest of the content of all files, in order, as they lie on disk."""
    digest = hashlib.sha256()
    for path in list_files(paths):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_stdin() -> str:
    """Return piped text.

    Raises: UsageError at the first byte that is not UTF-8.
    """
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else io.BytesIO(sys.stdin.read().encode()).read()
    return decode(data, "standard input", 0)
