"""Every family against transformers itself, both ways: its random model read by us, ours read by it."""

from pathlib import Path

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.families.classifiers import CLASSIFIERS
from llmctl.families.table import FAMILIES, READ
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from tests.support.architectures import VARIANTS

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = pytest.mark.interop

V, T = 60, 9
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
} | IDS
T5 = {"vocab_size": V, "d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "decoder_start_token_id": 0} | IDS
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | IDS
BERT = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
} | IDS
BART = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
} | IDS

# Name of the case -> (architecture, its config class, settings).
THEIRS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | {"head_dim": 12, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": None}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8, "attention_bias": True}),
    "eurobert": ("EuroBertForMaskedLM", "EuroBertConfig", LLAMA | {"mask_token_id": 3}),
    "eurobert-biases": (
        "EuroBertForMaskedLM",
        "EuroBertConfig",
        LLAMA | {"mlp_bias": True, "tie_word_embeddings": True},
    ),
    "t5-original": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "relu"}),
    "t5-v1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"tie_word_embeddings": False, "n_inner": 50}),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert-bare": ("BertModel", "BertConfig", BERT | {"hidden_act": "relu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART | {"scale_embedding": True}),
    "bart-unscaled": ("BartForConditionalGeneration", "BartConfig", BART),
    "marian": ("MarianMTModel", "MarianConfig", BART | {"activation_function": "swish", "scale_embedding": True}),
    "marian-relu": ("MarianMTModel", "MarianConfig", BART | {"activation_function": "relu"}),
}

SHAPE = {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "max_positions": 64}
SPECIALS = {"pad_id": 0, "bos_id": 1, "eos_id": 2}
POST = {"norm": "layernorm", "norm_position": "post", "gated": False, "attention_bias": True, "mlp_bias": True}
PAIR = {"family": "encoder_decoder", "n_decoder_layers": 3, "decoder_start_id": 2}
RELATIVE = {"positions": "relative", "attention_scale": 1.0, "norm_eps": 1e-6, "head_dim": 16, "n_relative_buckets": 8}
# Architecture that our config must be written as -> the fields that make it.
OURS = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"tie_embeddings": False, "n_kv_heads": 2, "attention_bias": True, "rope_theta": 500.0}),
    ("Qwen3ForCausalLM", {"qk_norm": True, "head_dim": 16, "n_kv_heads": 1}),
    ("EuroBertForMaskedLM", {"family": "encoder", "mask_id": 3}),
    ("EuroBertForMaskedLM", {"family": "encoder", "tie_embeddings": False, "mlp_bias": True, "logits_bias": True}),
    ("T5ForConditionalGeneration", PAIR | RELATIVE | {"activation": "gelu_tanh", "tie_embeddings": False}),
    ("T5ForConditionalGeneration", PAIR | RELATIVE | {"activation": "silu", "logits_scale": 32**-0.5}),
    ("T5ForConditionalGeneration", PAIR | RELATIVE | {"activation": "relu", "gated": False, "logits_scale": 32**-0.5}),
    ("GPT2LMHeadModel", POST | {"norm_position": "pre", "positions": "learned", "activation": "gelu_tanh"}),
    (
        "BertForMaskedLM",
        POST
        | {"family": "encoder", "positions": "learned", "embedding_norm": True, "n_token_types": 2}
        | {"head_transform": True, "logits_bias": True, "activation": "gelu", "norm_eps": 1e-12},
    ),
    (
        "BartForConditionalGeneration",
        POST | PAIR | {"positions": "learned", "position_offset": 2, "embedding_norm": True, "logits_bias": True},
    ),
    (
        "MarianMTModel",
        POST
        | PAIR
        | {"positions": "sinusoidal", "embedding_scale": 32**0.5, "logits_bias": True, "activation": "relu"},
    ),
    ("MarianMTModel", POST | PAIR | {"positions": "sinusoidal", "activation": "silu"}),
]


@pytest.fixture(autouse=True)
def quiet_transformers():
    """Its loading reports are ours to check, not to print."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(level)


def tokens(n_rows: int = 3) -> torch.Tensor:
    return torch.randint(4, V, (n_rows, T), generator=torch.Generator().manual_seed(7))


def randomise(module: torch.nn.Module) -> None:
    """Move every parameter and bias away from the zeros and ones it starts with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:  # not Marian's fixed position table
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in module.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(torch.randn(buffer.shape, generator=generator))


def theirs(model, ids: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return their logits; of a bare encoder its hidden states."""
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = targets
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def ours(
    model: LanguageModel, ids: torch.Tensor, targets: torch.Tensor, mask=None, *, head: bool = True
) -> torch.Tensor:
    """Return our logits or hidden states; where there is padding, as document 0."""
    inputs = {} if mask is None else {"documents_BT": mask}
    if model.config.family == "encoder_decoder":
        inputs["decoder_input_ids_BT"] = targets
    with torch.no_grad():
        hidden = model.hidden(ids, **inputs)
        return model.head(hidden) if head else hidden


def load(path: Path) -> LanguageModel:
    artifact = read_artifact(path)
    model = LanguageModel(artifact.config)
    model.load_state_dict(artifact.state())
    assert model.config == artifact.config, "configurations are read complete"
    return model.eval()


@pytest.mark.parametrize("case", THEIRS)
def test_their_model_gives_the_same_logits_here(case, tmp_path):
    architecture, config_class, settings = THEIRS[case]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config_class)(**settings)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    mine = load(tmp_path)
    ids, targets = tokens(), tokens()[:, 2:7]
    bare = architecture == "BertModel"
    torch.testing.assert_close(
        ours(mine, ids, targets, head=not bare), theirs(model, ids, targets), atol=2e-5, rtol=1e-5
    )
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, 7:] = 0, 0
    if mine.config.family == "decoder":  # their position counting on the right side is ours without padding
        return
    a, b = ours(mine, ids, targets, mask, head=not bare), theirs(model, ids, targets, mask)
    keep = mask.bool() if a.shape[1] == T else torch.ones(a.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(a[keep], b[keep], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", THEIRS)
def test_their_model_goes_through_our_artifact_unchanged(case, tmp_path):
    architecture, config_class, settings = THEIRS[case]
    model = getattr(transformers, architecture)(getattr(transformers, config_class)(**settings)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "theirs")
    first = read_artifact(tmp_path / "theirs")
    out = write_artifact(tmp_path / "ours", first.config, first.stored_state(), files={}, provenance={})
    second = read_artifact(out)
    assert second.config == first.config
    state = second.state()
    assert state.keys() == first.state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.state().items())


@pytest.mark.parametrize(("architecture", "settings"), OURS)
def test_our_model_gives_the_same_logits_there(architecture, settings, tmp_path):
    model = LanguageModel(ModelConfig(**(SHAPE | SPECIALS | settings))).eval()
    initialize(model, 5)
    randomise(model)
    out = write_artifact(tmp_path / "m", model.config, model.state_dict(), files={}, provenance={})
    artifact = read_artifact(out)
    assert artifact.architecture == architecture
    assert artifact.config == model.config
    loaded, report = getattr(transformers, architecture).from_pretrained(out, output_loading_info=True)
    assert {key: list(value) for key, value in report.items() if value} == {}
    ids, targets = tokens(), tokens()[:, 2:7]
    logits = theirs(loaded.eval(), ids, targets)
    torch.testing.assert_close(ours(model, ids, targets), logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours(load(out), ids, targets), logits, atol=2e-5, rtol=1e-5)


def test_every_published_family_is_compared():
    written = {architecture for architecture, _ in OURS}
    read = {architecture for architecture, _, _ in THEIRS.values()}
    # The others: tests/interop/test_architectures.py.
    elsewhere = (
        {READ[row.architecture].architecture for row in VARIANTS.values() if row.architecture in READ}
        - read
        - {row.architecture for row in CLASSIFIERS}
    )
    published = set(FAMILIES) - {"LlmctlForLanguageModel"} - {row.architecture for row in CLASSIFIERS}
    assert read | elsewhere == published
    assert written >= published - elsewhere - {"MistralForCausalLM", "BertModel"}


def test_a_batch_gives_what_each_row_gives_alone(tmp_path):
    architecture, config_class, settings = THEIRS["bart"]
    getattr(transformers, architecture)(getattr(transformers, config_class)(**settings)).save_pretrained(tmp_path)
    model, ids, targets = load(tmp_path), tokens(), tokens()[:, :4]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    together = ours(model, ids, targets, mask)
    torch.testing.assert_close(together[:1], ours(model, ids[:1, :4], targets[:1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:2], ours(model, ids[1:2], targets[1:2]), atol=1e-5, rtol=1e-5)


def test_a_left_padded_decoder_gives_what_the_row_gives_alone(tmp_path):
    architecture, config_class, settings = THEIRS["llama"]
    model = getattr(transformers, architecture)(getattr(transformers, config_class)(**settings)).eval()
    model.save_pretrained(tmp_path)
    mine, ids = load(tmp_path), tokens(1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded > 0).long()
    torch.testing.assert_close(ours(mine, padded, ids, mask)[:, 3:], theirs(model, ids, ids), atol=1e-5, rtol=1e-5)


def test_old_and_new_readers_find_the_same_settings(tmp_path):
    model = LanguageModel(ModelConfig(**(SHAPE | SPECIALS), rope_theta=1234.5))
    out = write_artifact(tmp_path / "m", model.config, model.state_dict(), files={}, provenance={})
    hf = read_artifact(out).hf
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 1234.5
    assert hf["torch_dtype"] == hf["dtype"] == "float32"
    loaded = transformers.AutoConfig.from_pretrained(out)
    assert loaded.rope_parameters["rope_theta"] == 1234.5
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


def test_a_sharded_model_of_theirs_is_read(tmp_path):
    architecture, config_class, settings = THEIRS["llama"]
    model = getattr(transformers, architecture)(getattr(transformers, config_class)(**settings)).eval()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ids = tokens()
    torch.testing.assert_close(ours(load(tmp_path), ids, ids), theirs(model, ids, ids), atol=2e-5, rtol=1e-5)
