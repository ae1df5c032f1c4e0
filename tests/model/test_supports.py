"""Whitelists of switches: one that code does not name is never ignored, one without an effect never in the way."""

from dataclasses import fields, replace

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.distilling.refit import refit
from llmctl.errors import UsageError
from llmctl.formats.gguf.write import obstacle_in
from llmctl.kernels import compiled_step
from llmctl.kernels.decoder import make_decoder
from llmctl.model.cut import Kept, cut
from llmctl.model.decode import Decoder, covers
from llmctl.model.equalize import joints
from llmctl.model.flops import Rows
from llmctl.model.shapes import complete
from llmctl.model.supports import BLOCK, BLOCK_CHOICES, effective, unsupported
from llmctl.model.training_memory import activation_bytes
from llmctl.model.transformer import LanguageModel
from tests.support.switches import switched

LLAMA = complete(ModelConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=4, d_ff=32, max_positions=32))
NEW = [
    switched(LLAMA),
    # Values that fields of today may have in a later version.
    replace(LLAMA, norm_position="between"),
    replace(LLAMA, positions="spiral"),
    replace(LLAMA, activation="relu9"),
    replace(LLAMA, qk_norm="width"),
    replace(LLAMA, attention_bias="qkv"),
]
IDS = [unsupported(config, BLOCK, BLOCK_CHOICES)[0] for config in NEW]


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(LLAMA).eval()


def test_the_new_switch_at_its_default_is_no_obstacle():
    config = switched(LLAMA, new_switch=False)
    assert unsupported(config, BLOCK, BLOCK_CHOICES) == []
    assert covers(config)
    assert obstacle_in(config) == ""


def test_fields_without_effect_are_no_switches():
    idle = {"position_offset": 2, "n_relative_buckets": 8, "max_relative_distance": 64, "pooling": "last"}
    idle |= {"attention_windows": (0, 0), "problem": "multi", "pooled_activation": "tanh"}
    config = replace(LLAMA, **idle)
    assert effective(config) == effective(LLAMA)
    learned = replace(config, positions="learned")
    assert effective(learned).position_offset == 2
    assert effective(replace(learned, rope_theta=7.0)) == effective(learned)
    assert effective(replace(config, attention_scale=0.25)).attention_scale == 0.25
    assert effective(replace(config, attention_windows=(0, 8))).attention_windows == (0, 8)


def test_every_field_is_named_or_has_its_default():
    named = {field.name for field in fields(LLAMA)}
    assert unsupported(replace(LLAMA, gated=False, norm="layernorm"), named) == []
    assert unsupported(replace(LLAMA, gated=False, norm="layernorm"), named - {"norm", "gated"}) == ["norm", "gated"]
    assert unsupported(replace(LLAMA, norm="layernorm"), named - {"norm"}, {"norm": ("layernorm",)}) == []
    assert unsupported(LLAMA, named - {"norm"}, {"norm": ("layernorm",)}) == ["norm"]


def test_the_common_set_names_fields_only():
    assert {field.name for field in fields(ModelConfig)} > BLOCK | BLOCK_CHOICES.keys()
    assert not BLOCK & BLOCK_CHOICES.keys()


@pytest.mark.parametrize("config", NEW, ids=IDS)
def test_the_fast_decoder_leaves_it_to_the_plain_path(config, model):
    assert covers(model.config)
    model.config = config
    assert not covers(config)
    assert make_decoder(model) is None


@pytest.mark.parametrize("config", NEW, ids=IDS)
def test_the_compiled_step_leaves_it_to_torch(config, model, monkeypatch):
    class Step:
        is_whole = True

        def __init__(self, *_: object) -> None: ...

    monkeypatch.setattr(compiled_step, "Step", Step)
    decoder = Decoder(model)
    assert compiled_step.make_native(None, decoder) is not None
    decoder.config = config
    assert compiled_step.make_native(None, decoder) is None


@pytest.mark.parametrize(("config", "name"), list(zip(NEW, IDS, strict=True)), ids=IDS)
def test_pruning_refuses_it_by_name(config, name, model):
    kept = Kept(layers={"model.": (0,)})
    cut(model.config, model.state_dict(), kept)
    with pytest.raises(UsageError, match=f"pruning.*`model.{name}`") as caught:
        cut(config, model.state_dict(), kept)
    assert caught.value.hint


@pytest.mark.parametrize(("config", "name"), list(zip(NEW, IDS, strict=True)), ids=IDS)
def test_refitting_refuses_it_by_name(config, name, model):
    kept = Kept(layers={"model.": (0,)})
    student = LanguageModel(replace(LLAMA, n_layers=1)).eval()
    batch = {"input_ids_BT": torch.zeros(1, 4, dtype=torch.long)}
    refit(model, student, kept, [batch], lambda _: None)
    model.config = config
    with pytest.raises(UsageError, match=f"refitting.*`model.{name}`"):
        refit(model, student, kept, [batch], lambda _: None)


@pytest.mark.parametrize("config", NEW, ids=IDS)
def test_equalizing_moves_no_scale(config, model):
    assert joints(model.model.layers[0], model.config)
    assert joints(model.model.layers[0], config) == []


@pytest.mark.parametrize(("config", "name"), list(zip(NEW, IDS, strict=True)), ids=IDS)
def test_memory_is_not_computed_for_it(config, name):
    rows = Rows(batch_size=2, source=8, target=0)
    assert activation_bytes(LLAMA, rows, 2, 4) > 0
    with pytest.raises(UsageError, match=f"memory.*`model.{name}`"):
        activation_bytes(config, rows, 2, 4)


@pytest.mark.parametrize(("config", "name"), list(zip(NEW, IDS, strict=True)), ids=IDS)
def test_gguf_names_it_as_the_obstacle(config, name):
    assert obstacle_in(LLAMA) == ""
    assert f"`model.{name}`" in obstacle_in(config)
