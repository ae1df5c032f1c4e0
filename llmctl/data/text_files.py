"""Read files and pipes as blocks of decoded text: decompression, UTF-8 checks, line boundaries."""

import codecs
import gzip
import io
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from llmctl.errors import MissingExtraError, NotFoundError, UsageError

STDIN = "-"


BLOCK_BYTES = 1 << 20


MAX_DOCUMENT_CHARS = 4 << 20  # longer text files are split at line ends into documents of about this size


COMPRESSIONS = (".gz", ".zst")


class TextBlock(NamedTuple):
    """Some complete lines of one file, decoded."""

    text: str
    offset: int
    """Byte offset of the block in the (decompressed) file."""


@dataclass
class Blank:
    """Counts rows that have no text and are left out."""

    n_rows: int = 0

    def lines(self, what: str) -> list[str]:
        """Return the line that says it, if there is something to say."""
        return [f"data: {self.n_rows:,} {what} have no text and are left out"] if self.n_rows else []


def is_pipe(name: str) -> bool:
    """Tell whether a source can be read only once: stdin, a named pipe, a shell's `<(...)`."""
    return name == STDIN or not Path(name).is_file()


def _kind(path: Path) -> str:
    """Return the extension of the format, ignoring a compression extension."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_csv(name: str) -> bool:
    """Tell whether a file is comma-separated."""
    return name != STDIN and _kind(Path(name)) == ".csv"


def open_binary(name: str) -> BinaryIO:
    """Open a file or stdin for reading bytes, decompressed according to its extension.

    Raises: MissingExtraError for .zst without its package; NotFoundError or UsageError if it cannot be opened.
    """
    if name == STDIN:
        return io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False)) if _has_fileno() else sys.stdin.buffer
    suffix = Path(name).suffix.lower()
    if suffix == ".gz":
        _opened(Path(name)).close()  # raises the proper error for a bad path; gzip then opens its own handle
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
        raise NotFoundError(f"file `{path}` does not exist", "check the path") from error
    except OSError as error:
        raise UsageError(f"cannot read `{path}`: {error.strerror}", "check the file's permissions") from error


def _open_zstd(path: Path) -> BinaryIO:
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError as error:
            raise MissingExtraError(f"reading `{path}`", "backports.zstd") from error
    _opened(path).close()  # raises the proper error for a bad path
    file: BinaryIO = zstd.ZstdFile(path, mode="r")
    return file


def text_blocks(name: str, *, whole_lines: bool = False) -> Iterator[TextBlock]:
    """Yield a file's text in blocks of about a megabyte that end at line ends.

    A line longer than the limit of a document is split between characters, unless `whole_lines`.

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
    """Split a byte stream into blocks at line ends; a line over the limit is split between characters."""
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
        raise UsageError(f"`{shown}` is damaged: {error}", "download or compress the file again") from error
    except OSError as error:
        raise UsageError(
            f"cannot read `{shown}`: {error.strerror or error}", "check the file and its permissions"
        ) from error
    except Exception as error:
        # zlib.error and ZstdError, compared by name: zstd is optional and must not be imported for this.
        if type(error).__name__ in ("ZstdError", "error"):
            raise UsageError(f"`{shown}` is damaged: {error}", "download or compress the file again") from error
        raise


def _whole_characters(data: bytes) -> int:
    """Return the length of the longest prefix of `data` that does not end inside a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:  # the last byte that starts a character
            return len(data) - back if data[-back] >= 0xC0 else len(data)
    return len(data)


STDIN_NAME = "standard input"


def decode_utf8(data: bytes, shown: str, offset: int = 0) -> str:
    """Decode the part of a file that starts at byte `offset`.

    Raises: UsageError naming file and byte offset of invalid UTF-8 or of a NUL, which means binary content.
    """
    nul = data.find(0)
    operand = "-" if shown == STDIN_NAME else shlex.quote(shown)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") and offset == 0:
            hint = f"it looks like UTF-16: iconv -f UTF-16 -t UTF-8 {operand}"
        elif is_gb18030(data):
            hint = f"it looks like GBK: iconv -f GB18030 -t UTF-8 {operand}"
        else:
            hint = "convert it to UTF-8 first: iconv -f ENCODING -t UTF-8 (LATIN1 for most Western European texts)"
        if 0 <= nul < error.start:
            raise _binary(shown, offset + nul) from error
        position = offset + error.start
        raise UsageError(f"`{shown}` is not UTF-8 at byte {position} (0x{data[error.start]:02x})", hint) from error
    if nul >= 0:
        raise _binary(shown, offset + nul)
    return text


def is_gb18030(data: bytes) -> bool:
    """Tell whether bytes that are not UTF-8 read as Chinese in GBK or GB18030: nearly all that is not ASCII is Han.

    Texts in Latin-1 fail: their letters with accents stand alone, and here every such byte is one of a pair.
    """
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(data)
    except UnicodeDecodeError:
        return False
    others = [sign for sign in text if sign > "\x7f"]
    n_han = sum("\u2e80" <= sign <= "\u9fff" or "\uff00" <= sign <= "\uffef" for sign in others)
    return n_han >= max(2, 0.9 * len(others))


def _binary(shown: str, position: int) -> UsageError:
    return UsageError(f"`{shown}` is binary, not text: NUL at byte {position}", "pass a text file")


def _lines(text: str) -> list[str]:
    """Split at newlines only (str.splitlines also splits at form feeds and others), keeping the ends."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return [line for line in lines if line]


def numbered_lines(name: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end) of a text file; only a newline ends a line."""
    number = 0
    for block in text_blocks(name, whole_lines=True):
        for line in _lines(block.text):
            number += 1
            yield number, line
