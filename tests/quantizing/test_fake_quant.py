"""Learners of ggml's blocks: they compute what a file means, and what is trained is in the next file, bit for bit."""

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.converting.gguf_check import with_weights
from llmctl.formats.gguf.container import read_gguf_header
from llmctl.formats.gguf.model import gguf_codes, gguf_config, gguf_state
from llmctl.formats.gguf.write import model_values, plan_blocks, write_gguf
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.quant.gguf_learned import BlockLinear
from llmctl.quantizing.fake_quant import block_learner, learned_blocks

pytest.importorskip("gguf", reason="pip install gguf")

SHAPE = {
    "vocab_size": 40,
    "d_model": 256,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 288,
    "max_positions": 64,
    "init_std": 0.2,
}
MODELS = {
    "llama": {"n_kv_heads": 2},  # rows of queries and keys in another order
    "qwen2": {"attention_bias": True, "attention_output_bias": "no", "tie_embeddings": False},
    "phi3": {"rotary_dim": 32},  # several matrices in one tensor
}


def read(path):
    header = read_gguf_header(path)
    config = gguf_config(header)
    return config, gguf_state(header, config), gguf_codes(header, config)


@pytest.mark.parametrize("kind", ["q4_K", "q3_K", "iq4_xs", "q5_1"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_trained_is_what_the_next_file_holds(name, kind, tmp_path):
    model = LanguageModel(ModelConfig(**(SHAPE | MODELS[name])))
    initialize(model, 3)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data += 0.1
    source = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    values, plan = model_values(model.config, {"name": "x"}), plan_blocks(model.config, kind)
    write_gguf(tmp_path / "chosen.gguf", model.config, source, values, plan, {})
    config, state, codes = read(tmp_path / "chosen.gguf")
    ids = torch.arange(40)[None]
    learner = block_learner(model, state, codes).eval()
    with torch.no_grad():
        assert torch.equal(learner(ids), with_weights(config, state)(ids))
        layers = {key: layer for key, layer in learner.named_modules() if isinstance(layer, BlockLinear)}
        for layer in layers.values():
            for parameter in (layer.ratio, layer.shift):
                if parameter is not None:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    assert set(layers) == {key for key in codes if "layers." in key}
    trains = {key for key, parameter in learner.named_parameters() if parameter.requires_grad}
    assert {key.rpartition(".")[2] for key in trains} <= {"ratio", "shift"}
    found = learned_blocks(learner.state_dict(), codes)
    write_gguf(tmp_path / "learned.gguf", config, source, values, plan, found)
    _, after, back = read(tmp_path / "learned.gguf")
    for key, layer in layers.items():
        assert torch.equal(after[f"{key}.weight"], layer.rounded()), key
        assert torch.equal(back[key][1].codes_OI, codes[key][1].codes_OI)
        assert not torch.equal(after[f"{key}.weight"], state[f"{key}.weight"])
    assert all(
        torch.equal(tensor, state[key]) for key, tensor in after.items() if key.removesuffix(".weight") not in layers
    )
