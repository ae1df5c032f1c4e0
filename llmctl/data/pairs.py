"""Read text pairs for sequence-to-sequence training: tables with two fields, or two files with parallel lines.

Knows which field is the source and which the target. Knows no tokenizers or models.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from llmctl.data import sources, tables, text_files
from llmctl.errors import UsageError


def read_pairs(
    paths: Sequence[str],
    *,
    source_key: str = "source",
    target_key: str = "target",
    blank: text_files.Blank | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (source, target) of every pair, in order; pairs with an empty side are skipped, and counted in `blank`.

    A .tsv or plain text line is `source<TAB>target` (further columns are ignored; a first line that names both keys
    is a header); jsonl, json, csv and parquet rows are read by their keys; `a.en:a.de` joins two files line by line.

    Raises: NotFoundError for a missing file; UsageError naming the path and line of what is not a pair.
    """
    is_empty = True
    for path in paths:
        for source, target in _read_path(path, source_key, target_key):
            if source and target:
                is_empty = False
                yield source, target
            elif blank is not None:
                blank.n_rows += 1
    if is_empty:
        raise UsageError(
            f"there are no pairs in {', '.join(f'`{p}`' for p in paths)}", "write lines of source<TAB>target"
        )


def _read_path(path: str, source_key: str, target_key: str) -> Iterator[tuple[str, str]]:
    if files := two_files(path):
        yield from (pair for _, pair in parallel_lines(*files))
        return
    for name in sources.expand([path]):
        if name != text_files.STDIN and tables.is_table(name):
            for where, row in tables.read_rows(name, (source_key, target_key)):
                yield _sides(row, source_key, target_key, where)
        else:
            yield from (pair for _, pair in tab_lines(name, source_key, target_key))


def two_files(path: str) -> tuple[str, str] | None:
    """Split `a:b` into two file names; None for a single path, such as an existing file with a colon in its name."""
    left, colon, right = path.partition(":")
    return (left, right) if colon and not Path(path).exists() else None


def tab_lines(name: str, source_key: str, target_key: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (where, pair) of the lines `source<TAB>target` of a file or stdin.

    A header that names both keys says which columns they are; the index that pandas writes before them is left out.
    """
    shown = "stdin" if name == text_files.STDIN else name
    lines = text_files.numbered_lines(name)
    first = list(islice(lines, 2))
    n_index = int(_has_index([line.rstrip("\r\n").split("\t") for _, line in first]))
    left, right = n_index, n_index + 1
    for number, line in chain(first, lines):
        text = line.rstrip("\r\n")
        cells = text.split("\t")
        if number == 1 and source_key in cells and target_key in cells:
            left, right = cells.index(source_key), cells.index(target_key)
        elif text.strip() and not (number == 1 and n_index):
            if len(cells) <= max(left, right):
                raise UsageError(
                    f"`{shown}` line {number} has no tab: `{text[:60]}`", "write lines of source<TAB>target"
                )
            yield f"`{shown}` line {number}", (cells[left], cells[right])


def _has_index(lines: list[list[str]]) -> bool:
    """Tell whether the first cell of a header has no name and that of the line below it is a row number."""
    return len(lines) == 2 and len(lines[0]) > 2 and tables.is_index(lines[0][0]) and lines[1][0].strip().isdigit()


def parallel_lines(left: str, right: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (where, pair) of two files with parallel lines.

    Raises: NotFoundError for a missing file; UsageError if their lengths differ.
    """
    for name in (left, right):
        sources.expand([name])  # raises for a missing file before anything is read
    for number, (a, b) in enumerate(zip_longest(_texts(left), _texts(right)), start=1):
        if a is None or b is None:
            short = left if a is None else right
            raise UsageError(
                f"`{left}` and `{right}` are not parallel: `{short}` ends before line {number}",
                "both files need the same number of lines",
            )
        yield f"`{left}` line {number}", (a, b)


def _texts(name: str) -> Iterator[str]:
    for _, line in text_files.numbered_lines(name):
        yield line.rstrip("\r\n")


def _sides(row: Any, source_key: str, target_key: str, where: str) -> tuple[str, str]:
    if isinstance(row, list) and len(row) >= 2:  # a JSON array [source, target]
        row = {source_key: row[0], target_key: row[1]}
    if not isinstance(row, dict):
        raise UsageError(
            f"{where} is of type {type(row).__name__}, not a pair", f"rows need `{source_key}` and `{target_key}`"
        )
    # The layout of the WMT datasets: {"translation": {"de": ..., "en": ...}}
    if isinstance(row.get("translation"), dict):
        row = row["translation"]
    return (
        tables.row_text(row, source_key, where, "data.source_key"),
        tables.row_text(row, target_key, where, "data.target_key"),
    )
