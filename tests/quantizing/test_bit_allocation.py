"""Bits shared out under a budget: by what they are worth, the same for what is multiplied as one."""

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.formats.quantization import linear_modules
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.quant.grid import decode
from llmctl.quant.methods import clipped
from llmctl.quant.schemes import SCHEMES, Scheme
from llmctl.quantizing import bit_allocation as mixed
from llmctl.quantizing.bit_allocation import allocate, candidates, measure_costs

BLOCK = "model.layers.0"


@pytest.fixture
def model() -> LanguageModel:
    shape = {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 128,
        "max_positions": 64,
        "init_std": 0.2,
    }
    made = LanguageModel(ModelConfig(vocab_size=96, **shape)).eval()
    initialize(made, 0)
    return made


def choices_of(model: LanguageModel, scheme: Scheme) -> dict[str, list[Scheme]]:
    shapes = linear_modules(model.config)
    return candidates(dict.fromkeys(shapes, scheme), {name: shape[1] for name, shape in shapes.items()})


def test_layers_may_have_groups_as_planned_or_twice_as_wide_and_whole_rows_in_eight_bits(model) -> None:
    found = choices_of(model, SCHEMES["int4"])
    assert "lm_head" not in found
    width = model.config.d_model
    for scheme in found[f"{BLOCK}.self_attn.q_proj"]:
        assert scheme.fits(width)
        assert scheme.bits == 8 or (scheme.scale_bits, scheme.symmetric) == (8, False)
    sizes = [scheme.size_bits(1, width) for scheme in found[f"{BLOCK}.self_attn.q_proj"]]
    assert sizes == sorted(sizes)
    assert {scheme.bits for scheme in found[f"{BLOCK}.mlp.down_proj"]} == {2, 3, 4, 5, 6, 8}


def test_what_is_multiplied_as_one_gets_the_same_and_the_budget_holds(model) -> None:
    choices = choices_of(model, SCHEMES["int4"])
    shapes = parameter_shapes(model.config)
    sizes = {name: shapes[f"{name}.weight"] for name in choices}
    # Keys alone would be worth a lot.
    worth = {name: 100.0 if name == f"{BLOCK}.self_attn.k_proj" else 1.0 for name in choices}
    costs = {name: {one: worth[name] * 4.0**-one.bits for one in each} for name, each in choices.items()}
    weights = sum(n_out * n_in for n_out, n_in in sizes.values())
    last = 0.0
    for bits in (3.0, 4.0, 4.6, 6.0):
        chosen = allocate(costs, sizes, bits * weights)
        used = sum(scheme.size_bits(*sizes[name]) for name, scheme in chosen.items())
        assert last < used <= bits * weights
        last = used
        parts = {chosen[f"{BLOCK}.self_attn.{part}_proj"] for part in "qkv"}
        assert len(parts) == 1
        assert next(iter(parts)).bits >= chosen[f"{BLOCK}.self_attn.o_proj"].bits
    with pytest.raises(UsageError, match="cannot be quantized to") as error:
        allocate(costs, sizes, 1.0 * weights)
    assert "the smallest possible" in str(error.value.hint)


def test_more_bits_are_expected_to_cost_less_and_four_what_they_do(model) -> None:
    """The divergence that rounding one layer makes, against what was expected of it."""
    choices = choices_of(model, SCHEMES["int4"])
    ids = torch.randint(5, model.config.vocab_size, (16, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(24) < 23, ids.roll(-1, 1), -100)
    costs = measure_costs(model, choices, [{"input_ids_BT": ids, "labels": labels}], 0)
    name = f"{BLOCK}.mlp.down_proj"
    by_bits = {scheme.bits: cost for scheme, cost in costs[name].items()}
    assert by_bits[2] > by_bits[3] > by_bits[4] > by_bits[5] > by_bits[6] > by_bits[8] > 0
    scheme = next(scheme for scheme in choices[name] if scheme.bits == 3)
    with torch.inference_mode():
        before = model(ids).log_softmax(dim=-1)
        weight = model.get_submodule(name).weight
        kept = weight.clone()
        weight.copy_(decode(clipped(kept, scheme), scheme))
        after = model(ids).log_softmax(dim=-1)
        weight.copy_(kept)
    kl = float((before.exp() * (before - after)).sum(dim=-1)[:, :-1].mean())
    assert kl / 2 < costs[name][scheme] < kl * 2


def test_costs_are_the_same_in_parts(model, monkeypatch) -> None:
    choices = choices_of(model, SCHEMES["int4"])
    ids = torch.randint(5, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids_BT": part, "labels": part.roll(-1, 1)} for part in ids.split(4)]
    whole = measure_costs(model, choices, batches, 0)
    monkeypatch.setattr(mixed, "PART_WEIGHTS", 100_000)
    assert len(mixed.parts_of(model, choices)) > 2
    assert measure_costs(model, choices, batches, 0) == whole
