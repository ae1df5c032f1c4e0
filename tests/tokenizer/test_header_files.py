"""Files in a model file's header: the same bytes in both forms, and nothing from a damaged or enormous one."""

import json
import zlib
from base64 import b85encode

import pytest

from llmctl.tokenizer.header_files import COMPRESSED, LIMIT_BYTES, PLAIN, file_metadata, files_in_metadata

FILES = {"tokenizer.json": "词表 vocabulary\n".encode() * 500, "tokenizer.model": bytes(range(256))}


@pytest.mark.parametrize(("compressed", "key"), [(False, PLAIN), (True, COMPRESSED)])
def test_both_forms_return_the_same_bytes(compressed: bool, key: str):
    metadata = file_metadata(FILES, compressed=compressed)
    assert list(metadata) == [key]
    assert files_in_metadata(metadata) == FILES
    assert files_in_metadata({"other": "x"}) is None


def test_compressed_files_take_less_space():
    plain, small = (len(json.dumps(file_metadata(FILES, compressed=one))) for one in (False, True))
    assert small < plain / 5


@pytest.mark.parametrize(
    "text",
    [
        "7",
        "[]",
        json.dumps({"tokenizer.json": 7}),
        json.dumps({"tokenizer.json": "not base85 \u00e9"}),
        json.dumps({"tokenizer.json": b85encode(b"not compressed").decode()}),
        json.dumps({"tokenizer.json": b85encode(zlib.compress(b"x" * 5000)[:-8]).decode()}),
        json.dumps({"tokenizer.json": b85encode(zlib.compress(b"\0" * (LIMIT_BYTES + 1))).decode()}),
    ],
    ids=["number", "list", "no text", "no base85", "not compressed", "truncated", "bomb"],
)
def test_damaged_entries_are_refused(text: str):
    with pytest.raises((ValueError, TypeError)):
        files_in_metadata({COMPRESSED: text})
