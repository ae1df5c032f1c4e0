"""RoFormer: queries and keys by pairs, and a table in the file that is no parameter."""

import torch
from safetensors.torch import load_file

from llmctl.config import ModelConfig
from llmctl.formats.artifact import count_parameters, read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.safetensors import read_header
from llmctl.model.transformer import LanguageModel, load_tensors
from tests.families.test_table import BERT, SHAPE


def test_its_table_of_sinusoids_is_written_and_counts_for_nothing(tmp_path):
    fields = BERT | {"positions": "rope", "d_embedding": 8, "head_transform": True, "logits_bias": True}
    model = LanguageModel(ModelConfig(**(SHAPE | fields))).eval()
    write_artifact(tmp_path, model.config, model.state_dict(), files={}, provenance={})
    stored = load_file(tmp_path / "model.safetensors")
    table = stored["roformer.encoder.embed_positions.weight"]
    assert table.shape == (32, 4)
    angles = torch.tensor([3.0, 3.0 / 100])
    torch.testing.assert_close(table[3], torch.cat([angles.sin(), angles.cos()]))
    query = stored["roformer.encoder.layer.0.attention.self.query.weight"].view(4, 2, 2, 16)
    own = model.model.layers[0].self_attn.q_proj.weight.view(4, 2, 2, 16)
    assert torch.equal(query, own.transpose(1, 2))
    artifact = read_artifact(tmp_path)
    assert artifact.architecture == "RoFormerForMaskedLM"
    assert count_parameters(read_header(tmp_path / "model.safetensors")) == model.n_parameters
    again = LanguageModel(artifact.config).eval()
    load_tensors(again, artifact.state())
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids), model(ids))
