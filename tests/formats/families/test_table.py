"""Families: parameters as the core has them, configurations there and back, and refusals that name what is wrong."""

from dataclasses import replace

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.formats.families.parameters import stored_shape
from llmctl.formats.families.table import FAMILIES, family_for, family_of
from llmctl.model.parameters import parameter_shapes
from llmctl.model.presets import PRESETS, preset_config
from llmctl.model.shapes import complete
from llmctl.model.transformer import LanguageModel, initialize

SHAPE = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_positions": 32}
POST = {"norm": "layernorm", "norm_position": "post", "gated": False, "attention_bias": True, "mlp_bias": True}
PAIR = {"family": "encoder_decoder", "n_decoder_layers": 3, "decoder_start_id": 2}
RELATIVE = {"positions": "relative", "attention_scale": 1.0, "n_relative_buckets": 8}
BERT = POST | {
    "family": "encoder",
    "positions": "learned",
    "embedding_norm": True,
    "n_token_types": 2,
    "activation": "gelu",
}
TANH = {"n_labels": 3, "pooled_activation": "tanh"}

CONFIGS = {
    "LlamaForCausalLM": [
        {},
        {"n_kv_heads": 2, "tie_embeddings": False},
        {"mlp_bias": True, "attention_windows": (0, 0)},
    ],
    "Qwen3ForCausalLM": [{"qk_norm": True, "head_dim": 8}],
    "EuroBertForMaskedLM": [{"family": "encoder"}, {"family": "encoder", "mlp_bias": True, "logits_bias": True}],
    "T5ForConditionalGeneration": [
        PAIR | RELATIVE | {"tie_embeddings": False, "activation": "gelu_tanh"},
        PAIR | RELATIVE | {"logits_scale": 0.25, "gated": False, "activation": "relu"},
    ],
    "GPT2LMHeadModel": [POST | {"norm_position": "pre", "positions": "learned", "activation": "gelu_tanh"}],
    "BertForMaskedLM": [BERT | {"head_transform": True, "logits_bias": True}],
    "BertModel": [BERT],
    "BartForConditionalGeneration": [
        POST | PAIR | {"positions": "learned", "position_offset": 2, "embedding_norm": True, "logits_bias": True}
    ],
    "MarianMTModel": [POST | PAIR | {"positions": "sinusoidal", "embedding_scale": 4.0, "activation": "relu"}],
    "LlamaForSequenceClassification": [{"n_labels": 3, "pooling": "last"}],
    "Qwen3ForSequenceClassification": [{"n_labels": 3, "pooling": "last", "qk_norm": True, "head_dim": 8}],
    "GPT2ForSequenceClassification": [
        POST
        | {"norm_position": "pre", "positions": "learned", "activation": "gelu_tanh", "n_labels": 1, "pooling": "last"}
        | {"problem": "regression"}
    ],
    "BertForSequenceClassification": [
        BERT | TANH | {"pooling": "first", "labels": ("no", "yes", "猫")},
    ],
    "EuroBertForSequenceClassification": [
        {"family": "encoder", "n_labels": 3, "pooling": "mean", "pooled_activation": "gelu", "problem": "multi"},
        {"family": "encoder", "n_labels": 3, "pooling": "first", "pooled_activation": "gelu"},
    ],
    "T5ForSequenceClassification": [
        PAIR | RELATIVE | TANH | {"tie_embeddings": False, "activation": "gelu_tanh", "pooling": "last"},
        PAIR | RELATIVE | TANH | {"logits_scale": 0.25, "gated": False, "activation": "relu", "pooling": "last"},
    ],
    "BartForSequenceClassification": [
        POST | PAIR | TANH | {"positions": "learned", "position_offset": 2, "embedding_norm": True, "pooling": "last"}
    ],
    "LlmctlForLanguageModel": [
        {"n_labels": 2, "pooling": "mean", "labels": ("a", "b")},
        BERT | TANH | {"pooling": "mean"},
        {"attention_windows": (0, 8)},
        {"query_layer": True, "positions": "learned"},
        {"norm": "layernorm"},
        {"family": "encoder", "logits_bias": True},
        {"family": "encoder", "positions": "none", "head_transform": True},
        PAIR,
        PAIR | RELATIVE | {"logits_scale": 1.0},
        POST | {"positions": "learned"},
    ],
}
CASES = [(name, settings) for name, rows in CONFIGS.items() for settings in rows]


def config_of(settings: dict) -> ModelConfig:
    return complete(ModelConfig(**(SHAPE | settings)))


@pytest.mark.parametrize("settings", [settings for _, settings in CASES])
def test_parameters_are_those_of_the_core(settings):
    config = config_of(settings)
    with torch.device("meta"):
        state = LanguageModel(config).state_dict()
    assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_parameters_of_the_core(name):
    config = preset_config(name)
    config = complete(replace(config, vocab_size=config.vocab_size or 100))
    with torch.device("meta"):
        state = LanguageModel(config).state_dict()
    assert parameter_shapes(config) == {key: tuple(tensor.shape) for key, tensor in state.items()}
    family = family_for(config)
    assert family.resolve(family.read_config(family.write_config(config)), published_names(config)) == config


def published_names(config: ModelConfig) -> list[str]:
    return [stored.name for stored in family_for(config).layout(config)]


@pytest.mark.parametrize(("architecture", "settings"), CASES)
def test_a_config_goes_there_and_back(architecture, settings):
    config = config_of(settings)
    config = replace(config, attention_windows=() if not any(config.attention_windows) else config.attention_windows)
    family = family_for(config)
    assert family.architecture == architecture
    values = family.write_config(config)
    assert family.resolve(family.read_config(values), published_names(config)) == config


@pytest.mark.parametrize("settings", [settings for _, settings in CASES])
def test_tensors_go_there_and_back(settings):
    model = LanguageModel(config_of(settings))
    initialize(model, 1)
    family, shapes = family_for(model.config), parameter_shapes(model.config)
    published = family.to_published(model.state_dict(), model.config)
    for stored in family.layout(model.config):
        assert tuple(published[stored.name].shape) == stored_shape(stored, shapes)
    state = family.to_internal(published, model.config)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


LLAMA = {
    "vocab_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 4,
}
BART = {"vocab_size": 8, "d_model": 4, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4}
REFUSED = [
    ("LlamaForCausalLM", LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type"),
    ("LlamaForCausalLM", LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
    ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    ("LlamaForCausalLM", LLAMA | {"rope_scaling": "linear"}, "rope_scaling"),
    ("LlamaForCausalLM", LLAMA | {"hidden_act": "xielu"}, "xielu"),
    ("LlamaForCausalLM", LLAMA | {"hidden_size": "4"}, "hidden_size"),
    ("LlamaForCausalLM", LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("LlamaForCausalLM", LLAMA | {"num_hidden_layers": 2**40}, "num_hidden_layers"),
    ("LlamaForCausalLM", LLAMA | {"num_attention_heads": None}, "num_attention_heads"),
    ("LlamaForCausalLM", LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("LlamaForCausalLM", LLAMA | {"bos_token_id": "1"}, "bos_token_id"),
    ("MistralForCausalLM", LLAMA | {"sliding_window": 16}, "sliding_window"),
    ("Qwen3ForCausalLM", LLAMA | {"use_sliding_window": True}, "use_sliding_window"),
    ("Qwen3ForCausalLM", LLAMA | {"layer_types": ["sliding_attention"]}, "layer_types"),
    ("T5ForConditionalGeneration", {"vocab_size": 8, "feed_forward_proj": "gated-mish"}, "gated-mish"),
    ("GPT2LMHeadModel", {"vocab_size": 8, "scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ("BertForMaskedLM", {"vocab_size": 8, "position_embedding_type": "relative_key"}, "relative_key"),
    ("BertModel", {"vocab_size": 8, "is_decoder": True}, "is_decoder"),
    ("BartForConditionalGeneration", BART | {"decoder_ffn_dim": 8}, "decoder_ffn_dim"),
    ("BartForConditionalGeneration", BART | {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("MarianMTModel", BART | {"share_encoder_decoder_embeddings": False}, "share_encoder"),
    ("MarianMTModel", BART | {"decoder_vocab_size": 9}, "decoder_vocab_size"),
    ("LlmctlForLanguageModel", {"family": "cat"}, "family"),
    ("LlmctlForLanguageModel", {"n_layers": 1.5}, "n_layers"),
    ("LlmctlForLanguageModel", {"attention_windows": ["8"]}, "attention_windows"),
    ("LlmctlForLanguageModel", {"gated": 1}, "gated"),
]


@pytest.mark.parametrize(("architecture", "values", "named"), REFUSED)
def test_what_is_not_read_is_refused_by_name(architecture, values, named):
    with pytest.raises(ArtifactError, match=named) as caught:
        FAMILIES[architecture].read_config(values)
    assert caught.value.hint.startswith("what is read:")


def test_a_wide_window_is_no_window():
    values = LLAMA | {"sliding_window": 4096, "max_position_embeddings": 4096}
    assert FAMILIES["MistralForCausalLM"].read_config(values) == FAMILIES["LlamaForCausalLM"].read_config(values)


def test_an_unknown_architecture_is_named_with_what_is_read():
    with pytest.raises(ArtifactError, match="GemmaForCausalLM") as caught:
        family_of({"architectures": ["GemmaForCausalLM"], "model_type": "llama"}, "config.json")
    assert "LlamaForCausalLM" in caught.value.hint
    for values in ({}, {"architectures": None}, {"architectures": [3]}, {"model_type": 7}):
        with pytest.raises(ArtifactError, match=r"config\.json"):
            family_of(values, "config.json")
    assert family_of({"model_type": "gpt2"}, "config.json").architecture == "GPT2LMHeadModel"


def test_every_family_names_its_source():
    assert all(family.source for family in FAMILIES.values())
