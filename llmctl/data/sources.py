"""Text sources: files, folders, globs and stdin become a stream of documents in bounded memory.

Knows file formats and where a document ends. Refuses to know tokenizers, models and what the text is for.
A document is never changed: line ends, tabs and spaces stay as they are; only a leading byte-order mark is dropped.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from llmctl.data.tables import ROW_READERS, read_rows, row_text
from llmctl.data.text_files import (
    MAX_DOCUMENT_CHARS,
    STDIN,
    TextBlock,
    _kind,
    _lines,
    file_sha256,
    is_pipe,
    text_blocks,
)
from llmctl.errors import NotFoundError, UsageError

Split = Literal["file", "line", "blank"]


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


def read_file(name: str, *, text_key: str, split: Split) -> Iterator[str]:
    """Yield the documents of one file or stdin; an unknown ending is read as plain text."""
    kind = "" if name == STDIN else _kind(Path(name))
    if kind in ROW_READERS:
        for where, row in read_rows(name):
            yield row_text(row, text_key, where)
    else:
        yield from SPLITTERS[split](text_blocks(name))


# --- plain text ------------------------------------------------------------------------------------------------------


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


SPLITTERS: Mapping[Split, Callable[[Iterator[TextBlock]], Iterator[str]]] = {
    "file": split_files,
    "line": split_lines,
    "blank": split_paragraphs,
}


# --- rows ------------------------------------------------------------------------------------------------------------


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(f"`{path}`" for path in paths[:3])
    return (shown + (" ..." if len(paths) > 3 else "")) or "an empty list of files"


READERS = (".txt", ".md", *ROW_READERS)
