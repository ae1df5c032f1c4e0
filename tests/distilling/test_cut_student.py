import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.distilling.cut_student import cut_student
from llmctl.distilling.student_shape import resized
from llmctl.losses.cross_entropy import linear_cross_entropy
from llmctl.model.transformer import LanguageModel, initialize, load_tensors
from tests.model.test_cut import SHAPES, build, outputs
from tests.model.test_importance import batch


def mean_loss(model: LanguageModel, channels=None) -> float:
    one = batch(model)
    with torch.no_grad():
        if model.config.n_labels:
            return float(model.classify(one["input_ids_BT"]).square().mean())
        inputs = {name: tensor for name, tensor in one.items() if name != "labels"}
        hidden = model.hidden(**inputs)
        labels = one["labels"][:, : hidden.shape[1]].flatten()
        weight = model.lm_head.weight
        return float(linear_cross_entropy(model.head_input(hidden).flatten(0, 1), weight, labels)[0]) / len(labels)


@pytest.mark.parametrize("name", SHAPES)
def test_the_teacher_itself_is_cut_out_unchanged(name):
    model = build(name).float()
    found = cut_student(model, model.config, [batch(model)], mean_loss, pick="auto", say=print)
    again = LanguageModel(found.config).eval()
    load_tensors(again, found.state)
    assert found.config == model.config
    assert torch.equal(outputs(again), outputs(model))
    assert found.report["loss_before"] == found.report["loss_after"]
    assert "channels" not in found.report


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2"])
def test_layers_heads_units_and_channels_go_together(name):
    model = build(name).float()
    config = model.config
    sizes = {"n_layers": 2, "n_heads": config.n_heads // 2, "n_kv_heads": config.n_kv_heads // 2, "d_ff": 16}
    sizes["d_model"] = 12 if name in ("bert", "gpt2") else 16
    if config.family == "encoder_decoder":
        sizes["n_decoder_layers"] = 1
    shape = resized(config, sizes)
    found = cut_student(model, shape, [batch(model)], mean_loss, pick="auto", say=print)
    assert found.config == shape
    student = LanguageModel(found.config).eval()
    load_tensors(student, found.state)
    assert mean_loss(student) == pytest.approx(found.report["loss_after"])
    assert len(found.report["channels"]) == shape.d_model
    assert model.state_dict().keys() >= set(found.state)


def learned() -> LanguageModel:
    """Return a decoder that has learned to say what came before, some of whose layers matter more than others."""
    model = LanguageModel(ModelConfig(vocab_size=29, d_model=32, n_layers=4, n_heads=4, d_ff=64, max_positions=32))
    initialize(model, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = batch(model)["input_ids_BT"]
    for _ in range(60):
        total, _ = linear_cross_entropy(model.hidden(ids).flatten(0, 1), model.lm_head.weight, ids.flatten())
        optimizer.zero_grad()
        (total / ids.numel()).backward()
        optimizer.step()
    return model.eval()


def test_measuring_picks_no_worse_layers_than_rules():
    model = learned()
    shape = resized(model.config, {"n_layers": 3})
    losses = {
        pick: cut_student(model, shape, [batch(model)], mean_loss, pick=pick, say=print).report["loss_after"]
        for pick in ("greedy", "influence", "uniform")
    }
    assert losses["greedy"] <= min(losses.values()) + 1e-6 or losses["influence"] < losses["greedy"]
    assert losses["greedy"] <= losses["uniform"]


@pytest.mark.parametrize("pick", ["greedy", "influence", "uniform"])
@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_as_many_layers_stay_as_were_asked_for(pick, wanted):
    model = build("llama").float()
    shape = resized(model.config, {"n_layers": wanted})
    report = cut_student(model, shape, [batch(model)], mean_loss, pick=pick, say=print).report
    layers = report.get("model.layers", [0, 1, 2])
    assert len(layers) == wanted
    assert layers == sorted(set(layers))
    assert layers[0] == 0
