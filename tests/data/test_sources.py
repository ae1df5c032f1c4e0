"""Documents are read as they are, from every format, and what cannot be read is named to the byte."""

import gzip
import json
import os

import pytest

from llmctl.data import sources, tables, text_files
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
        ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:40], ("a.txt.gz",)),
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


def test_a_missing_file_has_its_likeliest_neighbor(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(NotFoundError) as caught:
        read(tmp_path / "corpis.txt")
    assert "corpus.txt" in caught.value.hint


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", "a\n"), ("a.jsonl", '{"text": "a\\n"}\n'), ("a.csv", 'text\r\n"a\n"\r\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read(tmp_path / name) == ["a\n"]
    (tmp_path / "b.txt").write_bytes("x\ufeffy".encode())
    assert read(tmp_path / "b.txt") == ["x\ufeffy"]


def test_blank_lines_part_paragraphs_and_make_no_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n\na\r\nb\r\n\r\n \t\nc\n\n\nd")
    assert read(tmp_path / "a.txt", split="blank") == ["a\r\nb", "c", "d"]
    assert read(tmp_path / "a.txt", split="line") == ["a", "b", "c", "d"]
    (tmp_path / "b.txt").write_bytes("one\u2028line\x0b\x0cstill\x85so\n".encode())
    assert read(tmp_path / "b.txt", split="line") == ["one\u2028line\x0b\x0cstill\x85so"]


def test_a_long_file_is_cut_between_characters_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 7)
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_CHARS", 20)
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 20)
    for text in ("白日依山盡，黃河入海流。" * 20, "a line\r\n" * 50, "短\n" + "🀄" * 60 + "\nend"):
        (tmp_path / "a.txt").write_bytes(text.encode())
        documents = read(tmp_path / "a.txt")
        assert "".join(documents) == text
        assert len(documents) > 2
        assert max(map(len, documents)) <= 40
        joined = "".join(read(tmp_path / "a.txt", split="line"))
        assert joined == text.replace("\r\n", "").replace("\n", "")


def test_a_json_array_is_read_value_by_value(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 8)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 8)
    texts = ["a", "诗" * 30, '"quoted", [brackets]', "\U0001f400 alone", ""]
    for name, options in (("a.json", {}), ("b.json", {"indent": 3, "ensure_ascii": False})):
        (tmp_path / name).write_text(json.dumps([{"text": text} for text in texts], **options))
        assert read(tmp_path / name) == texts[:4]
    (tmp_path / "c.json").write_text(json.dumps(texts))
    assert read(tmp_path / "c.json") == texts[:4]


def test_half_a_surrogate_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert read(tmp_path / "a.jsonl") == ["a\ufffdb"]


@pytest.mark.parametrize("level", [1, 19])
def test_zst(tmp_path, level: int):
    zstd = pytest.importorskip("backports.zstd", reason="needs the extra `data`")
    text = "text 诗\r\n" * 1000
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(text.encode(), level))
    assert read(tmp_path / "a.txt.zst") == [text]
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(b'{"text": "a"}\n'))
    assert read(tmp_path / "a.jsonl.zst") == ["a"]
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(text.encode())[:-9])
    with pytest.raises(UsageError, match=r"a\.txt\.zst"):
        read(tmp_path / "a.txt.zst")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "诗", None], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "诗"]
    with pytest.raises(UsageError, match="row 0"):
        read(tmp_path / "a.parquet", text_key="body")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"a\.parquet"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("deep.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, ("deep.jsonl", "line 2")),
        ("deep.json", b'["a", ' + b"[" * 100_000, ("deep.json",)),
        ("a.jsonl", b'{"text": 5}\n', ("line 1", "text", "int")),
        ("a.csv", b'x,text\n1,"abc\n', ("a.csv", "line 2")),
        ("a.txt", "text".encode("utf-16"), ("a.txt", "byte 0")),
        ("a.txt", b"fine\n" + "é".encode()[:1], ("a.txt", "byte 5")),
    ],
)
def test_more_that_cannot_be_read_is_named(tmp_path, name: str, content: bytes, parts: tuple[str, ...]):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(tmp_path / name)
    for part in parts:
        assert part in str(caught.value)


def test_a_damaged_archive_is_named(tmp_path):
    content = bytearray(gzip.compress("".join(map(str, range(50_000))).encode()))
    for place in range(20, len(content), len(content) // 9):
        harmed = content.copy()
        harmed[place] ^= 0xFF
        (tmp_path / "a.txt.gz").write_bytes(bytes(harmed))
        with pytest.raises(UsageError, match=r"a\.txt\.gz"):
            read(tmp_path / "a.txt.gz")


def test_names_that_cannot_be(tmp_path):
    with pytest.raises(UsageError, match="empty"):
        read("")
    with pytest.raises(NotFoundError, match="xxx"):
        read("x" * 300)
    with pytest.raises(NotFoundError, match=r"\*\.txt"):
        read(tmp_path / "*.txt")
    with pytest.raises(NotFoundError, match="no text files"):
        read(tmp_path)


def test_what_comes_through_a_pipe_has_no_digest(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text("x")
    assert source_sha256([str(tmp_path / "a.txt")])
    assert source_sha256([str(tmp_path / "a.txt"), str(tmp_path / "pipe")]) == ""
    assert source_sha256(["-"]) == ""
