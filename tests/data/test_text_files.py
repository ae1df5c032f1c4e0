"""What is not UTF-8 is named with the encoding that it probably is."""

import pytest

from llmctl.data.text_files import decode_utf8, is_gb18030
from llmctl.errors import UsageError


@pytest.mark.parametrize(
    ("text", "encoding", "hint"),
    [
        ("从前有一座山，山里有座庙。\n", "gbk", "iconv -f GB18030"),
        ("a mixed line, 混合的一行\n", "gb18030", "iconv -f GB18030"),
        ("un café à la crème, déjà vu\n", "latin1", "LATIN1"),
        ("Größe und Übermaß\n", "latin1", "LATIN1"),
        ("text\n", "utf-16", "iconv -f UTF-16"),
    ],
)
def test_the_hint_names_the_encoding(text, encoding, hint):
    with pytest.raises(UsageError, match="is not UTF-8") as caught:
        decode_utf8(text.encode(encoding), "a.txt")
    assert hint in caught.value.hint


def test_a_part_that_ends_inside_a_character_is_recognized_too():
    assert is_gb18030("山里有座庙".encode("gbk")[:-1])
    assert not is_gb18030(b"\xff\xff\xff")


@pytest.mark.parametrize(("shown", "operand"), [("standard input", "-"), ("a b.txt", "'a b.txt'")])
def test_the_hint_is_a_command(shown, operand):
    with pytest.raises(UsageError) as caught:
        decode_utf8("text".encode("utf-16"), shown)
    assert caught.value.hint.endswith(f"iconv -f UTF-16 -t UTF-8 {operand}")
