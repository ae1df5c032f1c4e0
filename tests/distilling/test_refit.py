from dataclasses import replace

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.distilling.cut_student import cut_student, narrow
from llmctl.distilling.refit import is_cut, refit, sums
from llmctl.distilling.student_shape import resized
from llmctl.model.cut import Kept, cut
from llmctl.model.importance import rank
from llmctl.model.transformer import LanguageModel, load_tensors
from tests.distilling.test_cut_student import learned, mean_loss
from tests.model.test_cut import SHAPES, build, outputs
from tests.model.test_importance import batch


def cut_out(model: LanguageModel, kept: Kept) -> LanguageModel:
    config, state = cut(model.config, model.state_dict(), kept)
    student = LanguageModel(config)
    load_tensors(student, state)
    return student.eval()


def states(model: LanguageModel, one: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.hidden(**{name: tensor for name, tensor in one.items() if name != "labels"})


# Blocks that normalize what a part adds are not refit.
@pytest.mark.parametrize(
    "name", [name for name in SHAPES if SHAPES[name].get("norm_position", "pre") in ("pre", "post")]
)
def test_nothing_is_solved_for_where_nothing_is_gone(name):
    model = build(name).float()
    student = cut_out(model, Kept())
    refit(model, student, Kept(), [batch(model)], print)
    assert torch.equal(outputs(student), outputs(model))


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2", "neox", "cohere", "qwen2"])
def test_a_student_comes_nearer_to_its_teacher(name):
    model = build(name).float().eval()
    config = model.config
    one = batch(model)
    decoders = {"n_decoder_layers": 1} if config.family == "encoder_decoder" else {}
    shape = resized(config, {"n_layers": 2, "d_ff": 16, **decoders})
    importance = rank(model, [one])
    prefix = "model.decoder." if decoders else "model."
    kept = narrow(model, shape, importance, {prefix: tuple(range(1 if decoders else 2))})
    student = cut_out(model, kept)
    wanted, before = states(model, one), states(student, one)
    refit(model, student, kept, [one], print)
    after = states(student, one)
    assert (after - wanted).square().mean() < 0.8 * (before - wanted).square().mean()


def test_units_that_say_the_same_are_taken_over_without_loss():
    model = build("llama").float().eval()
    n_units = model.config.d_ff // 2
    with torch.no_grad():
        for block in model.model.layers:
            for part in (block.mlp.gate_proj, block.mlp.up_proj):
                part.weight[n_units:] = part.weight[:n_units]
    kept = Kept(units={f"model.layers.{layer}.": torch.arange(n_units) for layer in range(model.config.n_layers)})
    student, one = cut_out(model, kept), batch(model)
    ids = torch.randint(model.config.vocab_size, (64, 16), generator=torch.Generator().manual_seed(0))
    before = (states(student, one) - states(model, one)).square().mean()
    refit(model, student, kept, [{"input_ids_BT": ids}], print)
    after = (states(student, one) - states(model, one)).square().mean()
    assert after < 1e-2 * before  # what is left is the ridge


def test_padding_has_no_say():
    model = build("llama").float().eval()
    kept = Kept(layers={"model.": (0,)})
    ids = torch.randint(model.config.vocab_size, (8, 12))
    documents = torch.ones_like(ids)
    documents[:, 8:] = 0
    students = []
    for filler in (0, 1):
        padded = torch.where(documents == 0, filler, ids)
        students.append(cut_out(model, kept))
        refit(model, students[-1], kept, [{"input_ids_BT": padded, "documents_BT": documents}], print)
    assert torch.allclose(*(one.model.layers[0].mlp.down_proj.weight for one in students), atol=1e-6)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_every_map_is_followed_by_the_norm_that_reads_its_sum(family, norm_position):
    config = ModelConfig(
        vocab_size=11, d_model=8, n_layers=1, n_heads=2, d_ff=16, max_positions=8, family=family,
        norm_position=norm_position, n_decoder_layers=int(family == "encoder_decoder"),
    )  # fmt: skip
    model = LanguageModel(config).eval()
    block = model.stacks()[-1].layers[0]
    found = sums(block)
    assert [name for name, _ in found][-1] == "mlp.down_proj"
    assert len(found) == 2 + block.cross
    assert (found[-1][1] == "") == (norm_position == "pre")
    assert found[0][1] == ("input_layernorm" if norm_position == "post" else found[0][1])
    assert not is_cut(Kept(), "model.")


def test_the_loss_after_the_cut_is_lower_for_it():
    model = learned()
    shape = replace(resized(model.config, {"n_layers": 2, "d_ff": 32}))
    plain = cut_student(model, shape, [batch(model)], mean_loss, pick="greedy", say=print)
    fitted = cut_student(
        model, shape, [batch(model)], mean_loss, pick="greedy", say=print, refit_batches=[batch(model)]
    )
    assert plain.report["loss_after"] == plain.report["loss_cut"] == fitted.report["loss_cut"]
    assert fitted.report["loss_after"] < plain.report["loss_after"]
    assert plain.report["model.layers"] == fitted.report["model.layers"]
