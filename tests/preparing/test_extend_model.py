"""Models with more pieces: old rows stay, new ones are means, and the model computes the same for old text."""

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import ModelConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.preparing.extend_model import extend_model
from llmctl.tokenizer.load import find_tokenizer
from tests.support.bpe import byte_level

NEW = ["春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n" * 40] * 3


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_embeddings": True},
        {"tie_embeddings": False, "logits_bias": True, "norm": "layernorm"},
        {"family": "encoder_decoder", "positions": "relative", "tie_embeddings": False},
    ],
    ids=["tied", "untied", "encoder_decoder"],
)
def test_rows_of_new_pieces_are_means_and_old_text_is_computed_as_before(fields, tmp_path):
    files = byte_level()
    tokenizer = find_tokenizer(files)
    roles = {"eos_id": 0, "decoder_start_id": 0}
    torch.manual_seed(0)
    settings = {"vocab_size": tokenizer.vocab_size + 3, "d_model": 32, "n_layers": 1, "n_heads": 4}
    model = LanguageModel(ModelConfig(**(settings | roles | fields)))
    initialize(model, 0)
    source = write_artifact(tmp_path / "whole", model.config, model.state_dict(), files=files, provenance={})
    found = extend_model(source, tmp_path / "more", NEW, 30)
    before, after = (load_model(path, device="cpu", dtype="float32") for path in (source, tmp_path / "more"))
    size = tokenizer.vocab_size
    assert found.vocab_size == after.model.config.vocab_size == after.tokenizer.vocab_size == size + 30
    assert found.bytes_per_token > 2 * found.bytes_per_token_before
    assert found.equal_other_texts == 1.0
    for name, old in before.model.state_dict().items():
        new = after.model.state_dict()[name]
        torch.testing.assert_close(
            *((new, old) if new.shape == old.shape else (new[:size], old[:size])), rtol=0, atol=0
        )
    table, text = after.model.state_dict()["model.embed_tokens.weight"], "春眠不觉晓"
    index = next(one for one in after.tokenizer.encode(text) if one >= size)
    parts = tokenizer.encode(after.tokenizer.decode([index]))
    if after.tokenizer.piece_bytes(index) == b"".join(tokenizer.piece_bytes(one) for one in parts):
        torch.testing.assert_close(table[index], table[parts].mean(dim=0))
    ids_BT = torch.tensor([tokenizer.encode("the cat sat")])
    more = {"decoder_input_ids_BT": ids_BT} if fields.get("family") else {}
    with torch.no_grad():
        old, new = before.model(ids_BT, **more), after.model(ids_BT, **more)
    torch.testing.assert_close(new[..., :size], old[..., :size], rtol=0, atol=0)
