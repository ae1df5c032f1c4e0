"""Text sources: files, folders, globs and stdin become a stream of documents in bounded memory.

Knows file formats and where a document ends. Refuses to know tokenizers, models and what the text is for.
A document is never changed: line ends, tabs and spaces stay as they are; only a leading byte-order mark is dropped.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from llmctl.errors import MissingExtraError, NotFoundError, UsageError

Split = Literal["file", "line", "blank"]

STDIN = "-"
BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_CHARS = 4 << 20  # a longer text file is cut at line ends into documents of about this size
COMPRESSIONS = (".gz", ".zst")


class TextBlock(NamedTuple):
    """Some whole lines of one file, decoded."""

    text: str
    offset: int
    """Byte offset of the block in the (decompressed) file."""


def read_documents(paths: Sequence[str], *, text_key: str = "text", split: Split = "file") -> Iterator[str]:
    """Yield the documents of files, folders, globs and `-` (stdin), in the order given; folders sorted by name.

    `text_key` names the field of jsonl, json, csv, tsv and parquet rows; `split` says what one document of plain text
    is: the file (very long ones are cut at line ends), a line, or a paragraph. Empty documents are left out.

    Raises: NotFoundError for a path that does not exist; UsageError for invalid UTF-8, binary content, rows without
        the field, or when there is no text at all; MissingExtraError for .zst and .parquet without their packages.
    """
    found = False
    for name in expand(paths):
        for text in read_file(name, text_key=text_key, split=split):
            if text:
                found = True
                yield text
    if not found:
        raise UsageError(f"there is no text in {_listed(paths)}", "name a file with at least one line of text")


def source_sha256(paths: Sequence[str]) -> str:
    """Return the identity of a corpus: the digest of its files' digests in reading order; a pipe has none: ""."""
    names = expand(paths)
    if any(map(is_pipe, names)):
        return ""
    return hashlib.sha256("".join(file_sha256(name) for name in names).encode()).hexdigest()


def is_pipe(name: str) -> bool:
    """Say whether what is read is gone afterwards: stdin, a named pipe, a shell's `<(...)`."""
    return name == STDIN or not Path(name).is_file()


def file_sha256(name: str) -> str:
    """Return the sha256 of one file's bytes as they lie on disk."""
    with Path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand(paths: Sequence[str]) -> list[str]:
    """Return the files that paths, folders and globs stand for; `-` stays.

    Raises: NotFoundError for what does not exist or a folder without text files; UsageError for an empty name.
    """
    names: list[str] = []
    for path in paths:
        if not path:  # "" would be the current folder: most likely a shell variable that is not set
            raise UsageError("the path of the text is empty", "name files, folders or globs")
        if path == STDIN:
            names.append(path)
        elif os.path.isdir(path):  # noqa: PTH112 - of a name that cannot be, os says no where pathlib raises
            names += _folder_files(Path(path))
        elif os.path.exists(path):  # noqa: PTH110
            names.append(path)
        else:
            names += _glob_files(path)
    return names


def _folder_files(folder: Path) -> list[str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _kind(p) in READERS and not _hidden(p, folder))
    if not files:
        raise NotFoundError(f"the folder `{folder}` holds no text files", f"known endings: {' '.join(READERS)}")
    return [str(file) for file in files]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _glob_files(pattern: str) -> list[str]:
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (pathlib's glob takes no absolute patterns)
    matches = sorted(match for match in found if Path(match).is_file())
    if matches:
        return matches
    if glob.has_magic(pattern):
        raise NotFoundError(f"no file matches `{pattern}`", "quote the pattern, or name the files")
    path = Path(pattern)
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, siblings, n=1)
    hint = f"did you mean `{path.parent / close[0]}`?" if close else "check the path"
    raise NotFoundError(f"there is no file or folder `{pattern}`", hint)


def is_table(name: str) -> bool:
    """Say whether the file has rows with fields; .tsv and plain text are lines."""
    return _kind(Path(name)) in ROW_READERS and _kind(Path(name)) != ".tsv"


def _kind(path: Path) -> str:
    """Return the ending that says the format, compression aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(name: str, *, text_key: str, split: Split) -> Iterator[str]:
    """Yield the documents of one file or stdin; an unknown ending is read as plain text."""
    kind = "" if name == STDIN else _kind(Path(name))
    if kind in ROW_READERS:
        for where, row in read_rows(name):
            yield row_text(row, text_key, where)
    else:
        yield from SPLITTERS[split](text_blocks(name))


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


def is_csv(name: str) -> bool:
    """Say whether the file's cells stand between commas."""
    return name != STDIN and _kind(Path(name)) == ".csv"


# --- plain text ------------------------------------------------------------------------------------------------------


def open_binary(name: str) -> BinaryIO:
    """Open a file or stdin for reading its bytes, decompressed by its ending.

    Raises: MissingExtraError for .zst without its package; NotFoundError and UsageError for what cannot be opened.
    """
    if name == STDIN:
        return io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False)) if _has_fileno() else sys.stdin.buffer
    suffix = Path(name).suffix.lower()
    if suffix == ".gz":
        _opened(Path(name)).close()  # says what is wrong with the path; gzip's own handle is closed with the stream
        return cast("BinaryIO", gzip.open(name, "rb"))
    if suffix == ".zst":
        return _open_zstd(Path(name))
    return _opened(Path(name))


def _has_fileno() -> bool:
    try:
        sys.stdin.fileno()
    except (OSError, ValueError):
        return False
    return True


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file `{path}`", "check the path") from error
    except OSError as error:
        raise UsageError(f"cannot read `{path}`: {error.strerror}", "check the file's permissions") from error


def _open_zstd(path: Path) -> BinaryIO:
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError as error:
            raise MissingExtraError(f"reading `{path}`", "backports.zstd", "data") from error
    _opened(path).close()  # as with gzip
    file: BinaryIO = zstd.ZstdFile(path, mode="r")
    return file


def text_blocks(name: str, *, whole_lines: bool = False) -> Iterator[TextBlock]:
    """Yield a file's text in blocks of about a megabyte that end at line ends.

    A line longer than a document may be is cut between characters, unless `whole_lines`.

    Raises: UsageError naming file and byte offset for invalid UTF-8, NUL bytes or a damaged archive.
    """
    shown = "stdin" if name == STDIN else name
    offset = 0
    with open_binary(name) as file:
        for data in _line_blocks(file, shown, None if whole_lines else MAX_DOCUMENT_CHARS):
            text = decode_utf8(data, shown, offset)
            start = 1 if offset == 0 and text.startswith("\ufeff") else 0
            if text[start:]:
                yield TextBlock(text[start:], offset)
            offset += len(data)


def _line_blocks(file: BinaryIO, shown: str, limit_bytes: int | None) -> Iterator[bytes]:
    """Cut a byte stream at line ends, a block's worth at a time; a line over the limit is cut elsewhere."""
    parts: list[bytes] = []
    size = 0
    while data := _read_block(file, shown):
        end = data.rfind(b"\n") + 1
        size += len(data)
        if end:
            yield b"".join([*parts, data[:end]])
            parts, size = [data[end:]], len(data) - end
        elif limit_bytes is not None and size > limit_bytes:
            whole = b"".join([*parts, data])
            end = _whole_characters(whole)
            yield whole[:end]
            parts, size = [whole[end:]], len(whole) - end
        else:
            parts.append(data)
    if rest := b"".join(parts):
        yield rest


def _read_block(file: BinaryIO, shown: str) -> bytes:
    try:
        return file.read(BLOCK_BYTES)
    except (EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"`{shown}` is damaged: {error}", "fetch or compress the file again") from error
    except OSError as error:
        raise UsageError(f"cannot read `{shown}`: {error.strerror or error}", "check the file") from error
    except Exception as error:
        if type(error).__name__ in ("ZstdError", "error"):  # zlib.error and zstd's own, by name: no import for it
            raise UsageError(f"`{shown}` is damaged: {error}", "fetch or compress the file again") from error
        raise


def _whole_characters(data: bytes) -> int:
    """Return the length of the longest start of `data` that does not end inside a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:  # the last byte that starts a character
            return len(data) - back if data[-back] >= 0xC0 else len(data)
    return len(data)


def decode_utf8(data: bytes, shown: str, offset: int = 0) -> str:
    """Decode a part of a file that starts at byte `offset`.

    Raises: UsageError naming file and byte offset where it is not UTF-8, or holds a NUL and so is no text.
    """
    nul = data.find(0)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") and offset == 0:
            hint = f"it looks like UTF-16: iconv -f UTF-16 -t UTF-8 {shown}"
        else:
            hint = "convert it to UTF-8 first, e.g. iconv -f LATIN1 -t UTF-8"
        if 0 <= nul < error.start:
            raise _binary(shown, offset + nul) from error
        position = offset + error.start
        raise UsageError(f"`{shown}` is not UTF-8 at byte {position} (0x{data[error.start]:02x})", hint) from error
    if nul >= 0:
        raise _binary(shown, offset + nul)
    return text


def _binary(shown: str, position: int) -> UsageError:
    return UsageError(f"`{shown}` is binary, not text: NUL at byte {position}", "name a text file")


def split_files(blocks: Iterator[TextBlock]) -> Iterator[str]:
    """Make one document of a file, or several of bounded size cut at line ends."""
    parts: list[str] = []
    size = 0
    for block in blocks:
        if size and size + len(block.text) > MAX_DOCUMENT_CHARS:
            yield "".join(parts)
            parts, size = [], 0
        parts.append(block.text)
        size += len(block.text)
    if parts:
        yield "".join(parts)


def split_lines(blocks: Iterator[TextBlock]) -> Iterator[str]:
    r"""Make a document of every line that is not blank; its end (\n or \r\n) is dropped."""
    for block in blocks:
        for line in block.text.split("\n"):
            text = line.removesuffix("\r")
            if text.strip():
                yield text


def split_paragraphs(blocks: Iterator[TextBlock]) -> Iterator[str]:
    """Make a document of every run of lines between blank lines; lines inside keep their ends."""
    lines: list[str] = []
    size = 0
    for block in blocks:
        for line in _lines(block.text):
            if line.strip() and size <= MAX_DOCUMENT_CHARS:
                lines.append(line)
                size += len(line)
                continue
            if lines:
                yield "".join(lines).rstrip("\r\n")
            lines, size = ([line], len(line)) if line.strip() else ([], 0)
    if lines:
        yield "".join(lines).rstrip("\r\n")


def _lines(text: str) -> list[str]:
    """Cut at newlines only (splitlines also cuts at form feeds and other signs), keeping the ends."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return [line for line in lines if line]


SPLITTERS: Mapping[Split, Callable[[Iterator[TextBlock]], Iterator[str]]] = {
    "file": split_files,
    "line": split_lines,
    "blank": split_paragraphs,
}


# --- rows ------------------------------------------------------------------------------------------------------------


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


def numbered_lines(name: str) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end) of a text file; only a newline ends a line."""
    number = 0
    for block in text_blocks(name, whole_lines=True):
        for line in _lines(block.text):
            number += 1
            yield number, line


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


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(f"`{path}`" for path in paths[:3])
    return (shown + (" ..." if len(paths) > 3 else "")) or "an empty list of files"


ROW_READERS: Mapping[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
}
READERS = (".txt", ".md", *ROW_READERS)
