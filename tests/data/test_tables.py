"""Rows that say two things at once, or not what they seem to, are one clear error with their place."""

from pathlib import Path

import pytest

from llmctl.data.tables import read_cells, read_rows
from llmctl.errors import UsageError


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("value", "part"),
    [
        ('{"text": "a", "n": NaN}', "`NaN` is no value of JSON"),
        ('{"n": [-Infinity]}', "`-Infinity`"),
        ('{"text": "a", "text": "b"}', "the key `text` occurs twice"),
        ('{"more": {"a": 1, "a": 2}}', "the key `a` occurs twice"),
    ],
)
def test_what_is_not_json_is_named_at_once(tmp_path, name: str, value: str, part: str):
    rows = read_rows(write(tmp_path / name, '{"text": "x"}\n' + value + '\n{"text": "y"}\n'))
    assert next(rows)[1] == {"text": "x"}
    with pytest.raises(UsageError, match=part) as caught:
        next(rows)
    assert ("line 2" if name == "a.jsonl" else "item 1") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sign"), [("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", ","), ("a.tsv", ";")]
)
@pytest.mark.parametrize("read", [read_rows, read_cells])
def test_another_delimiter_is_named(tmp_path, read, name: str, sign: str):
    path = write(tmp_path / name, f"text{sign}label\na b{sign}good\n")
    with pytest.raises(UsageError, match="separated by") as caught:
        list(read(path))
    assert {";": "`;`", "\t": "tabs", "|": "`|`", ",": "commas"}[sign] in str(caught.value)


def test_a_sentence_in_the_first_line_is_no_delimiter(tmp_path):
    assert list(read_cells(write(tmp_path / "a.csv", "What he said; then: so!\nx\n")))


@pytest.mark.parametrize("read", [read_rows, read_cells])
def test_two_columns_of_one_name_are_refused(tmp_path, read):
    with pytest.raises(UsageError, match="two columns `text`"):
        list(read(write(tmp_path / "a.csv", "text,label,text\na,b,c\n")))
    ((_, row),) = read(write(tmp_path / "b.csv", ",text,\n0,a,\n"))
    assert row == {"text": "a"}


def test_damaged_pages_of_parquet_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pip install 'llmctl[data]'")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [{"text": f"text {number}", "n": number} for number in range(40)]
    parquet.write_table(pa.Table.from_pylist(rows), path, compression="snappy")
    good = path.read_bytes()
    assert [row for _, row in read_rows(str(path))] == rows
    messages = set()
    for at in range(4, len(good) - 8, 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            list(read_rows(str(path)))
        except UsageError as error:
            messages.add(str(error).split(": ")[0])
    assert messages == {f"`{path}` is not a valid parquet file", f"`{path}` is damaged after row 0"}
