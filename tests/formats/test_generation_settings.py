"""Which ids end a text, from the config and from generation_config.json."""

import json

import pytest

from llmctl.config import ModelConfig
from llmctl.formats.generation_settings import end_ids, forced_first_id, unused_settings, with_end_ids

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


def test_what_is_not_used_is_named():
    files = {"generation_config.json": b'{"num_beams": 4, "top_p": 1.0, "no_repeat_ngram_size": 3, "eos_token_id": 2}'}
    assert "num_beams 4, no_repeat_ngram_size 3;" in unused_settings(files)
    assert unused_settings({"generation_config.json": b'{"top_k": 50, "max_length": 20, "min_length": null}'}) == ""


@pytest.mark.parametrize(("family", "value", "expected"), [("encoder_decoder", 7, 7), ("decoder", 7, None)])
def test_only_an_encoder_decoder_is_forced(family, value, expected):
    config = ModelConfig(family=family, vocab_size=9)
    assert forced_first_id(config, {"generation_config.json": b'{"forced_bos_token_id": 7}'}) == expected
    assert forced_first_id(config, {"generation_config.json": b'{"forced_bos_token_id": 9}'}) is None
