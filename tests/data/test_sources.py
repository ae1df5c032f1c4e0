"""Documents are read as they are, from every format, and what cannot be read is named to the byte."""

import gzip
import json

import pytest

from llmctl.data.pairs import read_pairs
from llmctl.data.sources import read_documents, source_sha256
from llmctl.errors import LlmctlError, NotFoundError, UsageError


def read(path, **options) -> list[str]:
    return list(read_documents([str(path)], **options))


def test_text_is_never_changed(tmp_path):
    text = "a\r\nb\n\n  c\t中文\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [text]
    assert [line.rstrip("\r") for line in read(tmp_path / "a.txt", split="line")] == ["a", "b", "  c\t中文"]
    assert [block.replace("\r", "") for block in read(tmp_path / "a.txt", split="blank")] == ["a\nb", "  c\t中文"]


ROWS = [{"text": "one\ntwo", "n": 1}, {"text": "诗，“引”", "n": 2}]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.jsonl.gz", "r.csv.gz"])
def test_rows_of_every_format(tmp_path, name: str):
    kind = name.split(".")[1]
    if kind == "jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    elif kind == "json":
        content = json.dumps(ROWS)
    else:
        content = "n,text\n" + "".join(f'{row["n"]},"{row["text"]}"\n' for row in ROWS)
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path / name) == [row["text"] for row in ROWS]


def test_tab_separated_cells_are_literal(tmp_path):
    (tmp_path / "r.tsv").write_text('n\ttext\n1\tsaid "so\n')
    assert read(tmp_path / "r.tsv") == ['said "so']


def test_zst_and_parquet_name_their_extra_or_work(tmp_path):
    for name, module in (("a.txt.zst", "backports.zstd"), ("a.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(LlmctlError) as caught:
            read(tmp_path / name)
        assert caught.value.exit_code in (2, 4, 7)
        if caught.value.exit_code == 7:
            assert module.split(".")[0] in str(caught.value)


def test_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    digest = source_sha256([str(tmp_path)])
    (tmp_path / "a.txt").write_text("other")
    assert source_sha256([str(tmp_path)]) != digest


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"good\nbad \xff byte\n", ("a.txt", "9", "ff")),
        ("a.txt", "好".encode("gb18030") * 20, ("a.txt", "0")),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ("a.txt",)),
        ("a.txt", b"", ("no text",)),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ("a.jsonl", "2")),
        ("a.jsonl", b'{"content": "a"}\n', ("a.jsonl", "1", "text", "content")),
        ("a.json", b'{"text": ', ("a.json",)),
        ("a.csv", b"x,y\n1,2\n", ("a.csv", "text")),
        ("a.txt.gz", gzip.compress(b"hello" * 1000)[:40], ("a.txt.gz",)),
        ("a.txt.gz", b"not gzip", ("a.txt.gz",)),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name: str, content: bytes, parts: tuple[str, ...]):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlmctlError) as caught:
        read(tmp_path / name)
    assert caught.value.exit_code in (2, 4)
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_file_has_its_likeliest_neighbour(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(NotFoundError) as caught:
        read(tmp_path / "corpis.txt")
    assert "corpus.txt" in caught.value.hint


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
