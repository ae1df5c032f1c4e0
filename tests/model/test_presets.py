"""Presets: every row is buildable, counted without building, and agrees with what its paper publishes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.families.table import family_for
from llmctl.model.parameters import Parameters, count_parameters
from llmctl.model.presets import ALIASES, FAMILIES, PRESETS, get_preset, preset_config
from llmctl.model.shapes import complete
from llmctl.model.transformer import LanguageModel

SIZES = [name for name, row in PRESETS.items() if row.dims_only]
SYSTEMS = [name for name, row in PRESETS.items() if not row.dims_only]

# Relative deviation from the published count that rounding explains. What is not here must agree exactly.
ROUNDED = {
    "transformer-base": 0.03,  # 65 M is printed for a vocabulary of "about 37000"
    "transformer-big": 0.01,
    "gpt3-small": 0.005,
    "gpt3-medium": 0.02,  # 356 M are printed as 350 M
    "gpt3-large": 0.005,
    "gpt3-xl": 0.015,
    "gpt3-2.7b": 0.02,
    "gpt3-6.7b": 0.01,
    "gpt3-13b": 0.01,
    "gpt3-175b": 0.005,
    "pangu-alpha-2.6b": 0.01,
    "pangu-alpha-13b": 0.025,  # 13.1 B is printed; 40 layers with the query layer among them make 12.8 B
    "pangu-alpha-200b": 0.001,
    "jurassic-1-large": 0.001,
    "jurassic-1-jumbo": 0.001,
}
# The published architecture that each system is written to disk as; the others are written natively, because
# alternating windows and a query layer have no published name.
SIZE_WRITTEN_AS = {
    "decoder": "LlamaForCausalLM",
    "encoder": "EuroBertForMaskedLM",
    "encoder_decoder": "T5ForConditionalGeneration",
}
WRITTEN_AS = {
    "transformer-base": "MarianMTModel",
    "transformer-big": "MarianMTModel",
    "bert-base": "BertForMaskedLM",
    "bert-large": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt2-medium": "GPT2LMHeadModel",
    "gpt2-large": "GPT2LMHeadModel",
    "gpt2-xl": "GPT2LMHeadModel",
    "jurassic-1-large": "GPT2LMHeadModel",
    "jurassic-1-jumbo": "GPT2LMHeadModel",
    "t5-v1_1-small": "T5ForConditionalGeneration",
    "t5-v1_1-base": "T5ForConditionalGeneration",
    "bart-base": "BartForConditionalGeneration",
    "smollm2-135m": "LlamaForCausalLM",
    "qwen3-0.6b": "Qwen3ForCausalLM",
    "tinyllama-1.1b": "LlamaForCausalLM",
    "llama2-7b": "LlamaForCausalLM",
}
NATIVE = "LlmctlForLanguageModel"
# The released BART keeps its logits bias as a buffer of zeros, which is not counted; ours is a parameter.
MORE = {"bart-base": 50_265}


def built_on_meta(config: ModelConfig) -> Parameters:
    """Count a real model, whose tensors have no storage."""
    with torch.device("meta"):
        model = LanguageModel(config)
    tables = ("embed_tokens", "embed_positions", "embed_token_types", "relative_bias", "query_embeddings")
    named = dict(model.named_parameters())
    embedding = sum(p.numel() for name, p in named.items() if any(table in name for table in tables))
    total = sum(p.numel() for p in named.values())
    matrices = sum(
        p.numel()
        for name, p in named.items()
        if p.dim() == 2 and "lm_head" not in name and not any(table in name for table in tables)
    )
    return Parameters(total, embedding, total - embedding, matrices, model.lm_head.weight.numel())


@pytest.mark.parametrize("name", SYSTEMS)
def test_system_has_its_published_number_of_parameters(name):
    published = PRESETS[name].n_parameters
    counted = built_on_meta(preset_config(name))
    assert count_parameters(preset_config(name)) == counted
    assert counted.total - MORE.get(name, 0) == pytest.approx(published, rel=ROUNDED.get(name, 0), abs=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SIZES)
def test_size_is_built_in_every_family(name, family):
    config = preset_config(name, family)
    assert config.family == family
    assert count_parameters(config) == built_on_meta(config)


@pytest.mark.parametrize("name", SYSTEMS)
def test_system_is_written_as_its_published_architecture(name):
    config = complete(preset_config(name))
    if config.family == "encoder_decoder":  # training takes the decoder's first token from the tokenizer
        config = replace(config, decoder_start_id=0)
    assert family_for(config).architecture == WRITTEN_AS.get(name, NATIVE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SIZES)
def test_size_is_written_without_conversion(name, family):
    assert family_for(complete(preset_config(name, family))).architecture == SIZE_WRITTEN_AS[family]


def test_2017_transformer_without_a_first_token_is_native():
    assert family_for(complete(preset_config("transformer-base"))).architecture == NATIVE


@pytest.mark.parametrize("name", SIZES)
def test_size_has_widths_that_block_quantization_divides(name):
    step = 64 if name in {"tiny", "mini"} else 256
    config = preset_config(name)
    assert config.d_model % step == 0
    assert config.d_ff % step == 0


def test_tiny_is_about_a_million():
    assert 0.95e6 < count_parameters(preset_config("tiny")).total < 1.05e6


configs = st.builds(
    ModelConfig,
    family=st.sampled_from(["decoder", "encoder", "encoder_decoder"]),
    vocab_size=st.integers(2, 50),
    d_model=st.sampled_from([8, 24, 32]),
    n_layers=st.integers(1, 3),
    n_decoder_layers=st.integers(0, 2),
    n_heads=st.sampled_from([2, 4]),
    n_kv_heads=st.sampled_from([0, 1, 2]),
    head_dim=st.sampled_from([0, 6]),
    d_ff=st.sampled_from([0, 17]),
    max_positions=st.integers(1, 20),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    norm_position=st.sampled_from(["pre", "post"]),
    embedding_norm=st.booleans(),
    positions=st.sampled_from(["rope", "learned", "sinusoidal", "relative", "none"]),
    position_offset=st.integers(0, 2),
    gated=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.booleans(),
    query_layer=st.booleans(),
    n_token_types=st.integers(0, 2),
    tie_embeddings=st.booleans(),
    logits_bias=st.booleans(),
    head_transform=st.booleans(),
)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(configs.filter(lambda config: not (config.query_layer and config.family != "decoder")))
def test_closed_form_equals_the_built_model(config):
    assert count_parameters(config) == built_on_meta(config)


def test_alias_and_letter_case():
    assert get_preset("PanGu-Alpha") is PRESETS["pangu-alpha-200b"]
    assert all(target in PRESETS and alias not in PRESETS for alias, target in ALIASES.items())


def test_unknown_name_is_answered_with_the_closest():
    with pytest.raises(UsageError, match="unknown preset `gpt-2`") as caught:
        get_preset("gpt-2")
    assert "`gpt2`" in caught.value.hint


def test_published_system_refuses_another_family():
    with pytest.raises(UsageError, match="`bert-base` is of the family `encoder`, not `decoder`") as caught:
        preset_config("bert-base", "decoder")
    assert "`tiny`" in caught.value.hint
    assert preset_config("bert-base", "encoder") == preset_config("bert-base")


def test_every_row_names_its_source():
    assert all(row.source for row in PRESETS.values())
    assert all(row.n_parameters for row in PRESETS.values() if not row.dims_only)


def test_presets_need_no_torch():
    code = (
        "import sys; from llmctl.model import parameters, presets; "
        "parameters.count_parameters(presets.preset_config('tiny')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
