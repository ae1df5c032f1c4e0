"""DeBERTa as Microsoft publishes it: a configuration without an architecture, with a vocabulary head or without."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.config import ModelConfig
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, load_tensors
from tests.families.test_table import BERT, SHAPE

FIELDS = BERT | {
    "n_token_types": 0,
    "positions": "disentangled",
    "n_relative_buckets": 16,
    "head_transform": True,
    "logits_bias": True,
}
OLD = {
    "cls.predictions.bias": "lm_predictions.lm_head.bias",
    "cls.predictions.transform.dense": "lm_predictions.lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_predictions.lm_head.LayerNorm",
}


def as_published(folder, *, head: bool):
    """Write a model, give its files the names of v3's, with its head or without; return the model."""
    model = LanguageModel(ModelConfig(**(SHAPE | FIELDS))).eval()
    write_artifact(folder, model.config, model.state_dict(), files={}, provenance={})
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert values.pop("architectures") == ["DebertaV2ForMaskedLM"]
    values |= {"pos_att_type": "p2c|c2p", "max_relative_positions": -1}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = {"mask_predictions.dense.weight": torch.zeros(16, 16)}
    for today, tensor in load_file(folder / "model.safetensors").items():
        name = next((today.replace(new, old) for new, old in OLD.items() if new in today), today)
        if head or not name.startswith("lm_predictions."):
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("head", [True, False])
def test_the_tensors_tell_whether_there_is_a_head(tmp_path, head):
    model = as_published(tmp_path, head=head)
    artifact = read_artifact(tmp_path)
    again = LanguageModel(artifact.config).eval()
    load_tensors(again, artifact.state())
    ids = torch.arange(20)[None]
    assert torch.equal(artifact.state()["model.layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)
    assert artifact.config.max_relative_distance == artifact.config.max_positions
    with torch.no_grad():
        states = again.hidden(ids)
        assert torch.equal(again(ids), model.head(states) if head else states @ again.model.embed_tokens.weight.T)
    written = write_artifact(tmp_path / "again", again.config, again.state_dict(), files={}, provenance={})
    assert read_artifact(written).architecture == ("DebertaV2ForMaskedLM" if head else "DebertaV2Model")
