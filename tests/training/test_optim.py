"""Schedules are what they say, groups hold what they should, and optimizer state survives a round trip by name."""

import pytest
import torch

from llmctl.config import ModelConfig, OptimConfig
from llmctl.distributed.sharding import whole
from llmctl.errors import ArtifactError
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.runs import checkpoint
from llmctl.training import optim


def tiny() -> LanguageModel:
    model = LanguageModel(ModelConfig(vocab_size=20, d_model=16, n_layers=1, n_heads=2, max_positions=16))
    initialize(model, 0)
    return model


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("total", [1, 2, 10, 1000])
def test_schedules_warm_up_stay_within_and_come_down(name: str, total: int):
    config = OptimConfig(schedule=name, min_lr_frac=0.1, warmup_frac=0.1)
    shares = [optim.schedule(step, total, config) for step in range(total)]
    assert max(shares) == pytest.approx(1.0)
    assert min(shares) > 0
    peak = shares.index(max(shares))
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    if name != "constant" and total == 1000:
        assert shares[-1] == pytest.approx(0.1, abs=0.01)


def test_wsd_is_flat_until_it_decays_linearly():
    config = OptimConfig(schedule="wsd", warmup_frac=0.01, decay_frac=0.2, min_lr_frac=0.0)
    shares = [optim.schedule(step, 1000, config) for step in range(1000)]
    assert set(shares[20:800]) == {1.0}
    assert shares[900] == pytest.approx(0.5)


def test_muon_gets_the_hidden_matrices_and_every_parameter_is_trained_once():
    model = tiny()
    optimizers = optim.make_optimizers(model, OptimConfig(name="muon"))
    held = {name: [id(p) for g in o.param_groups for p in g["params"]] for name, o in optimizers.items()}
    everything = [*held["muon"], *held["adamw"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i].split(".")[-2] for i in held["muon"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_norms_and_biases_do_not_decay():
    optimizers = optim.make_optimizers(tiny(), OptimConfig(name="adamw", weight_decay=0.5))
    for group in optimizers["adamw"].param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.5) for p in group["params"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_put_back_by_name_goes_on_bit_for_bit(tmp_path, name: str):
    def step(model: LanguageModel, optimizers: dict[str, torch.optim.Optimizer], seed: int) -> None:
        ids = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(seed))
        model(ids).logsumexp(-1).mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    config = OptimConfig(name=name)
    straight, stopped = tiny(), tiny()
    through, first = optim.make_optimizers(straight, config), optim.make_optimizers(stopped, config)
    for seed in range(3):
        step(straight, through, seed)
        step(stopped, first, seed)
    state = whole(dict(optim.named_state(stopped, first)))
    saved = checkpoint.load(checkpoint.Store(tmp_path).save(3, {}, state, {}))
    weights = {key: tensor.clone() for key, tensor in stopped.state_dict().items()}
    resumed = tiny()
    resumed.load_state_dict(weights)
    second = optim.make_optimizers(resumed, config)
    optim.load_state(resumed, second, saved)
    for seed in range(3, 6):
        step(straight, through, seed)
        step(resumed, second, seed)
    for name_, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name_]), name_


def trained() -> tuple[LanguageModel, dict[str, torch.optim.Optimizer]]:
    model = tiny()
    optimizers = optim.make_optimizers(model, OptimConfig(name="muon"))
    model(torch.arange(8)[None]).logsumexp(-1).mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    return model, optimizers


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_state_with_a_hole_is_refused_with_its_name(tmp_path, key: str):
    model, optimizers = trained()
    state = dict(optim.named_state(model, optimizers))
    del state[f"adamw/model.norm.weight/{key}"]
    saved = checkpoint.load(checkpoint.Store(tmp_path).save(1, {}, whole(state), {}))
    with pytest.raises(ArtifactError, match=f"has no `adamw/model.norm.weight/{key}`"):
        optim.load_state(model, optimizers, saved)


def test_going_back_to_before_the_first_step_forgets_the_state(tmp_path):
    model, optimizers = trained()
    saved = checkpoint.load(checkpoint.Store(tmp_path).save(0, {}, {}, {}))
    optim.load_state(model, optimizers, saved)
    assert dict(optim.named_state(model, optimizers)) == {}


def test_layers_below_learn_more_slowly():
    config = {"vocab_size": 20, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_positions": 16}
    names = [name for name, _ in LanguageModel(ModelConfig(**config, tie_embeddings=False)).named_parameters()]
    scales = optim.layer_scales(names, 0.5)
    assert scales["lm_head.weight"] == scales["model.norm.weight"] == 1.0
    assert scales["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert scales["model.layers.0.mlp.up_proj.weight"] == 0.25
    assert scales["model.embed_tokens.weight"] == 0.125
    pair = LanguageModel(ModelConfig(**config, family="encoder_decoder"))
    scales = optim.layer_scales([name for name, _ in pair.named_parameters()], 0.5)
    assert scales["model.decoder.layers.0.mlp.up_proj.weight"] == 0.25
    assert scales["model.encoder.layers.1.mlp.up_proj.weight"] == 0.125


def test_rates_follow_the_scale_of_their_layer():
    model = tiny()
    optimizers = optim.make_optimizers(model, OptimConfig(name="adamw", lr=1.0, layer_decay=0.5))
    optim.set_rates(optimizers, OptimConfig(name="adamw", lr=1.0), 0.1)
    rates = {p: group["lr"] for group in optimizers["adamw"].param_groups for p in group["params"]}
    named = {name: rates[p] for name, p in model.named_parameters()}
    assert named["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.05)
    assert named["model.norm.weight"] == pytest.approx(0.1)
    assert set(rates) == set(model.parameters())
