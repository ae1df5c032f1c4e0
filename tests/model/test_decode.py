"""The lean decoder equals the model itself, for whatever it covers, in the same weights."""

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.model.cache import KVCache
from llmctl.model.decode import Decoder, covers
from llmctl.model.shapes import complete
from llmctl.model.transformer import LanguageModel
from llmctl.quant.linear import QuantLinear
from llmctl.quant.methods import nearest
from llmctl.quant.schemes import SCHEMES, Scheme

VARIANTS = {
    "llama": {},
    "mixture": {"n_experts": 4, "n_active_experts": 2},
    "grouped": {"n_kv_heads": 2},
    "one key head": {"n_kv_heads": 1, "head_dim": 6},
    "qk-norm": {"n_kv_heads": 2, "qk_norm": True},
    "windows": {"attention_windows": (0, 3), "n_kv_heads": 2},
    "learned": {"positions": "learned", "norm": "layernorm", "gated": False, "activation": "gelu_tanh"},
    "offset": {"positions": "learned", "position_offset": 2, "embedding_norm": True, "logits_bias": True},
    "sinusoidal": {"positions": "sinusoidal", "norm_position": "post", "norm": "layernorm", "embedding_scale": 0.0},
    "no positions": {"positions": "none"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "token types": {"n_token_types": 2},
    "bloom": {"positions": "alibi", "embedding_norm": True, "n_kv_heads": 2},
    "gemma2": {"norm_position": "both", "attention_softcap": 0.5, "attention_windows": (3, 0), "n_kv_heads": 2},
    "olmo2": {"norm_position": "output", "qk_norm": True, "qk_norm_kind": "width", "n_kv_heads": 2},
    "hunyuan": {"qk_norm": True, "qk_norm_kind": "rotated", "n_kv_heads": 2},
    "modernbert": {"first_norm": False, "norm": "layernorm", "norm_bias": False, "head_transform": True},
    "bart": {
        "family": "encoder_decoder",
        "positions": "learned",
        "norm_position": "post",
        "norm": "layernorm",
        "attention_bias": True,
        "gated": False,
    },
    "pair with rope": {"family": "encoder_decoder", "qk_norm": True, "n_kv_heads": 2},
}
DECODERS = [name for name, fields in VARIANTS.items() if "family" not in fields]
PAIRS = [name for name in VARIANTS if name not in DECODERS]


def cache_for(model: LanguageModel, batch: int) -> KVCache:
    return KVCache(model.config, batch, 12, dtype=next(model.parameters()).dtype)


@torch.no_grad()
def in_parts(model, ids_BT, parts, **ragged) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of the model and of the decoder, the same parts at a time."""
    results = []
    for run in (None, Decoder(model)):
        cache, states, start = cache_for(model, len(ids_BT)), [], 0
        for size in parts:
            part = slice(start, start + size)
            more = {name: value[:, part] for name, value in ragged.items()}
            if start and size == 1:
                more.pop("documents_BT", None)
            if run is None:
                states.append(model.hidden(ids_BT[:, part], cache=cache, **more))
            else:
                states.append(run.hidden(ids_BT[:, part], cache, **more))
            start += size
        results.append(torch.cat(states, dim=1))
    return results[0], results[1]


@pytest.mark.parametrize("parts", [(9,), (4, 3, 1, 1), (1,) * 9])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_gives_the_models_states(build, ids, name: str, parts: tuple[int, ...]):
    model = build(**VARIANTS[name])
    expected, got = in_parts(model, ids(3, 9), parts)
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    assert torch.allclose(expected, model.hidden(ids(3, 9)), atol=1e-8)


@pytest.mark.parametrize("name", DECODERS)
def test_rows_of_unequal_length(build, ids, name: str):
    documents_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    positions_BT = (documents_BT.cumsum(dim=1) - 1).clamp(min=0)
    ragged = {"documents_BT": documents_BT, "positions_BT": positions_BT}
    expected, got = in_parts(build(**VARIANTS[name]), ids(3, 9), (4, 2, 1, 1, 1), **ragged)
    assert torch.allclose(got[documents_BT == 1], expected[documents_BT == 1], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_over_an_encoder(build, ids, name: str, is_ragged: bool):
    model = build(**VARIANTS[name])
    documents_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) if is_ragged else None
    memory_BSD = model.encode(ids(2, 5), documents_BS=documents_BS)
    decoder, states = Decoder(model), []
    caches = cache_for(model, 2), cache_for(model, 2)
    for place in range(6):
        new, memory = ids(2, 6)[:, place : place + 1], None if place else memory_BSD
        shared = {"memory_documents_BS": documents_BS}
        expected = model.decode(new, memory, cache=caches[0], **shared)
        states.append((expected, decoder.hidden(new, caches[1], memory_BSD=memory, **shared)))
    assert all(torch.allclose(expected, got, rtol=0, atol=1e-10) for expected, got in states)


@pytest.mark.parametrize("fields", [{"relative_bias": True}, {"query_layer": True}, {"family": "encoder"}])
def test_what_is_not_covered(fields: dict):
    shape = {"vocab_size": 9, "d_model": 8, "n_layers": 1, "n_heads": 2, "max_positions": 8}
    assert not covers(complete(ModelConfig(**{**shape, **fields})))


def test_weights_are_moved_not_copied(build, ids):
    model = build(attention_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = Decoder(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    block = model.model.layers[0]
    projections = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    assert len({layer.weight.untyped_storage().data_ptr() for layer in projections}) == 1
    with torch.no_grad():  # what changes in the model changes in the decoder
        block.self_attn.k_proj.weight.mul_(2)
        block.mlp.up_proj.weight.mul_(2)
        expected, got = model.hidden(ids(1, 5)), decoder.hidden(ids(1, 5), cache_for(model, 1))
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)


def quantized(model: LanguageModel, scheme: Scheme) -> LanguageModel:
    """Return the model with the matrices of its blocks in few bits."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                layer = QuantLinear(child.in_features, child.out_features, scheme, bias=child.bias is not None)
                layer.put(nearest(child.weight.detach().float(), scheme))
                if child.bias is not None:
                    layer.bias = child.bias.detach()
                setattr(module, name, layer)
    return model


@pytest.mark.parametrize("name", ["int8", "w8a8", "int6", "int4", "int4-sym", "int3"])
def test_quantized_layers_are_joined_too(build, ids, name: str):
    shape = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 192, "attention_bias": True, "n_layers": 1}
    model = quantized(build(**shape).float(), SCHEMES[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected, got = in_parts(model, ids(2, 6), (4, 1, 1))
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    attention = model.model.layers[0].self_attn
    storages = {
        layer.weight_packed.untyped_storage().data_ptr()
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(storages) == 1


def test_layers_of_different_schemes_stay_apart(build, ids):
    model = quantized(build(d_model=64, d_ff=64, n_layers=1).float(), SCHEMES["int8"])
    attention = model.model.layers[0].self_attn
    other = QuantLinear(64, 64, SCHEMES["int4"], bias=False)
    other.put(nearest(torch.randn(64, 64) * 0.1, SCHEMES["int4"]))
    attention.k_proj = other
    expected, got = in_parts(model, ids(2, 6), (4, 1, 1))
    assert (got - expected).norm() < 0.02 * expected.norm()
