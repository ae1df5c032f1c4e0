"""GGUF files of ours: what is written comes back, under llama.cpp's names and layout, in every type."""

import numpy as np
import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, UsageError
from llmctl.formats.gguf.container import read_gguf_header
from llmctl.formats.gguf.model import gguf_config, gguf_state, half_split
from llmctl.formats.gguf.write import (
    TYPES,
    check_kind,
    encoded,
    file_type,
    find_type,
    model_values,
    paired,
    plan_blocks,
    write_gguf,
)
from llmctl.model.transformer import LanguageModel, initialize

gguf = pytest.importorskip("gguf", reason="pip install gguf")

SHAPE = {"vocab_size": 40, "d_model": 256, "n_layers": 2, "n_heads": 4, "d_ff": 288, "max_positions": 64}
MODELS = {
    "tied": {},
    "untied": {"tie_embeddings": False, "rope_theta": 777.0, "norm_eps": 1e-6},
    "grouped": {"n_kv_heads": 2, "init_std": 0.3},
    "wide-heads": {"head_dim": 80, "n_kv_heads": 1},
    "qwen3": {"qk_norm": True, "n_kv_heads": 2},
    "qwen3-untied": {"qk_norm": True, "head_dim": 32, "tie_embeddings": False, "rope_theta": 1e6},
}
LOST = ("init_std",)


def model_of(**fields):
    model = LanguageModel(ModelConfig(**(SHAPE | fields)))
    initialize(model, 3)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return model


def write(path, model, kind):
    return write_gguf(
        path,
        model.config,
        model.state_dict(),
        model_values(model.config, {"name": "x"}),
        plan_blocks(model.config, kind),
        {},
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in MODELS for kind in (TYPES if name in ("tied", "untied") else ("f32", "q8_0", "q4_K"))],
)
def test_weights_and_configuration_come_back(name, kind, tmp_path):
    model = model_of(**MODELS[name])
    written = write(tmp_path / "m.gguf", model, kind)
    header = read_gguf_header(tmp_path / "m.gguf")
    config = gguf_config(header)
    for field, value in vars(model.config).items():
        assert getattr(config, field) == value or field in LOST, field
    state = gguf_state(header, config)
    assert state.keys() == model.state_dict().keys()
    assert written.meant.keys() == state.keys() - ({"lm_head.weight"} if config.tie_embeddings else set())
    for key, meant in written.meant.items():
        assert torch.equal(state[key], meant), key
    assert written.n_bytes == sum(tensor.n_bytes for tensor in header.tensors.values())
    # The package's own reader finds the same tensors at aligned places.
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {tensor.name for tensor in reader.tensors} == header.tensors.keys()
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")])
def test_plain_types_are_nothing_but_rounding(kind, dtype, tmp_path):
    model = model_of()
    written = write(tmp_path / "m.gguf", model, kind)
    for key, meant in written.meant.items():
        tensor = model.state_dict()[key]
        rounded = tensor.to(getattr(torch, dtype)).float() if tensor.dim() > 1 else tensor
        assert torch.equal(meant, rounded), key


def test_equal_models_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, model_of(), "q4_K")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rows_of_queries_are_stored_as_rotary_pairs():
    rows = np.arange(24, dtype=np.uint8)[:, None]
    assert paired(rows, 3)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(half_split(paired(rows, 3), 3), rows)


def test_only_llamas_queries_and_keys_are_reordered(tmp_path):
    for fields, is_moved in (({}, True), ({"qk_norm": True}, False)):
        model = model_of(**fields)
        write(tmp_path / "m.gguf", model, "f32")
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        for there, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
            same = np.array_equal(
                tensors[f"blk.1.{there}.weight"], model.state_dict()[f"model.layers.1.self_attn.{ours}.weight"]
            )
            assert same == (ours == "v_proj" or not is_moved)


def test_metadata_is_what_llama_cpp_needs():
    config = model_of(n_kv_heads=2).config
    values = model_values(config, {"name": "x"})
    assert file_type(config, plan_blocks(config, "q4_K")) == gguf.LlamaFileType.MOSTLY_Q4_K_S
    keys = gguf.Keys
    for key, value in {
        keys.LLM.CONTEXT_LENGTH: 64,
        keys.LLM.EMBEDDING_LENGTH: 256,
        keys.LLM.BLOCK_COUNT: 2,
        keys.LLM.FEED_FORWARD_LENGTH: 288,
        keys.LLM.VOCAB_SIZE: 40,
        keys.Attention.HEAD_COUNT: 4,
        keys.Attention.HEAD_COUNT_KV: 2,
        keys.Attention.KEY_LENGTH: 64,
        keys.Attention.LAYERNORM_RMS_EPS: 1e-5,
        keys.Rope.DIMENSION_COUNT: 64,
        keys.Rope.FREQ_BASE: 10000.0,
    }.items():
        assert values[key.format(arch="llama")] == value
    for kind, row in TYPES.items():
        name = (
            "ALL_F32" if kind == "f32" else f"MOSTLY_{row.block}" + ("_S" if kind in ("q3_K", "q4_K", "q5_K") else "")
        )
        assert gguf.LlamaFileType[name] == row.number


def test_rows_that_are_no_whole_blocks_get_another_format():
    plan = plan_blocks(model_of().config, "q4_K")
    assert plan["blk.0.attn_q.weight"] == ("Q4_K", "Q4_K")
    assert plan["blk.0.ffn_down.weight"] == ("IQ4_NL", "Q4_K")  # rows of 288
    assert plan["token_embd.weight"] == ("Q6_K", "Q6_K")  # it is the head
    assert plan["output_norm.weight"] == ("F32", "F32")
    plan = plan_blocks(model_of(tie_embeddings=False, d_ff=300).config, "q4_0")
    assert plan["token_embd.weight"] == ("Q4_0", "Q4_0")
    assert plan["output.weight"] == ("Q6_K", "Q6_K")
    assert plan["blk.1.ffn_down.weight"] == ("F16", "Q4_0")
    plan = plan_blocks(model_of(d_model=96, n_heads=3).config, "q6_K")
    assert plan["token_embd.weight"] == ("Q8_0", "Q6_K")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "encoder"}, "is an encoder with a prediction head, or"),
        ({"family": "encoder_decoder"}, "is an encoder-decoder,"),
        ({"n_labels": 2, "labels": ("a", "b")}, "classifier"),
        ({"attention_bias": True}, "`model.attention_bias` True"),
        ({"mlp_bias": True}, "`model.mlp_bias` True"),
        ({"activation": "gelu"}, "`model.activation` 'gelu'"),
        ({"norm": "layernorm"}, "another block"),
        ({"positions": "learned"}, "another block"),
        ({"gated": False}, "another block"),
        ({"attention_windows": (8, 0)}, "another block"),
    ],
)
def test_models_of_other_kinds_are_refused(fields, message, tmp_path):
    with pytest.raises(ArtifactError, match=message) as raised:
        check_kind(model_of(**fields).config, "SomeArchitecture", tmp_path)
    assert "SomeArchitecture" in str(raised.value)
    assert "qwen3" in raised.value.hint


GEMMA = {
    "activation": "gelu_tanh", "embedding_scale": 32**0.5, "attention_scale": 16**-0.5, "norm_position": "both",
    "n_heads": 2, "n_kv_heads": 2, "d_model": 32, "head_dim": 16,
}  # fmt: skip
GEMMA2 = GEMMA | {"attention_softcap": 50.0, "logits_softcap": 30.0, "attention_windows": (8, 0)}
GEMMA3 = GEMMA | {"qk_norm": True, "rope_theta": 1e6, "n_layers": 6, "attention_windows": (8, 8, 8, 8, 8, 0)}
GEMMA3 |= {"rope_thetas": (1e4, 1e4, 1e4, 1e4, 1e4, 1e6)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (GEMMA2 | {"attention_softcap": 0.0}, "a gemma2 model with attention scores without a soft cap"),
        (GEMMA2 | {"attention_windows": ()}, "gemma2 model with full attention without sliding windows"),
        (
            GEMMA2 | {"attention_windows": (8, 8, 0)},
            "sliding windows other than one size in all layers but every second",
        ),
        (GEMMA2 | {"embedding_scale": 1.0}, "embeddings scaled by 1 instead of sqrt"),
        (GEMMA2 | {"n_layers": 46}, "46 layers, by which llama.cpp picks another attention scale"),
        (GEMMA3 | {"attention_scale": 0.125}, "gemma3 model with attention scores scaled by 0.125 instead of head_dim"),
        (GEMMA3 | {"rope_thetas": ()}, "a RoPE base other than 10000 in layers with a sliding window"),
        (GEMMA3 | {"logits_softcap": 30.0}, "a gemma3 model with `model.logits_softcap` 30.0"),
        ({"qk_norm": True, "qk_norm_kind": "width"}, "a qwen3 model with `model.qk_norm_kind` 'width'"),
    ],
)
def test_what_the_nearest_architecture_cannot_express_is_named(fields, message, tmp_path):
    for whole in (GEMMA2, GEMMA3):
        check_kind(model_of(**whole).config, "Gemma", tmp_path)
    with pytest.raises(ArtifactError, match=message):
        check_kind(model_of(**fields).config, "Gemma", tmp_path)


@pytest.mark.parametrize("fields", MODELS.values())
def test_models_of_these_kinds_are_not(fields, tmp_path):
    check_kind(model_of(**fields).config, "LlamaForCausalLM", tmp_path)


@pytest.mark.parametrize(
    ("value", "kind"), [(1e9, "f16"), (1e9, "q4_K"), (float("nan"), "f32"), (float("inf"), "q8_0")]
)
def test_weights_that_a_format_does_not_hold_are_refused(value, kind, tmp_path):
    model = model_of()
    model.model.layers[0].mlp.up_proj.weight.data[:] = value
    with pytest.raises(ArtifactError, match=r"layers\.0\.mlp\.up_proj"):
        write(tmp_path / "m.gguf", model, kind)


def test_bytes_of_a_vector():
    stored, meant = encoded(torch.tensor([1.0, -2.5]), "F32")
    assert stored.tobytes() == np.array([1.0, -2.5], np.float32).tobytes()
    assert meant.tolist() == [1.0, -2.5]


def test_types_are_found_however_they_are_written():
    assert [find_type(name) for name in ("Q4_K", "q4_k", "F16")] == ["q4_K", "q4_K", "f16"]
    with pytest.raises(UsageError, match="q4_k_m") as raised:
        find_type("q4_k_m")
    assert "q4_K" in raised.value.hint
