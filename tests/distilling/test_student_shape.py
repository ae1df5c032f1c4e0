from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.config import ModelConfig
from llmctl.distilling.student_shape import parse_student, shape_between
from llmctl.errors import UsageError
from llmctl.families.table import FAMILIES, family_for
from llmctl.model.parameters import count
from llmctl.model.presets import preset_config
from llmctl.model.shapes import complete
from llmctl.model.transformer import LanguageModel

LLAMA = complete(
    ModelConfig(vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536)
)
BERT = complete(replace(preset_config("bert-base", None), vocab_size=30522))
PAIR = complete(replace(preset_config("transformer-base", None), vocab_size=8000, n_layers=3, d_model=256, n_heads=4))


@pytest.mark.parametrize("teacher", [LLAMA, BERT])
@pytest.mark.parametrize("share", [0.9, 0.75, 0.5, 0.4])
def test_a_share_is_met(teacher, share):
    shape = parse_student(f"{share:.0%}", teacher)
    assert 0.95 * share <= count(shape) / count(teacher) <= 1.02 * share
    assert family_for(shape)
    assert shape.n_heads // shape.n_kv_heads == teacher.n_heads // teacher.n_kv_heads
    assert shape.d_ff % 8 == 0


def test_parameters_are_those_of_the_model():
    for teacher in (replace(LLAMA, vocab_size=100, n_layers=2), replace(PAIR, vocab_size=50)):
        model = LanguageModel(teacher)
        assert count(complete(teacher)) == sum(parameter.numel() for parameter in model.parameters())


def test_depth_goes_before_width():
    shape = parse_student("50%", LLAMA)
    assert shape.d_model == LLAMA.d_model
    assert shape.n_layers < LLAMA.n_layers


def test_the_decoder_goes_before_the_encoder():
    shape = parse_student("75%", PAIR)
    assert shape.n_layers == 3
    assert shape.n_decoder_layers < 3


def test_sizes():
    shape = parse_student("layers=6, dim=384, heads=6, ffn=1408", LLAMA)
    sizes = (shape.n_layers, shape.d_model, shape.n_heads, shape.n_kv_heads, shape.d_ff)
    assert sizes == (6, 384, 6, 2, 1408)
    assert parse_student("kv_heads=1", LLAMA).n_heads == 3
    assert parse_student("dim=384", BERT).n_heads == 6
    assert parse_student("heads=6", BERT).d_model == 384
    assert parse_student("encoder_layers=2,decoder_layers=1", PAIR).n_decoder_layers == 1
    assert (parse_student("layers=2", PAIR).n_layers, parse_student("layers=2", PAIR).n_decoder_layers) == (2, 2)
    assert parse_student("100%", LLAMA) == LLAMA


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither a percentage nor a size"),
        ("half", "neither"),
        ("layer=3", "did you mean `layers`"),
        ("layers=0", "at least 1"),
        ("layers=x", "`x`"),
        ("layers=٣", "at least 1"),
        ("layers=31", "the teacher has 30"),
        ("layers=2,layers=3", "twice"),
        ("heads=8", "groups of 3"),
        ("decoder_layers=1", "one stack"),
        ("0%", "0%"),
        ("120%", "100%"),
        ("1%", "the smallest student"),
        ("-5%", "neither"),
        ("layers=" + "9" * 5000, "at least 1"),
        ("dim=256", "not divisible by 9 heads"),
    ],
)
def test_what_is_no_student(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        parse_student(text, LLAMA)
    assert caught.value.hint
    assert f"`--student {text}" in str(caught.value)


def test_a_decoder_of_its_own_depth():
    shape = parse_student("layers=2,decoder_layers=1", PAIR)
    assert (shape.n_layers, shape.n_decoder_layers) == (2, 1)
    assert parse_student("decoder_layers=1,layers=2", PAIR) == shape


def test_a_table_of_positions_is_not_made_narrower():
    with pytest.raises(UsageError, match="sinusoidal"):
        parse_student("dim=128", PAIR)


def test_widths_that_an_architecture_does_not_have():
    with pytest.raises(UsageError, match="not 12 heads of 64"):
        parse_student("dim=512,heads=12", BERT)
    with pytest.raises(UsageError, match="not 1 heads of 64") as caught:
        parse_student("dim=32", BERT)
    assert caught.value.hint == "dim=64 goes with heads=1"


def test_heads_wider_than_the_model_stay_with_a_scaled_embedding():
    """Gemma 2's heads are 256 wide, and its embedding is scaled by the root of its width."""
    teacher = FAMILIES["Gemma2ForCausalLM"].read_config(
        {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 24}
        | {"intermediate_size": 96, "sliding_window": 16, "query_pre_attn_scalar": 24}
    )
    assert parse_student("layers=2,ffn=32", teacher).head_dim == 24


@given(st.text(st.sampled_from("layersdimheadsffn=,%0123456789 "), max_size=24))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_student_or_an_error(text):
    try:
        shape = parse_student(text, BERT)
    except UsageError:
        return
    assert count(shape) <= count(BERT)


@pytest.mark.parametrize(
    ("teacher", "text"), [(LLAMA, "layers=6,dim=384,heads=6,ffn=512"), (LLAMA, "dim=288"), (BERT, "25%"), (PAIR, "60%")]
)
def test_shapes_on_the_way(teacher, text):
    student = parse_student(text, teacher)
    assert shape_between(teacher, student, 0.0) == teacher
    assert shape_between(teacher, student, 1.0) == student
    middle = shape_between(teacher, student, 0.5)
    assert family_for(middle)
    assert count(student) < count(middle) < count(teacher)


def test_fewer_units_than_usual_where_nothing_else_is_small_enough():
    """A narrow model that is mostly vocabulary, and cannot be narrower: its positions are a fixed table."""
    teacher = complete(
        ModelConfig(
            family="encoder_decoder",
            positions="sinusoidal",
            vocab_size=384,
            d_model=64,
            n_layers=2,
            n_heads=4,
            d_ff=96,
            gated=False,
        )
    )
    student = parse_student("50%", teacher)
    assert 0.4 * count(teacher) < count(student) <= 0.51 * count(teacher)
    assert student.d_ff < 0.6 * teacher.d_ff
