"""Adapters: nothing changes before training, merged equals unmerged, and only the adapters learn."""

import copy
import os

import pytest
import torch
from torch import nn

from llmctl.config import AdapterConfig
from llmctl.errors import UsageError
from llmctl.model.lora import (
    LoRALinear,
    adapter_modules,
    adapter_state,
    add_adapters,
    merge,
    merge_adapters,
    norms,
)
from llmctl.model.transformer import LanguageModel

ALL = AdapterConfig().targets
KINDS = {
    "decoder": {"n_kv_heads": 2},
    "decoder with biases": {"attention_bias": True, "mlp_bias": True, "gated": False, "norm": "layernorm"},
    "encoder": {"family": "encoder", "norm_position": "post", "head_transform": True, "logits_bias": True},
    "encoder_decoder": {"family": "encoder_decoder", "n_decoder_layers": 1, "positions": "relative"},
}


def randomise(model: LanguageModel, seed: int = 9) -> None:
    """Move every tensor of the adapters away from where it begins."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * 0.3)


def logits(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"decoder_input_ids_BT": ids[:, :4]} if model.config.family == "encoder_decoder" else {}
    return model(ids, **inputs)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()  # kernels differ by what needs a gradient, and freezing changes that
def test_at_the_start_nothing_has_changed(build, ids, kind, dora):
    model = build(**KINDS[kind])
    before = logits(model, ids(2, 7))
    names = add_adapters(model, rank=3, alpha=6, targets=ALL, dora=dora)
    assert names == list(adapter_modules(model))
    assert torch.equal(logits(model, ids(2, 7)), before)
    assert torch.equal(logits(model.train(), ids(2, 7)), before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(build, ids, kind, dora, dtype, tolerance):
    model = build(**KINDS[kind]).to(dtype)
    plain, before = copy.deepcopy(model), logits(model, ids(2, 7))
    add_adapters(model, rank=3, alpha=6, targets=ALL, dora=dora)
    randomise(model)
    changed = logits(model, ids(2, 7))
    assert not torch.allclose(changed, before, atol=1e-2)
    merge_adapters(model)
    torch.testing.assert_close(logits(model, ids(2, 7)), changed, atol=tolerance, rtol=tolerance)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not adapter_modules(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain, ids(2, 7)), logits(model, ids(2, 7)))


def textbook(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """DoRA by its equation: the whole matrix, brought to the learned lengths."""
    whole = layer.weight + layer.scale * layer.lora_B @ layer.lora_A
    assert layer.lora_magnitude is not None
    directions = whole / whole.norm(dim=1, keepdim=True).detach()
    return nn.functional.linear(x, layer.lora_magnitude[:, None] * directions, layer.bias)


def test_dora_is_its_equation_and_so_are_its_gradients():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5).double(), rank=2, alpha=3, dora=True, rslora=True)
    with torch.no_grad():
        for tensor in (layer.lora_A, layer.lora_B, layer.lora_magnitude):
            tensor.normal_()
    assert layer.scale == pytest.approx(3 / 2**0.5)
    x, weights = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    adapted = [layer.lora_A, layer.lora_B, layer.lora_magnitude]
    ours = torch.autograd.grad((layer(x) * weights).sum(), adapted)
    theirs = torch.autograd.grad((textbook(layer, x) * weights).sum(), adapted)
    torch.testing.assert_close(layer(x), textbook(layer, x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        nn.functional.linear(x, layer.merged_weight(), layer.bias), layer(x), atol=1e-12, rtol=1e-12
    )


def test_lengths_are_those_of_the_whole_matrix_and_zero_rows_harm_nothing():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=generator).double() for shape in ((5, 7), (2, 7), (5, 2)))
    weight[3], b[3] = 0, 0
    expected = (weight + 1.5 * b @ a).norm(dim=1)
    torch.testing.assert_close(norms(weight, a, b, 1.5), expected, atol=1e-12, rtol=1e-12)
    layer = nn.Linear(7, 5, bias=False).double()
    layer.weight = nn.Parameter(weight)
    adapted = LoRALinear(layer, rank=2, alpha=4, dora=True)
    assert torch.isfinite(adapted(torch.ones(1, 7).double())).all()
    assert torch.equal(adapted(torch.ones(1, 7).double()), layer(torch.ones(1, 7).double()))


def test_bfloat16_weights_are_merged_in_float32():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*s, generator=generator).bfloat16() for s in ((8, 8), (2, 8), (8, 2)))
    assert torch.equal(merge(weight, a, b, 0.5), (weight.float() + 0.5 * b.float() @ a.float()).bfloat16())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast_gives_the_dtype_of_a_plain_layer(dora, bias):
    layer = LoRALinear(nn.Linear(8, 8, bias=bias), rank=2, alpha=4, dora=dora)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 8))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapters_get_gradients(build, ids, dora):
    model = build(attention_bias=True).train()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    names = add_adapters(model, rank=2, alpha=4, targets=("q_proj", "mlp.down_proj"), dora=dora)
    assert names == [f"model.layers.{n}.{leaf}" for n in range(2) for leaf in ("self_attn.q_proj", "mlp.down_proj")]
    randomise(model)
    model(ids(2, 7)).logsumexp(-1).sum().backward()
    parts = ("lora_A", "lora_B", "lora_magnitude") if dora else ("lora_A", "lora_B")
    expected = {f"{name}.{part}" for name in names for part in parts}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    assert set(adapter_state(model)) == expected
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1).step()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())


def test_a_classification_head_trains_with_the_adapters(build, ids):
    model = build(family="encoder", n_labels=3, pooled_activation="tanh")
    add_adapters(model, rank=2, alpha=4, targets=("q_proj",))
    model.classify(ids(2, 7)).sum().backward()
    head = {name for name in adapter_state(model) if "lora_" not in name}
    assert head == {"classifier_dense.weight", "classifier_dense.bias", "classifier.weight", "classifier.bias"}
    assert all(model.get_parameter(name).grad is not None for name in head)


def test_dropout_falls_on_the_input_of_a_alone():
    layer = LoRALinear(nn.Linear(64, 4), rank=2, alpha=2, dropout=0.9)
    x = torch.ones(3, 64)
    assert torch.equal(layer.train()(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        layer.lora_B.fill_(1.0)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_the_seed_decides(build):
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # whatever was drawn before has no part in it
        model = build()
        add_adapters(model, rank=2, alpha=4, targets=("v_proj",), seed=seed)
        return adapter_state(model)["model.layers.1.self_attn.v_proj.lora_A"]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))
    assert first(3).abs().max() <= 16**-0.5


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"rank": 0}, ("`adapter.rank` 0", "q_proj")),
        ({"rank": 17}, ("`adapter.rank` 17", "16 inputs and 16 outputs")),
        ({"rank": 9, "targets": ("k_proj",)}, ("`adapter.rank` 9", "16 inputs and 8 outputs")),
        ({"targets": ("Wqkv",)}, ("Wqkv", "q_proj")),
        ({"targets": ()}, ("no layer", "down_proj, gate_proj")),
        ({"targets": ("q_proj", "lm_head")}, ("`lm_head`", "q_proj")),
        ({"targets": ("model.embed_tokens",)}, ("`model.embed_tokens`", "q_proj")),
        ({"targets": ("proj",)}, ("`adapter.targets` proj", "q_proj")),
        ({"dropout": 1.0}, ("1.0", "below 1")),
        ({"alpha": float("nan")}, ("nan", "")),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(build, settings, parts):
    model = build(n_kv_heads=2)
    with pytest.raises(UsageError) as caught:
        add_adapters(model, **{"rank": 2, "alpha": 4, "targets": ("q_proj",), **settings})
    said = f"{caught.value} {caught.value.hint}"
    assert all(part in said for part in parts), said
    assert not adapter_modules(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_recomputed_activations_give_the_same_gradients(build, ids, dora):
    model = build().train()
    add_adapters(model, rank=2, alpha=4, targets=ALL, dora=dora)
    randomise(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids(2, 7)).logsumexp(-1).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    model.model.recompute = True
    again = gradients()
    assert len(plain) == len(again) > 0
    assert all(map(torch.equal, plain, again))


def test_a_copy_is_a_model_of_its_own(build, ids):
    model = build()
    add_adapters(model, rank=2, alpha=4, targets=ALL, dora=True)
    randomise(model)
    twin, before = copy.deepcopy(model), logits(model, ids(2, 7))
    randomise(twin, seed=3)
    assert torch.equal(logits(model, ids(2, 7)), before)
    assert not torch.allclose(logits(twin, ids(2, 7)), before)
    assert adapter_state(twin).keys() == adapter_state(model).keys()


def test_ddp_reduces_the_adapters_alone(build, ids, tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("gloo is not built in")
    model = build().train()
    add_adapters(model, rank=2, alpha=4, targets=ALL, dora=True)
    randomise(model)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        (wrapped(ids(2, 7)) ** 2).mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    reduced = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reduced == set(adapter_state(model))
