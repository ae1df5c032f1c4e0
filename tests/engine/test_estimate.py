"""A dry run's figures against what a real step does, and against the published ones."""

import pytest
import torch

from llmctl.config import ModelChoice, ModelConfig, PretrainConfig, TrainConfig
from llmctl.engine.estimate import activation_elements, duration, flops_per_token, memory, size
from llmctl.engine.plan import dry_run
from llmctl.losses import linear_cross_entropy
from llmctl.model.presets import count_parameters, preset_config
from llmctl.model.transformer import LanguageModel, initialise

T, B = 64, 4


def saved_bytes(model: LanguageModel, inputs: dict[str, torch.Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward pass, every storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(**inputs).sum()
    return sum(kept.values())


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("shape", [{}, {"gated": False, "norm": "layernorm"}, {"n_kv_heads": 2}])
def test_activations_are_what_autograd_keeps(family: str, shape: dict):
    config = preset_config("mini", family)  # type: ignore[arg-type]
    settings = {"vocab_size": 512, "n_layers": 6} | shape
    if family == "encoder_decoder":
        settings.pop("n_kv_heads", None)
    config = ModelConfig(**(vars(config) | settings))
    model = LanguageModel(config)
    initialise(model, 0)
    ids = torch.randint(0, 512, (B, T))
    inputs = {"input_ids_BT": ids}
    if family == "encoder_decoder":
        inputs["decoder_input_ids_BT"] = ids
    predicted = activation_elements(config) * B * T * 4
    assert predicted == pytest.approx(saved_bytes(model, inputs), rel=0.15)


def test_flops_are_what_the_profiler_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = preset_config("mini", "decoder")
    config = ModelConfig(**(vars(config) | {"vocab_size": 512, "n_layers": 3}))
    model = LanguageModel(config)
    ids = torch.randint(0, 512, (B, T))
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(ids).flatten(0, 1)
        total, _ = linear_cross_entropy(hidden, model.lm_head.weight, ids.flatten())
        total.backward()
    counted = counter.get_total_flops() / (B * T)
    # The counter takes all scores of causal attention for computed, and no score for the CPU kernel's backward pass.
    assert flops_per_token(config, T) == pytest.approx(counted, rel=0.1)


def test_states_are_counted_exactly():
    from llmctl.config import OptimConfig
    from llmctl.engine.optim import make_optimizers, named_state

    config = preset_config("tiny", "decoder")
    config = ModelConfig(**(vars(config) | {"vocab_size": 512}))
    for name in ("adamw", "muon"):
        model = LanguageModel(config)
        optimizers = make_optimizers(model, OptimConfig(name=name))  # type: ignore[arg-type]
        model(torch.randint(0, 512, (2, 8))).logsumexp(-1).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
        part = memory(config, TrainConfig(), count_parameters(config), name, 1)
        states = sum(t.nbytes for key, t in named_state(model, optimizers) if not key.endswith("/step"))
        assert part.optimizer == states
        assert part.weights == part.gradients == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("preset", "parameters", "flops"),
    [("gpt3-175b", 175e9, 3.14e23), ("gpt3-13b", 13e9, 2.31e22), ("gpt3-xl", 1.3e9, 2.38e21)],
)
def test_gpt3_compute_is_the_published(preset: str, parameters: float, flops: float):
    # Brown et al. 2020, arXiv:2005.14165, table D.1; the paper leaves the attention scores out.
    answer = dry_run(PretrainConfig(model=ModelChoice(preset)))
    assert answer.parameters.total == pytest.approx(parameters, rel=0.03)
    assert answer.flops == pytest.approx(flops, rel=0.12)
    assert answer.tokens == 300_000_000_000


def test_memory_shrinks_with_devices_and_is_rendered():
    answer = dry_run(PretrainConfig(model=ModelChoice("gpt3-small")))
    totals = [part.total for part in answer.memory.values()]
    assert totals == sorted(totals, reverse=True)
    text = answer.render()
    assert "gpt3-small" in text
    assert "assumed 40% of peak" in text
    assert answer.to_dict()["memory_bytes"]["1"]["total"] == totals[0]


def test_a_published_encoder_needs_no_objective():
    assert dry_run(PretrainConfig(model=ModelChoice("bert-base"))).config.family == "encoder"


def test_units():
    assert size(999) == "999 B"
    assert size(1.5e9) == "1.5 GB"
    assert duration(90) == "90.0 seconds"
    assert duration(86400 * 3) == "3.0 days"
