"""Which ids end a text, from the config and from generation_config.json."""

import json

import pytest

from llmctl.config import ModelConfig
from llmctl.formats.generation_settings import end_ids, with_end_ids

CONFIG = ModelConfig(eos_id=2, bos_id=1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{}", [2]),
        (b'{"eos_token_id": 7}', [2, 7]),
        (b'{"eos_token_id": [7, 2, 9]}', [2, 7, 9]),
        (b'{"eos_token_id": [true, -1, "x", null]}', [2]),
        (b"[1]", [2]),
        (b"{", [2]),
    ],
)
def test_ids_come_from_both(content, expected):
    assert end_ids(CONFIG, {"generation_config.json": content}) == expected


def test_other_settings_stay():
    files = {"generation_config.json": b'{"temperature": 0.6, "eos_token_id": 2}', "vocab.txt": b"x"}
    more = with_end_ids(CONFIG, files, [9])
    assert json.loads(more["generation_config.json"]) == {"temperature": 0.6, "eos_token_id": [2, 9]}
    assert more["vocab.txt"] == b"x"
    assert with_end_ids(CONFIG, files, [2]) == files
    assert json.loads(with_end_ids(CONFIG, {}, [9])["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 9],
    }
