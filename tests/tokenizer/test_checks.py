"""Hostile tokenizer files are refused before a library believes them, without a word from native code."""

import base64
import json
import struct

import pytest

from llmctl.errors import ArtifactError
from llmctl.tokenizer.checks import check_ids, check_tokenizer
from llmctl.tokenizer.load import tokenizer_from_files
from tests.support.bpe import byte_level

CASES = {
    "a huge id": lambda c: c["model"]["vocab"].update({"zz": 2**31}),
    "a negative id": lambda c: c["model"]["vocab"].update({"zz": -1}),
    "an id of 20 digits": lambda c: c["model"]["vocab"].update({"zz": 10**20}),
    "an id that is text": lambda c: c["model"]["vocab"].update({"zz": "1"}),
    "an id that is true": lambda c: c["model"]["vocab"].update({"zz": True}),
    "an added id": lambda c: c["added_tokens"][0].update(id=2**32 - 1),
    "an added token without text": lambda c: c["added_tokens"][0].pop("content"),
    "added tokens that are none": lambda c: c.update(added_tokens=7),
    "no model": lambda c: c.pop("model"),
    "an endless expression": lambda c: c.update(pre_tokenizer=split("(a+)+$")),
    "an endless expression in a sequence": lambda c: c.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split("(a|a)*b"), c["pre_tokenizer"]]}
    ),
    "an endless expression in a normalizer": lambda c: c.update(normalizer=replaced({"Regex": "(x+x+)+y"}, "")),
    "doubling": lambda c: c.update(
        normalizer={"type": "Sequence", "normalizers": [replaced({"String": "a"}, "aa")] * 30}
    ),
    "growth by an expression": lambda c: c.update(
        normalizer={"type": "Sequence", "normalizers": [replaced({"Regex": "[ab]"}, "ab")] * 9}
    ),
    "growth by nothing": lambda c: c.update(normalizer=replaced({"String": ""}, "b" * 200)),
    "growth of ones that follow each other": lambda c: c.update(
        normalizer={"type": "Sequence", "normalizers": [replaced({"String": x}, y * 5) for x, y in ("ab", "bc", "cd")]}
    ),
    "growth in the decoder": lambda c: c.update(decoder=replaced({"String": "a"}, "a" * 1000)),
    "growth by a table": lambda c: c.update(normalizer=table(b"\0" * 4, b"x" * 500 + b"\0")),
    "a table that is cut": lambda c: c.update(normalizer=table(b"", b"")),
    "a table of another size": lambda c: c.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff\xff\xff\x7fab").decode()}
    ),
    "steps without end": lambda c: c.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100_000}
    ),
    "pieces of no length": lambda c: c.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replaced(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def table(trie: bytes, texts: bytes) -> dict:
    data = struct.pack("<I", len(trie)) + trie + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def files_with(change) -> dict[str, bytes]:
    content = json.loads(byte_level()["tokenizer.json"])
    change(content)
    return {"tokenizer.json": json.dumps(content).encode()}


@pytest.mark.parametrize("case", CASES)
def test_hostile_tokenizers_are_refused(case: str, capfd):
    with pytest.raises(ArtifactError):
        tokenizer_from_files(files_with(CASES[case])).encode("a" * 60 + "b!" + "abcd" * 9)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "normalizer",
    [
        {
            "type": "Sequence",
            "normalizers": [
                *(replaced({"String": x}, y) for x, y in (("``", '"'), ("''", '"'), ("…", "..."), ("½", "1/2"))),
                {"type": "NFKD"},
                *[replaced({"Regex": " {2,}"}, " ")] * 20,
                *(replaced({"String": sign}, "") for sign in "!?.,;:"),
                replaced({"String": " "}, "▁"),
            ],
        },
        table(b"\0" * 1024, b"\0 \0...\0" + "صلى الله عليه وسلم".encode() + b"\0"),
    ],
)
def test_normalizers_of_published_models_pass(normalizer: dict):
    tokenizer_from_files(files_with(lambda content: content.update(normalizer=normalizer)))


def test_an_expression_with_one_way_to_match_passes():
    tokenizer = tokenizer_from_files(files_with(lambda c: c.update(pre_tokenizer=split(r"(?:\p{L}\p{M}*)+|\P{L}"))))
    assert tokenizer.encode("abc abc") is not None


def test_a_panic_while_encoding_is_an_error(capfd):
    from llmctl.tokenizer.huggingface import as_artifact_error

    tokenizers = pytest.importorskip("tokenizers")
    step = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+b"), "isolated")
    with pytest.raises(ArtifactError, match="this text: "), as_artifact_error("this text"):
        step.pre_tokenize_str("a" * 60)
    with pytest.raises(KeyboardInterrupt), as_artifact_error("this text"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("index", [2**31, -1, 2**63, 2**64, "1", None, 1.5, True])
def test_ids_of_a_vocabulary_are_checked_first(index, capfd):
    pytest.importorskip("tokenizers")
    files = {"vocab.json": json.dumps({"a": 0, "b": index}).encode(), "merges.txt": b"#version: 0.2\n"}
    with pytest.raises(ArtifactError, match=r"`vocab\.json` has the id"):
        tokenizer_from_files(files)
    assert capfd.readouterr().err == ""


def test_a_piece_that_is_not_utf8_is_named():
    from llmctl.config import TokenizerConfig
    from llmctl.tokenizer.sentencepiece import SentencePieceTokenizer
    from llmctl.tokenizer.train import train_tokenizer

    tokenizer = train_tokenizer(["words and more words"] * 20, TokenizerConfig(vocab_size=300, n_sentinels=0))
    piece = next(piece for piece, _ in tokenizer.scored_pieces() if piece.endswith("words"))
    proto = tokenizer.files()["tokenizer.model"]
    damaged = proto.replace(piece.encode(), piece.encode()[:-1] + b"\xff", 1)
    assert damaged != proto
    with pytest.raises(ArtifactError, match="UTF-8"):
        SentencePieceTokenizer(damaged).scored_pieces()


def test_two_tokens_of_one_id_are_refused():
    with pytest.raises(ArtifactError, match="gives the id 3 to `a` and to `b`"):
        check_ids({"a": 3, "b": 3}, "vocab.json")
    with pytest.raises(ArtifactError, match="no tokens"):
        check_tokenizer({"model": {"type": "BPE", "vocab": {}, "merges": []}})


def test_a_sentencepiece_table_that_makes_a_book_of_a_letter_is_refused():
    from llmctl.config import TokenizerConfig
    from llmctl.tokenizer.protobuf import fields
    from llmctl.tokenizer.sentencepiece import SentencePieceTokenizer
    from llmctl.tokenizer.train import train_tokenizer

    proto = train_tokenizer(["words"] * 20, TokenizerConfig(vocab_size=300, n_sentinels=0)).files()["tokenizer.model"]
    assert {number for number, _ in fields(proto)} >= {2, 3}

    def with_table(table: bytes) -> bytes:
        spec = b"\x12" + size_of(table) + table
        return proto + b"\x1a" + size_of(spec) + spec

    for table in (struct.pack("<I", 4) + b"\0" * 4 + b"x" * 500 + b"\0", b"\xff\xff\xff\xff", b"abc"):
        with pytest.raises(ArtifactError, match="a table of characters"):
            SentencePieceTokenizer(with_table(table))


def size_of(data: bytes) -> bytes:
    size = len(data)
    return bytes([size & 0x7F | 0x80, size >> 7]) if size > 0x7F else bytes([size])
