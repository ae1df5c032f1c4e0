"""Pairs of texts: two columns of a table, two fields of JSON lines, or two files line by line.

Knows no tokens and no tasks: a pair is (source, target).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llmctl.data.sources import field_of, kind_of, list_files, read_lines, read_rows
from llmctl.errors import UsageError


def read_pairs(paths: Sequence[str], *, source_key: str = "source", target_key: str = "target") -> Iterator[tuple[str, str]]:
    """Yield (source, target) of every row.

    `.tsv` and `.txt` are lines of two tab-separated columns (more are ignored); `.jsonl`, `.json`, `.csv` and
    `.parquet` rows are read by field; `a.en:a.de` are two files with matching lines.
    Raises: UsageError naming file and line where a column is missing or the two files differ in length.
    """
    for text in paths:
        first, colon, second = text.partition(":")
        if colon and not Path(text).exists() and Path(first).exists():
            yield from parallel_lines(Path(first), Path(second))
            continue
        for path in list_files([text]):
            if kind_of(path) in (".tsv", ".txt", ""):
                yield from columns(path)
            else:
                for number, row in read_rows(path):
                    yield field_of(row, source_key, path, number), field_of(row, target_key, path, number)


def columns(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the first two tab-separated columns of every line that is not blank."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) < 2:
            raise UsageError(f"`{path}` line {number} has no tab: `{line.strip()[:60]}`", "a pair is a line `source<TAB>target`")
        yield cells[0], cells[1]


def parallel_lines(first: Path, second: Path) -> Iterator[tuple[str, str]]:
    """Yield the matching lines of two files."""
    list_files([str(second)])  # raises where it is missing
    ends = object()
    sources, targets = read_lines(first), read_lines(second)
    number = 0
    while True:
        source, target = next(sources, ends), next(targets, ends)
        if source is ends and target is ends:
            return
        number += 1
        if not isinstance(source, str) or not isinstance(target, str):
            short = first if source is ends else second
            raise UsageError(f"`{short}` ends before its line {number}, `{second if short is first else first}` goes on")
        yield source.rstrip("\r\n"), target.rstrip("\r\n")
