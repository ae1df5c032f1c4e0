import pytest
import torch

from llmctl.model.importance import rank
from tests.model.test_cut import SHAPES, build


def batch(model):
    ids = torch.randint(1, 29, (3, 8), generator=torch.Generator().manual_seed(0))
    extra = {"decoder_input_ids_BT": ids[:, :5]} if model.config.family == "encoder_decoder" else {}
    return {"input_ids_BT": ids, "labels": ids, **extra}


@pytest.mark.parametrize("name", SHAPES)
def test_what_does_nothing_is_worth_nothing(name):
    model = build(name).float()
    config = model.config
    size = config.n_heads // config.n_kv_heads * config.head_dim
    for module in model.modules():
        if hasattr(module, "o_proj"):
            module.o_proj.weight.data[:, size : 2 * size] = 0
        if hasattr(module, "down_proj"):
            module.down_proj.weight.data[:, 7] = 0
    found = rank(model, [batch(model)])
    for scores in found.groups.values():
        assert scores.shape == (config.n_kv_heads,)
        assert scores[1] == 0 < scores[0]
    for scores in found.units.values():
        assert scores.shape == (config.d_ff,)
        assert scores[7] == 0 < scores.max()
    n_layers = sum(len(stack.layers) for stack in model.stacks()) + config.query_layer
    assert len(found.units) == n_layers == len(found.influence)
    assert found.channels.shape == (config.d_model,)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_scores_are_what_parts_add():
    model = build("llama").float()
    one = batch(model)
    found = rank(model, [one, one])
    taken = {}
    attention = model.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: taken.setdefault("heads", args[0]))
    model.hidden(one["input_ids_BT"])
    handle.remove()
    heads = taken["heads"].unflatten(-1, (4, 8))
    added = torch.einsum("btnh,dnh->btnd", heads, attention.o_proj.weight.unflatten(1, (4, 8)))
    expected = 2 * added.norm(dim=-1).sum(dim=(0, 1)).unflatten(0, (2, 2)).sum(dim=1)
    torch.testing.assert_close(found.groups["model.layers.1.self_attn"], expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_layer_that_passes_its_input_on_has_no_influence():
    model = build("llama").float()
    layer = model.model.layers[1]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    found = rank(model, [batch(model)])
    assert found.influence["model.layers.1"] == pytest.approx(0, abs=1e-4)
    assert min(found.influence, key=found.influence.get) == "model.layers.1"
