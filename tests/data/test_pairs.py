"""Pairs are read from every layout, kept in order, and a line that is none is named."""

import gzip
import json

import pytest

from llmctl.data.pairs import read_pairs
from llmctl.errors import LlmctlError, NotFoundError, UsageError


def pairs(path, **options) -> list[tuple[str, str]]:
    return list(read_pairs([str(path)], **options))


def test_pairs_of_every_form(tmp_path):
    wanted = [("a b", "x"), ("c", "诗")]
    (tmp_path / "p.tsv").write_text("a b\tx\tignored\nc\t诗\n")
    (tmp_path / "p.jsonl").write_text('{"source": "a b", "target": "x"}\n{"source": "c", "target": "诗"}\n')
    (tmp_path / "p.en").write_text("a b\nc\n")
    (tmp_path / "p.de").write_text("x\n诗\n")
    assert pairs(tmp_path / "p.tsv") == wanted
    assert pairs(tmp_path / "p.jsonl") == wanted
    assert list(read_pairs([f"{tmp_path / 'p.en'}:{tmp_path / 'p.de'}"])) == wanted


def test_broken_pairs_name_the_line(tmp_path):
    (tmp_path / "p.tsv").write_text("a\tx\nno tab here\n")
    with pytest.raises(UsageError, match="2"):
        pairs(tmp_path / "p.tsv")
    (tmp_path / "p.jsonl").write_text('{"source": "a"}\n')
    with pytest.raises(UsageError, match="target"):
        pairs(tmp_path / "p.jsonl")
    (tmp_path / "p.en").write_text("a\nb\n")
    (tmp_path / "p.de").write_text("x\n")
    with pytest.raises(UsageError, match=r"p\.de"):
        list(read_pairs([f"{tmp_path / 'p.en'}:{tmp_path / 'p.de'}"]))


def test_layouts_of_rows(tmp_path):
    rows = [{"translation": {"de": "x", "en": "a"}}, {"translation": {"de": "y", "en": "b"}}]
    (tmp_path / "wmt.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert pairs(tmp_path / "wmt.jsonl", source_key="en", target_key="de") == [("a", "x"), ("b", "y")]
    (tmp_path / "list.json").write_text(json.dumps([["a", "x"], ["b", "y"]]))
    assert pairs(tmp_path / "list.json") == [("a", "x"), ("b", "y")]
    (tmp_path / "p.csv").write_text('target,source\nx,"a, b"\n')
    assert pairs(tmp_path / "p.csv") == [("a, b", "x")]


def test_a_header_line_is_no_pair_and_line_ends_of_any_kind_are_dropped(tmp_path):
    (tmp_path / "p.tsv").write_bytes(b"source\ttarget\r\na \t x\r\n\r\n\tonly target\r\n")
    assert pairs(tmp_path / "p.tsv") == [("a ", " x")]
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress("好\tgood\n".encode()))
    assert pairs(tmp_path / "p.txt.gz") == [("好", "good")]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.tsv", b"", ["no pairs", "p.tsv"]),
        ("p.tsv", b"a\tx\nb \xff\ty\n", ["p.tsv", "byte 6"]),
        ("p.jsonl", b"[1]\n", ["p.jsonl", "line 1"]),
        ("p.jsonl", b'"a"\n', ["p.jsonl", "line 1", "str"]),
        ("p.jsonl", b'{"source": "a", "target": 5}\n', ["line 1", "target", "int"]),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, name: str, content: bytes, parts: list[str]):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlmctlError) as caught:
        pairs(tmp_path / name)
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in str(caught.value)


def test_a_side_that_is_missing_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "p.en").write_text("a\n")
    with pytest.raises(NotFoundError, match=r"p\.de"):
        list(read_pairs([f"{tmp_path / 'p.en'}:{tmp_path / 'p.de'}"]))


def test_real_pairs(shared_data):
    folder = shared_data / "multi30k-en-de"
    joined = list(read_pairs([f"{folder / 'val.en.gz'}:{folder / 'val.de.gz'}"]))
    assert len(joined) == 1014
    tatoeba = list(read_pairs([str(shared_data / "tatoeba-cmn-eng" / "cmn.txt.gz")]))
    assert len(tatoeba) == 29_155


def test_the_index_of_pandas_is_no_side_of_a_pair(tmp_path):
    wanted = [("q0", "a0"), ("q1", "a1")]
    (tmp_path / "p.tsv").write_text("\tsource\ttarget\n0\tq0\ta0\n1\tq1\ta1\n")
    assert pairs(tmp_path / "p.tsv") == wanted
    (tmp_path / "other.tsv").write_text("\tfrage\tantwort\n0\tq0\ta0\n1\tq1\ta1\n")
    assert pairs(tmp_path / "other.tsv") == wanted
    (tmp_path / "p.csv").write_text("Unnamed: 0,source,target\n0,q0,a0\n1,q1,a1\n")
    assert pairs(tmp_path / "p.csv") == wanted
    (tmp_path / "empty.tsv").write_text("\tonly target\tnote\na\tx\tnote\n")
    assert pairs(tmp_path / "empty.tsv") == [("a", "x")]


def test_a_header_says_which_column_is_which(tmp_path):
    (tmp_path / "p.tsv").write_text("target\tnote\tsource\nx\t-\ta\n")
    assert pairs(tmp_path / "p.tsv") == [("a", "x")]
