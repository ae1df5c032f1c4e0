"""Defaults that the model decides: the learning rate falls with its size, a tied table counted once."""

from dataclasses import replace

import pytest

from llmctl.config import FinetuneConfig, ModelConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.parameters import count
from llmctl.model.presets import preset_config
from llmctl.model.transformer import LanguageModel
from llmctl.training.finetune_settings import settle
from llmctl.training.settings import lr_for_size


def test_the_reference_model_has_the_reference_rate():
    assert lr_for_size(110_000_000, 5e-5, 110e6, 1e-5, 1e-3) == 5e-5
    assert lr_for_size(10**12, 5e-5, 110e6, 1e-5, 1e-3) == 1e-5
    assert lr_for_size(100, 5e-5, 110e6, 1e-5, 1e-3) == 1e-3


def test_minilm_is_counted_once():
    shape = replace(preset_config("bert-base", "encoder"), n_layers=6, d_model=384, n_heads=12, d_ff=1536)
    assert count(shape) == pytest.approx(22.6e6, rel=0.01)
    assert lr_for_size(count(shape), 5e-5, 110e6, 1e-5, 1e-3) == 1.1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_changes_the_rate(tmp_path, tied: bool):
    shape = ModelConfig(vocab_size=20_000, d_model=64, n_layers=1, n_heads=2, tie_embeddings=tied)
    model = LanguageModel(shape)
    write_artifact(tmp_path / "m", model.config, model.state_dict(), files={}, provenance={})
    rate = settle(FinetuneConfig(model=str(tmp_path / "m"))).optim.lr
    assert rate == lr_for_size(model.n_parameters, 5e-5, 110e6, 1e-5, 1e-3)
