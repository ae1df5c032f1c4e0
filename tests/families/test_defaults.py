"""What a config.json leaves out means what it means for its type; what it says always counts."""

import pytest

from llmctl.families.defaults import DEFAULTS, with_defaults
from llmctl.families.table import FAMILIES, ROWS

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def test_every_type_is_that_of_a_family():
    assert DEFAULTS.keys() <= {row.model_type for row in ROWS}


def test_what_a_file_says_counts_and_null_is_no_default():
    assert with_defaults("llama", {"eos_token_id": None})["eos_token_id"] is None
    assert with_defaults("llama", {"eos_token_id": 7})["eos_token_id"] == 7
    assert with_defaults("no such type", {"a": 1}) == {"a": 1}


def test_the_type_of_the_file_decides():
    read = FAMILIES["LlamaForCausalLM"].read_config
    assert read(SIZES).eos_id == read(SIZES | {"model_type": "llama"}).eos_id == 2
    assert read(SIZES | {"model_type": "another"}).eos_id == -1


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("ArceeForCausalLM", "norm_eps", 1e-5),
        ("Ernie4_5ForCausalLM", "rope_theta", 500000.0),
        ("SmolLM3ForCausalLM", "tie_embeddings", True),
        ("HeliumForCausalLM", "head_dim", 128),
        ("RobertaForMaskedLM", "pad_id", 1),
        ("RobertaForMaskedLM", "d_ff", 96),
        ("SmolLM3ForCausalLM", "bos_id", -1),  # 128000 is beyond the vocabulary
    ],
)
def test_a_missing_key_has_the_default_of_its_type(architecture, field, value):
    values = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "type_vocab_size": 1}
    assert getattr(FAMILIES[architecture].read_config(values), field) == value


def test_an_old_spelling_of_a_key_counts_as_the_key():
    row = FAMILIES["HeliumForCausalLM"]
    values = SIZES | {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert row.read_config(values).rope_theta == 7.0
    assert row.read_config(SIZES | {"num_key_value_heads": 2, "rope_theta": 9.0}).rope_theta == 9.0
