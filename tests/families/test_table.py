"""Families: parameters as the core has them, configurations there and back, and refusals that name what is wrong."""

import json
import random
import tracemalloc
from dataclasses import asdict, fields, replace
from itertools import cycle, islice
from typing import get_args, get_origin, get_type_hints

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, UsageError
from llmctl.families.parameters import stored_shape
from llmctl.families.rows import flag
from llmctl.families.table import FAMILIES, PUBLISHED, READ, family_for, family_of, with_architecture
from llmctl.model.parameters import parameter_shapes
from llmctl.model.presets import PRESETS, preset_config
from llmctl.model.shapes import complete
from llmctl.model.supports import effective
from llmctl.model.transformer import LanguageModel, initialize
from tests.support.architectures import VARIANTS
from tests.support.switches import Switched, switched

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
        {"attention_windows": (0, 8), "positions": "none"},
        {"query_layer": True, "positions": "learned"},
        {"norm": "layernorm", "norm_weight": False, "gated": False},
        {"family": "encoder", "logits_bias": True},
        {"family": "encoder", "positions": "none", "head_transform": True},
        PAIR,
        PAIR | RELATIVE | {"logits_scale": 0.5},
        POST | {"positions": "learned"},
    ],
}
CASES = [(name, settings) for name, rows in CONFIGS.items() for settings in rows]
# Every other published architecture by the configuration of a tiny model of it.
READABLE = {
    name: (READ[variant.architecture], variant.settings)
    for name, variant in VARIANTS.items()
    if variant.architecture in READ and name != "marian-two-vocabularies"
}


def config_of(settings: dict) -> ModelConfig:
    return complete(ModelConfig(**(SHAPE | settings)))


@pytest.mark.parametrize("settings", [settings for _, settings in CASES])
def test_parameters_are_those_of_the_core(settings):
    config = config_of(settings)
    with torch.device("meta"):
        state = LanguageModel(config).state_dict()
    assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", READABLE)
def test_a_published_config_goes_there_and_back(name):
    family, settings = READABLE[name]
    config = complete(family.read_config(settings))
    with torch.device("meta"):
        state = LanguageModel(config).state_dict()
    assert parameter_shapes(config) == {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert family.expresses(config)
    values = family.write_config(config)
    json.dumps(values, allow_nan=False)
    back = complete(family.read_config(values))
    assert effective(back) == effective(config)
    assert list(family.write_config(back).items()) == list(values.items())
    preferred = with_architecture(config, family)
    assert family_for(complete(preferred)) is family


@pytest.mark.parametrize("name", READABLE)
def test_published_tensors_go_there_and_back(name):
    family, settings = READABLE[name]
    model = LanguageModel(family.read_config(settings))
    initialize(model, 1)
    for parameter in model.parameters():
        if parameter.dim() < 2:  # a norm's 1 would hide an order that is wrong
            torch.nn.init.normal_(parameter, mean=1.0, generator=torch.Generator().manual_seed(2))
    published = family.to_published(model.state_dict(), model.config)
    shapes = parameter_shapes(model.config)
    for stored in family.layout(model.config):
        assert tuple(published[stored.name].shape) == stored_shape(stored, shapes)
    state = family.to_internal(published, model.config)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(
            state[key], tensor, rtol=0, atol=1e-6 if "gemma" in name or name == "nemotron" else 0
        )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_parameters_of_the_core(name):
    config = preset_config(name)
    config = complete(replace(config, vocab_size=config.vocab_size or 100))
    with torch.device("meta"):
        state = LanguageModel(config).state_dict()
    assert parameter_shapes(config) == {key: tuple(tensor.shape) for key, tensor in state.items()}
    family = family_for(config)
    assert family.resolve(family.read_config(family.write_config(config)), published_names(config)) == config


def published_names(config: ModelConfig) -> dict[str, str]:
    return {stored.name: stored.name for stored in family_for(config).layout(config)}


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


@pytest.mark.parametrize(("architecture", "settings"), CASES)
def test_reading_and_writing_keeps_every_key(architecture, settings):
    family = FAMILIES[architecture]
    values = family.write_config(config_of(settings))
    config = family.resolve(family.read_config(values), published_names(config_of(settings)))
    assert list(family.write_config(config).items()) == list(values.items()), "the order counts: files are compared"


def shallow(config: ModelConfig) -> dict:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def variants(n: int) -> list[ModelConfig]:
    """Return configs of the cases above, and `n` with up to three fields changed, each to a value of its type."""
    rng, kinds = random.Random(1), get_type_hints(ModelConfig)
    numbers = {"n_kv_heads": [2, 4], "head_dim": [4, 6], "d_model": [16, 20], "logits_scale": [1.0, 0.25, 0.5]}
    numbers |= {
        "n_token_types": [0, 1],
        "position_offset": [0, 1, 2],
        "n_labels": [0, 2],
        "embedding_scale": [1.0, 4.0],
    }
    numbers |= {
        "norm_eps": [1e-5, 1e-6],
        "attention_scale": [0.0, 1.0, 0.5],
        "rope_theta": [1e4, 500.0],
        "mask_id": [3],
    }
    options = {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) not in (None, tuple)}
    options |= {name: (False, True) for name, kind in kinds.items() if kind is bool} | numbers
    del options["rope_scaling"]  # needs its numbers
    bases = [SHAPE | settings for _, settings in CASES]
    bases += [shallow(complete(family.read_config(settings))) for family, settings in READABLE.values()]
    configs = [complete(ModelConfig(**base)) for base in bases]
    n += len(configs)
    while len(configs) < n:
        base = rng.choice(bases)
        settings = base | {name: rng.choice(options[name]) for name in rng.sample(sorted(options), rng.randint(1, 3))}
        try:
            configs.append(complete(ModelConfig(**settings)))
        except UsageError:
            continue
    return configs


def uncycled(config: ModelConfig) -> dict:
    """Return the fields with an effect, those that are cycled over the layers once per layer."""
    shown = asdict(effective(config))
    for name in ("attention_windows", "rope_thetas"):
        shown[name] = list(islice(cycle(shown[name] or [None]), config.n_layers))
    return shown


def test_what_a_family_expresses_survives_it():
    """Also for families that are not the first: what is written is read as it was, apart from fields without effect."""
    counts = dict.fromkeys(FAMILIES, 0)
    for config in variants(150):
        for family in PUBLISHED:
            if not family.expresses(config):
                continue
            counts[family.architecture] += 1
            values = family.write_config(config)
            back = family.resolve(
                family.read_config(values), {stored.name: stored.name for stored in family.layout(config)}
            )
            skipped = dict.fromkeys(family.not_compared)
            assert uncycled(back) | skipped == uncycled(config) | skipped
            assert family.write_config(back).keys() == values.keys()
            held = {name for stored in family.layout(config) for name in stored.holds}
            assert parameter_shapes(config).keys() - held <= ({"lm_head.weight"} if config.tie_embeddings else set())
    assert all(counts[family.architecture] for family, _ in READABLE.values()), counts


@pytest.mark.parametrize("settings", [settings for _, settings in CASES])
def test_no_published_family_drops_a_switch_that_it_does_not_name(settings):
    config = switched(config_of(settings))
    assert not [family.architecture for family in PUBLISHED if family.expresses(config)]
    assert family_for(config).architecture == "LlmctlForLanguageModel"
    assert family_for(config).write_config(config)["new_switch"] is True
    at_default = switched(config_of(settings), new_switch=False)
    assert family_for(at_default) is family_for(config_of(settings))


def test_a_family_takes_a_new_switch_by_naming_it(monkeypatch):
    monkeypatch.setattr("llmctl.families.family.ModelConfig", Switched)
    config, llama = switched(config_of({})), FAMILIES["LlamaForCausalLM"]
    assert not llama.expresses(config)
    taught = replace(llama, rows=(*llama.rows, flag("new_key", "new_switch")))
    assert taught.expresses(config)
    assert taught.write_config(config) == llama.write_config(config) | {"new_key": True}
    assert taught.read_config(taught.write_config(config)) == config


@pytest.mark.parametrize(
    "value", [{"norm_position": "between"}, {"positions": "spiral"}, {"activation": "relu9"}, {"qk_norm": "width"}]
)
@pytest.mark.parametrize("settings", [settings for name, settings in CASES if name != "LlmctlForLanguageModel"])
def test_no_published_family_drops_a_new_value(settings, value):
    config = replace(config_of(settings), **value)
    assert not [family.architecture for family in PUBLISHED if family.expresses(config)]


def test_the_native_format_has_every_field():
    values = FAMILIES["LlmctlForLanguageModel"].write_config(config_of({}))
    assert list(values) == [field.name for field in fields(ModelConfig)]
    assert issubclass(Switched, ModelConfig)


LLAMA = {
    "vocab_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 4,
}
BART = {"vocab_size": 8, "d_model": 4, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4}
DEBERTA = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
DEBERTA |= {"relative_attention": True, "share_att_key": True, "position_biased_input": False, "position_buckets": 8}
DEBERTA |= {"pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm"}
REFUSED = [
    ("LlamaForCausalLM", LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("LlamaForCausalLM", LLAMA | {"rope_scaling": {"type": "linear"}}, "factor"),
    ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
    ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": -1.0}}, "factor"),
    ("Phi3ForCausalLM", LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": []}}, "long"),
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
    ("LlamaForCausalLM", LLAMA | {"pretraining_tp": 2}, "pretraining_tp"),
    ("LlamaForSequenceClassification", LLAMA | {"id2label": {"1": "a"}}, "id2label"),
    ("LlamaForSequenceClassification", LLAMA | {"problem_type": "ranking"}, "problem_type"),
    ("EuroBertForSequenceClassification", LLAMA | {"classifier_pooling": "late"}, "classifier_pooling"),
    ("MistralForCausalLM", LLAMA | {"sliding_window": 0}, "sliding_window"),
    ("Qwen3ForCausalLM", LLAMA | {"layer_types": ["sliding_attention"]}, "sliding_window"),
    ("Qwen3ForCausalLM", LLAMA | {"layer_types": ["chunked_attention"]}, "layer_types"),
    ("Qwen3ForCausalLM", LLAMA | {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("SmolLM3ForCausalLM", LLAMA | {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    (
        "GPTNeoForCausalLM",
        {"vocab_size": 8, "num_layers": 2, "attention_types": [[["local"], 10**12]]},
        "attention_types",
    ),
    ("RobertaForMaskedLM", {"vocab_size": 8, "max_position_embeddings": 2}, "max_position_embeddings"),
    ("ErnieForMaskedLM", {"vocab_size": 8, "use_task_id": True}, "use_task_id"),
    ("AlbertForMaskedLM", {"vocab_size": 8, "num_hidden_groups": 2}, "num_hidden_groups"),
    ("RoFormerModel", {"vocab_size": 8, "rotary_value": True}, "rotary_value"),
    ("DebertaV2Model", DEBERTA | {"conv_kernel_size": 3}, "conv_kernel_size"),
    ("DebertaV2Model", DEBERTA | {"position_biased_input": True}, "position_biased_input"),
    ("DebertaV2Model", DEBERTA | {"pos_att_type": "c2p"}, "pos_att_type"),
    ("DebertaV2Model", {key: value for key, value in DEBERTA.items() if key != "share_att_key"}, "share_att_key"),
    ("DebertaV2Model", {key: value for key, value in DEBERTA.items() if key != "norm_rel_ebd"}, "norm_rel_ebd"),
    ("DebertaV2Model", {key: value for key, value in DEBERTA.items() if key != "position_buckets"}, "position_buckets"),
    ("DebertaV2ForSequenceClassification", DEBERTA | {"pooler_hidden_act": "tanh"}, "pooler_hidden_act"),
    ("FalconForCausalLM", LLAMA | {"new_decoder_architecture": True}, "new_decoder_architecture"),
    ("T5ForConditionalGeneration", {"vocab_size": 8, "feed_forward_proj": "gated-mish"}, "gated-mish"),
    ("GPT2LMHeadModel", {"vocab_size": 8, "scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ("BertForMaskedLM", {"vocab_size": 8, "position_embedding_type": "relative_key"}, "relative_key"),
    ("BertModel", {"vocab_size": 8, "is_decoder": True}, "is_decoder"),
    ("BartForConditionalGeneration", BART | {"decoder_ffn_dim": 8}, "decoder_ffn_dim"),
    ("BartForConditionalGeneration", BART | {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("MarianMTModel", BART | {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("MarianMTModel", BART | {"decoder_vocab_size": 9}, "decoder_vocab_size"),
    ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": []}}, "rope_type"),
    ("LlmctlForLanguageModel", {"family": "cat"}, "family"),
    ("LlmctlForLanguageModel", {"n_layers": 1.5}, "n_layers"),
    ("LlmctlForLanguageModel", {"attention_windows": ["8"]}, "attention_windows"),
    ("LlmctlForLanguageModel", {"gated": 1}, "gated"),
    ("ModernBertForMaskedLM", {"vocab_size": 9, "layer_types": "all"}, "of ModernBertForMaskedLM has `layer_types`"),
]


@pytest.mark.parametrize(("architecture", "values", "named"), REFUSED)
def test_what_is_not_read_is_refused_by_name(architecture, values, named):
    with pytest.raises(ArtifactError, match=named) as caught:
        FAMILIES[architecture].read_config(values)
    assert caught.value.hint.startswith("what is read:")


@pytest.mark.parametrize(
    ("architecture", "values", "named"),
    [
        ("LlamaForCausalLM", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("Qwen3ForCausalLM", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("OlmoeForCausalLM", {"num_experts": 10**9}, "num_experts"),
        ("OlmoeForCausalLM", {"num_experts": 1000, "num_hidden_layers": 1000}, "num_experts"),
        ("LlmctlForLanguageModel", {"n_experts": 10**9}, "n_experts"),
    ],
)
def test_a_number_that_lies_costs_no_memory(architecture, values, named):
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=named):
            FAMILIES[architecture].read_config(LLAMA | values)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_the_scale_of_scores_follows_from_the_width_of_a_head():
    config = FAMILIES["Qwen3ForCausalLM"].read_config(LLAMA)  # without head_dim, which is 128 there
    assert (config.head_dim, config.attention_scale) == (128, 128**-0.5)


def test_a_wide_window_is_no_window():
    values = LLAMA | {"sliding_window": 4096, "max_position_embeddings": 4096, "num_key_value_heads": 2}
    assert FAMILIES["MistralForCausalLM"].read_config(values) == FAMILIES["LlamaForCausalLM"].read_config(values)
    narrow = FAMILIES["MistralForCausalLM"].read_config(values | {"sliding_window": 16})
    assert narrow.attention_windows == (16,)


def test_an_unknown_architecture_is_named_with_what_can_run_it():
    with pytest.raises(ArtifactError, match="MambaForCausalLM") as caught:
        family_of({"architectures": ["MambaForCausalLM"], "model_type": "llama"}, "config.json")
    assert "transformers" in caught.value.hint
    for values in ({}, {"architectures": None}, {"architectures": [3]}, {"model_type": 7}):
        with pytest.raises(ArtifactError, match=r"config\.json"):
            family_of(values, "config.json")
    assert family_of({"model_type": "gpt2"}, "config.json").architecture == "GPT2LMHeadModel"


def test_every_family_names_its_source():
    assert all(family.source for family in FAMILIES.values())
