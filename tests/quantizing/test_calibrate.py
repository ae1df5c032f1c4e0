"""Codes are chosen layer by layer, by what comes out of the codes before."""

import pytest
import torch

from llmctl.formats.quantization import linear_modules
from llmctl.model.transformer import LanguageModel
from llmctl.quant.gguf_schemes import BLOCK_SCHEMES
from llmctl.quant.methods import Moments, method_of
from llmctl.quant.schemes import SCHEMES
from llmctl.quantizing import calibrate as module
from llmctl.quantizing.calibrate import calibrate
from tests.families.test_table import CONFIGS, config_of


def model_and_batches() -> tuple[LanguageModel, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = LanguageModel(config_of(CONFIGS["LlamaForCausalLM"][0] | {"d_model": 64, "d_ff": 64}))
    ids = torch.randint(4, 40, (6, 16), generator=torch.Generator().manual_seed(1))
    return model, [{"input_ids_BT": part, "labels": part.roll(-1, 1)} for part in ids.split(2)]


@torch.no_grad()
def inputs_of(model: LanguageModel, name: str, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return what comes into a map (N, I)."""
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for batch in batches:
        model(batch["input_ids_BT"])
    handle.remove()
    return torch.cat(inputs)


@pytest.mark.parametrize("method", ["gptq", "guided"])
def test_what_comes_into_a_layer_has_gone_through_the_codes_before_it(method, monkeypatch):
    """In float32 and, to its digits, in bfloat16: autocast would take the weights of the first pass from its cache."""
    seen: list[dict[str, torch.Tensor]] = []

    def spy(weight, scheme, moments):
        seen[-1][f"{len(seen[-1])}"] = moments.mean
        return method_of(method)(weight, scheme, moments)

    monkeypatch.setattr(module, "method_of", lambda _: spy)
    for narrow in (False, True):
        model, batches = model_and_batches()
        names = [name for name in linear_modules(model.config) if "layers." in name]
        seen.append({})
        calibrate(model, dict.fromkeys(names, SCHEMES["int4"]), method, batches, lambda _: None, is_narrow=narrow)
        if method == "gptq":  # whose moments are the plain ones
            rows = inputs_of(model, f"model.layers.{model.config.n_layers - 1}.self_attn.q_proj", batches)
            wanted = rows.T @ rows / len(rows)
            found = seen[-1][f"{len(seen[-1]) * (model.config.n_layers - 1) // model.config.n_layers}"]
            assert (found - wanted).norm() < (0.05 if narrow else 1e-4) * wanted.norm()
    for name, wide in seen[0].items():
        assert (seen[1][name] - wide).norm() < 0.1 * wide.norm(), name


@torch.no_grad()
@pytest.mark.parametrize(
    "scheme",
    [SCHEMES["int4"], SCHEMES["int8"], SCHEMES["int4-sym"], *map(BLOCK_SCHEMES.get, ("Q4_0", "IQ4_NL", "Q4_K"))],
)
def test_layers_with_one_input_get_the_codes_that_they_would_get_alone(scheme, monkeypatch):
    torch.manual_seed(0)
    moments = Moments.empty(256)
    moments.add(torch.randn(600, 256) * torch.rand(256).exp())
    found = []
    for most in (module.PART_FLOATS, 0):
        torch.manual_seed(1)
        block = torch.nn.ModuleDict(
            {name: torch.nn.Linear(256, n_out) for name, n_out in (("q", 32), ("k", 8), ("v", 8))}
        )
        monkeypatch.setattr(module, "PART_FLOATS", most)
        calibrated, layers = module.Calibrated(), list(block)
        module.choose_inside(calibrated, block, "b", dict.fromkeys(layers, scheme), "guided", layers, moments)
        found.append((calibrated, block.state_dict()))
    (together, weights), (alone, others) = found
    assert list(together.codes) == ["b.q", "b.k", "b.v"]
    for name, codes in together.codes.items():
        assert torch.equal(codes.codes_OI, alone.codes[name].codes_OI)
        assert together.lost[name] == pytest.approx(alone.lost[name], rel=1e-4)
        for own, other in zip(codes.grid, alone.codes[name].grid, strict=True):
            assert torch.equal(own, other)
    for name, weight in weights.items():
        assert torch.equal(weight, others[name])


def test_layers_with_one_input_share_its_weights():
    names = ["self_attn.q_proj", "self_attn.k_proj", "cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj"]
    own = {
        name: [torch.full((5 if name == "cross_attn.q_proj" else 3,), float(place))] for place, name in enumerate(names)
    }
    found = {name: parts[0].tolist() for name, parts in module.shared(own).items()}
    assert found["self_attn.q_proj"] == found["self_attn.k_proj"] == [0.5] * 3
    assert found["cross_attn.q_proj"] == [2.0] * 5
    assert found["cross_attn.k_proj"] == found["cross_attn.v_proj"] == [3.5] * 3
    assert module.input_of("model.query_layer.self_attn.q_proj") != module.input_of(
        "model.query_layer.self_attn.k_proj"
    )


@torch.no_grad()
def test_a_pass_that_observes_ends_at_the_last_layer_and_sees_all_inputs():
    model, batches = model_and_batches()
    block = model.stacks()[-1].layers[0]
    streams = [module.catch(model, block, batch) for batch in batches]
    ended: list[int] = []
    handle = block.mlp.down_proj.register_forward_hook(lambda *_: ended.append(1))
    found = module.observe(block, streams, {})
    handle.remove()
    assert len(ended) == 1 < len(batches)  # the first pass shows which is the last
    for name, _ in module.linears(block):
        rows = inputs_of(model, f"model.layers.0.{name}", batches)
        assert found[name].count == len(rows)
        torch.testing.assert_close(found[name].mean, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
