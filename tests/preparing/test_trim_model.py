"""Models with a trimmed vocabulary compute what the whole one computes, in all families and with all heads."""

import json
from dataclasses import replace

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import ModelConfig
from llmctl.errors import OutputError, UnsupportedModelError, UsageError
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.preparing.trim_model import trim_model, trim_tokenizer
from llmctl.tokenizer.load import load_tokenizer

TEXT = ["a list of strings \n" * 30] * 25
MODELS = {
    "decoder": {"positions": "rope"},
    "tied": {"positions": "learned", "norm": "layernorm", "tie_embeddings": True},
    "encoder": {"family": "encoder", "positions": "learned", "norm": "layernorm", "logits_bias": True},
    "embedding": {"family": "encoder", "positions": "learned", "norm": "layernorm", "d_embedding": 16},
    "classifier": {"family": "encoder", "positions": "learned", "norm": "layernorm", "n_labels": 3},
    "encoder_decoder": {"family": "encoder_decoder", "positions": "relative", "attention_scale": 1.0},
}


@pytest.fixture
def make(tmp_path, text_tokenizer):
    def make(**fields):
        settings = {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_positions": 64, "bos_id": 2, "eos_id": 3}
        roles = {"pad_id": 0, "decoder_start_id": 0, "tie_embeddings": False}
        torch.manual_seed(0)
        # More rows than tokens, as published tables have.
        size = {"vocab_size": text_tokenizer.vocab_size + 6}
        model = LanguageModel(ModelConfig(**(settings | roles | size | fields)))
        initialize(model, 0)
        files, path = text_tokenizer.files(), tmp_path / "whole"
        return write_artifact(path, model.config, model.state_dict(), files=files, provenance={"objective": "x"})

    return make


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal_and_only_the_vocabulary_is_smaller(name, make, tmp_path, text_tokenizer):
    source, out = make(**MODELS[name]), tmp_path / "small.safetensors"
    found = trim_model(source, out, TEXT)
    before, after = (load_model(path, device="cpu", dtype="float32") for path in (source, out))
    assert found.difference == 0.0
    assert found.comparison.equal_texts == 1.0
    assert after.tokenizer.vocab_size == after.model.config.vocab_size == found.comparison.vocab_size < 330
    assert found.bytes_after < found.bytes_before
    wanted = replace(before.model.config, vocab_size=after.model.config.vocab_size)
    assert after.model.config == wanted  # special tokens come first: their ids are the same
    assert after.artifact.provenance["objective"] == "x"
    assert after.artifact.provenance["vocabulary"]["from"] == before.model.config.vocab_size
    assert after.tokenizer.decode(after.tokenizer.encode("中文 strings")) == "中文 strings"


def test_a_tokenizer_alone_is_trimmed_as_well(tmp_path, text_tokenizer):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, data in text_tokenizer.files().items():
        (folder / name).write_bytes(data)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "spiece.model").write_bytes(b"of another tokenizer")
    found = trim_tokenizer(folder, tmp_path / "small", TEXT, force=True)
    assert load_tokenizer(tmp_path / "small").vocab_size == found.comparison.vocab_size
    assert not (tmp_path / "small" / "spiece.model").exists()
    assert found.difference is None
    assert found.to_dict().keys() == found.comparison.to_dict().keys()
    assert json.loads((tmp_path / "small" / "tokenizer.json").read_bytes())["model"]["vocab"]


def test_what_cannot_be_trimmed_is_refused(make, tmp_path):
    source = make()
    with pytest.raises(OutputError, match="already exists"):
        trim_model(source, tmp_path, TEXT)
    with pytest.raises(UsageError, match="is the model itself"):
        trim_model(source, tmp_path / "." / "whole", TEXT, force=True)
    with pytest.raises(UsageError, match="--vocab-size 9"):
        trim_model(source, tmp_path / "small", TEXT, most=9)
    assert not (tmp_path / "small").exists()
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink(missing_ok=True)
    bare = write_artifact(
        tmp_path / "bare",
        load_model(source, device="cpu", dtype="float32").model.config,
        load_model(source, device="cpu", dtype="float32").model.state_dict(),
        files={},
        provenance={},
    )
    with pytest.raises(UsageError, match="has no tokenizer"):
        trim_model(bare, tmp_path / "small", TEXT)
    two = make_two(tmp_path)
    with pytest.raises(UnsupportedModelError, match="a vocabulary for each language"):
        trim_model(two, tmp_path / "small", TEXT)


def make_two(tmp_path):
    model = LanguageModel(
        ModelConfig(
            family="encoder_decoder", vocab_size=40, source_vocab_size=30, d_model=16, n_layers=1, n_heads=2,
            positions="sinusoidal", norm_position="post", norm="layernorm",
        )
    )  # fmt: skip
    return write_artifact(tmp_path / "two", model.config, model.state_dict(), files={}, provenance={})
