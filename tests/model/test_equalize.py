import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.model.equalize import fold, joints, shared_factors
from llmctl.model.transformer import LanguageModel, initialize

BASE = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_positions": 32, "init_std": 0.3}
VARIANTS = {
    "llama": {},
    "grouped": {"n_kv_heads": 2},
    "gpt2": {"norm": "layernorm", "gated": False, "activation": "gelu", "attention_bias": True, "mlp_bias": True},
    "relu": {"gated": False, "activation": "relu", "mlp_bias": True},
    "bert": {"family": "encoder", "norm": "layernorm", "norm_position": "post", "gated": False, "activation": "gelu"},
    "distances": {"family": "encoder", "positions": "disentangled"},
    "qk": {"qk_norm": True},
    "pair": {"family": "encoder_decoder", "n_kv_heads": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_moved_scales_change_nothing(name: str) -> None:
    model = LanguageModel(ModelConfig(**(BASE | VARIANTS[name]))).eval()
    initialize(model, 0)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids_BT": ids} if name == "pair" else {}
    generator, n_joints = torch.Generator().manual_seed(1), 0
    with torch.inference_mode():
        expected = model(ids, **more)
    for stack in model.stacks():
        for block in stack.layers:
            for joint in joints(block, model.config):
                readers = [block.get_submodule(reader) for reader in joint.readers]
                before = readers[0].weight.detach().clone()
                factors = torch.rand(readers[0].in_features, generator=generator) * 4 + 0.2
                fold(joint, readers, shared_factors(factors, joint))
                assert not torch.equal(readers[0].weight, before)
                n_joints += 1
    with torch.inference_mode():
        assert torch.allclose(model(ids, **more), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert n_joints >= 2


def test_post_norm_models_keep_what_goes_past_the_layer() -> None:
    model = LanguageModel(ModelConfig(**(BASE | VARIANTS["bert"])))
    assert [joint.readers for joint in joints(model.model.layers[0], model.config)] == [("self_attn.o_proj",)]
