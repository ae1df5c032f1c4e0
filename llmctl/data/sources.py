"""Read files, folders, globs and stdin as a stream of documents in bounded memory.

Knows file formats and document boundaries, but no tokenizers or models. Documents are not modified: line ends, tabs and
spaces are kept; only a leading byte-order mark is dropped.
"""

import glob
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from llmctl.data.tables import ROW_READERS, read_rows, row_text
from llmctl.data.text_files import (
    MAX_DOCUMENT_CHARS,
    STDIN,
    Blank,
    TextBlock,
    _kind,
    _lines,
    is_pipe,
    text_blocks,
)
from llmctl.errors import NotFoundError, UsageError
from llmctl.files import download_hint, file_sha256
from llmctl.tables.names import closest

Split = Literal["file", "line", "blank"]


def read_documents(
    paths: Sequence[str], *, text_key: str = "text", split: Split = "file", blank: Blank | None = None
) -> Iterator[str]:
    """Yield the documents of files, folders, globs and `-` (stdin), in the given order; files of folders by name.

    `text_key` is the field of jsonl, json, csv, tsv and parquet rows; `split` is what one document of plain text is:
    the file (very long ones are split at line ends), a line, or a paragraph. Empty documents are skipped, and counted in
    `blank`.

    Raises: NotFoundError for a path that does not exist; UsageError for invalid UTF-8, binary content, rows without
        the field, or if there is no text; MissingExtraError for .zst and .parquet without their packages.
    """
    is_empty = True
    for name in expand(paths):
        for text in read_file(name, text_key=text_key, split=split):
            if text:
                is_empty = False
                yield text
            elif blank is not None:
                blank.n_rows += 1
    if is_empty:
        raise UsageError(f"there is no text in {_listed(paths)}", "pass a file with at least one line of text")


def source_sha256(paths: Sequence[str]) -> str:
    """Return a digest that identifies a corpus: that of its files' digests in reading order; empty if any is a pipe."""
    names = expand(paths)
    if any(map(is_pipe, names)):
        return ""
    return hashlib.sha256("".join(file_sha256(name) for name in names).encode()).hexdigest()


def expand(paths: Sequence[str]) -> list[str]:
    """Expand paths, folders and globs to file names; `-` is kept.

    Raises: NotFoundError for a missing path or a folder without text files; UsageError for an empty name or a model.
    """
    names: list[str] = []
    for path in paths:
        if not path:  # "" would mean the current folder: most likely an unset shell variable
            raise UsageError("the path of the text is empty", "pass files, folders or globs")
        if is_model(Path(path)):
            raise UsageError(f"`{path}` is a model, not data", "the order is MODEL DATA, or `-m MODEL` for pretrain")
        if path == STDIN:
            names.append(path)
        elif os.path.isdir(path):  # noqa: PTH112 - os.path returns False for invalid names, pathlib raises
            names += _folder_files(Path(path))
        elif os.path.exists(path):  # noqa: PTH110
            names.append(path)
        else:
            names += _glob_files(path)
    return names


def is_model(path: Path) -> bool:
    """Tell whether a path is a model by its name, or a folder with the weights of one."""
    with suppress(OSError, ValueError):  # names that no file can have
        if path.is_dir():
            return any(file.suffix.lower() in MODELS or file.name == "adapter_config.json" for file in path.iterdir())
        return path.suffix.lower() in MODELS and path.is_file()
    return False


def is_data(path: Path) -> bool:
    """Tell whether a path is a file of a kind that no model has, or a folder with text files and no part of a model."""
    if path.is_file():
        return _kind(path) in READERS and path.name not in TOKENIZER_FILES
    is_part = is_model(path) or any((path / name).exists() for name in ("config.json", *TOKENIZER_FILES))
    return not is_part and any(_kind(file) in READERS and file.is_file() for file in path.iterdir())


MODELS = (".safetensors", ".gguf")
"""Suffixes of model files."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt")
"""Files of a model whose suffixes data has too."""


def _folder_files(folder: Path) -> list[str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _kind(p) in READERS and not _hidden(p, folder))
    if not files:
        raise NotFoundError(f"folder `{folder}` contains no text files", f"known extensions: {' '.join(READERS)}")
    return [str(file) for file in files]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _glob_files(pattern: str) -> list[str]:
    paths = glob.glob(pattern, recursive=True)  # noqa: PTH207 (pathlib's glob takes no absolute patterns)
    matches = sorted(path for path in paths if Path(path).is_file())
    if matches:
        return matches
    if glob.has_magic(pattern):
        raise NotFoundError(f"no file matches `{pattern}`", "check the pattern, or list the files")
    path = Path(pattern)
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = closest(path.name, siblings)
    hint = f"did you mean `{path.parent / close}`?" if close else fetching(pattern) or "check the path"
    raise NotFoundError(f"file or folder `{pattern}` does not exist", hint)


def fetching(name: str) -> str:
    """Return how to fetch what a URL or a data set of the Hugging Face Hub (`owner/name`) names; empty for a path."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).parent.exists():
        folder = shlex.quote(Path(name).name)
        return (
            f"data sets are not downloaded; fetch it first: hf download {name} --repo-type dataset --local-dir {folder}"
        )
    return download_hint(name)


def read_file(name: str, *, text_key: str, split: Split) -> Iterator[str]:
    """Yield the documents of one file or stdin; a file with an unknown extension is plain text."""
    kind = "" if name == STDIN else _kind(Path(name))
    if kind in ROW_READERS:
        for where, row in read_rows(name):
            yield row_text(row, text_key, where)
    else:
        yield from SPLITTERS[split](text_blocks(name))


# --- plain text ------------------------------------------------------------------------------------------------------


def split_files(blocks: Iterator[TextBlock]) -> Iterator[str]:
    """Yield a file as one document, or as several of bounded size split at line ends."""
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
    r"""Yield every non-blank line as a document, without its end (\n or \r\n)."""
    for block in blocks:
        for line in block.text.split("\n"):
            text = line.removesuffix("\r")
            if text.strip():
                yield text


def split_paragraphs(blocks: Iterator[TextBlock]) -> Iterator[str]:
    """Yield every paragraph (lines between blank lines) as a document; line ends inside are kept."""
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


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(f"`{path}`" for path in paths[:3])
    return (shown + (" ..." if len(paths) > 3 else "")) or "an empty list of files"


READERS = (".txt", ".md", *ROW_READERS)
