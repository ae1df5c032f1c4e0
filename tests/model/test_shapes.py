"""Numbers derived from a ModelConfig, and every contradiction named, all in one message."""

import pytest

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.model.shapes import cached_layers, complete, window_of


def test_zeros_are_derived():
    full = complete(ModelConfig(vocab_size=10, d_model=128, n_heads=4))
    assert (full.n_kv_heads, full.head_dim, full.d_ff, full.n_decoder_layers) == (4, 32, 320, 0)
    assert full.attention_scale == 32**-0.5
    plain = complete(ModelConfig(vocab_size=10, d_model=128, gated=False, family="encoder_decoder", n_layers=3))
    assert (plain.d_ff, plain.n_decoder_layers) == (512, 3)
    assert complete(full) == full


CONTRADICTIONS = [
    ({"vocab_size": 0}, "`model.vocab_size` is 0"),
    ({"d_model": 0}, "`model.d_model` is 0"),
    ({"n_layers": 0}, "`model.n_layers` is 0"),
    ({"n_heads": 0}, "`model.n_heads` is 0"),
    ({"max_positions": -1}, "`model.max_positions` is -1"),
    ({"head_dim": -2}, "`model.head_dim` is -2"),
    ({"d_ff": -8}, "`model.d_ff` is -8"),
    ({"d_model": 130}, "`model.d_model` 130 is not divisible by `model.n_heads` 4"),
    ({"n_kv_heads": 3}, "`model.n_heads` 4 is not divisible by `model.n_kv_heads` 3"),
    ({"head_dim": 7}, "`model.head_dim` 7 is odd"),
    ({"positions": "relative", "n_relative_buckets": 3}, "`model.n_relative_buckets` 3"),
    ({"positions": "relative", "max_relative_distance": 16}, "`model.max_relative_distance` 16"),
    ({"positions": "disentangled", "family": "encoder", "n_relative_buckets": 3}, "`model.n_relative_buckets` 3"),
    ({"positions": "disentangled", "family": "encoder", "max_relative_distance": 9}, "`model.max_relative_distance` 9"),
    ({"positions": "disentangled", "family": "encoder", "qk_norm": True}, "`model.qk_norm`"),
    ({"source_vocab_size": 9}, "`model.source_vocab_size`"),
    ({"source_vocab_size": 9, "family": "encoder_decoder", "n_labels": 2}, "`model.source_vocab_size`"),
    ({"positions": "disentangled"}, "`model.family` encoder, not decoder"),
    ({"family": "encoder", "query_layer": True}, "`model.query_layer`"),
    ({"attention_windows": (0, -4)}, "(0, -4) has a negative width"),
    ({"dropout": 1.0}, "`model.dropout` 1.0"),
]


@pytest.mark.parametrize(("fields", "sentence"), CONTRADICTIONS)
def test_contradiction_is_named_with_its_value(fields, sentence):
    with pytest.raises(UsageError) as caught:
        complete(ModelConfig(**{"vocab_size": 10, **fields}))
    assert sentence in str(caught.value)
    assert caught.value.hint


def test_contradictions_are_reported_together():
    with pytest.raises(UsageError) as caught:
        complete(ModelConfig(vocab_size=0, n_kv_heads=3, dropout=2.0, family="encoder", query_layer=True))
    assert str(caught.value).count(";") == 3


def test_layer_counts_and_windows():
    config = ModelConfig(vocab_size=10, n_layers=3, query_layer=True, attention_windows=(0, 8))
    assert cached_layers(config) == 4
    assert [window_of(config, layer) for layer in range(4)] == [0, 8, 0, 8]
    assert window_of(ModelConfig(), 5) == 0
    pair = ModelConfig(vocab_size=10, family="encoder_decoder", n_layers=3, n_decoder_layers=1)
    assert cached_layers(pair) == 1
