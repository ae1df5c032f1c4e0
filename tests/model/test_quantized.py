"""Packed modules have the shapes of the plain ones they replace."""

import pytest
import torch

from llmctl.config import QuantizeConfig
from llmctl.model.quantized import quantize, schemes_of
from llmctl.quantizing.settings import plan_of


@pytest.mark.parametrize("d_embedding", [0, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_table_is_as_wide_as_the_embeddings(build, d_embedding, tied):
    """ALBERT, ELECTRA and RoFormer small have embeddings that are narrower than the model."""
    model = build(family="encoder", d_embedding=d_embedding, tie_embeddings=tied, d_model=32).float()
    plan = plan_of(model.config, QuantizeConfig(model="unused"))
    width = d_embedding or 32
    quantize(model, plan)
    assert schemes_of(model) == plan
    assert (model.model.embed_tokens.n_out, model.model.embed_tokens.n_in) == (29, width)
    assert (model.lm_head.n_out, model.lm_head.n_in) == (29, width)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 29)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_of_sources_is_packed_by_itself(build, tied):
    model = build(family="encoder_decoder", source_vocab_size=37, tie_embeddings=tied, d_model=32).float()
    plan = plan_of(model.config, QuantizeConfig(model="unused"))
    quantize(model, plan)
    assert schemes_of(model) == plan
    assert (model.model.encoder.embed_tokens.n_out, model.model.embed_tokens.n_out, model.lm_head.n_out) == (37, 29, 29)
    with torch.no_grad():
        logits = model(torch.full((1, 3), 36), decoder_input_ids_BT=torch.zeros(1, 2, dtype=torch.long))
    assert logits.shape == (1, 2, 29)
