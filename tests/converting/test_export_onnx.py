"""Encoders out as ONNX: equal outputs in ONNX Runtime, codes kept, and what is wrong with a graph keeps the file away."""

import json

import numpy as np
import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import ModelConfig
from llmctl.converting.export_onnx import FILES, export_onnx
from llmctl.converting.gguf_check import PROBES
from llmctl.converting.onnx_check import N_OUTLIERS
from llmctl.errors import ArtifactError, OutputError
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.onnx import weights as weights_module
from llmctl.formats.onnx.encoder import Encoder
from llmctl.formats.sentence_encoder import pooling_files
from llmctl.model.transformer import LanguageModel
from llmctl.quant.grid import Codes, search
from llmctl.quant.schemes import SCHEMES
from llmctl.quant.weight import packed

onnx = pytest.importorskip("onnx", reason="pip install '.[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="pip install '.[onnx]'")
pytestmark = pytest.mark.interop

SIZE = {
    "family": "encoder",
    "vocab_size": 90,
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "d_ff": 48,
    "max_positions": 40,
}
LAYERNORM = {"norm": "layernorm", "embedding_norm": True, "attention_bias": True, "mlp_bias": True}
BERT = LAYERNORM | {
    "norm_position": "post",
    "positions": "learned",
    "gated": False,
    "activation": "gelu",
    "n_token_types": 2,
}
BLOCKS = {
    "rope, rmsnorm, gated": {},
    "bert": BERT,
    "roberta": BERT | {"position_offset": 2, "n_token_types": 1, "pad_id": 1},
    "grouped, windows": {"n_kv_heads": 2, "attention_windows": (0, 5, 9), "rope_thetas": (1e4, 1e3, 1e4)},
    "alibi, gelu_tanh": {"positions": "alibi", "activation": "gelu_tanh", "alibi_scale": 0.5},
    "relative": {"positions": "relative", "attention_scale": 1.0, "gated": False, "activation": "relu"},
    "relative by layer": {"positions": "relative", "relative_bias_per_layer": True},
    "learned and relative": BERT | {"relative_bias": True},
    "disentangled": BERT | {"positions": "disentangled", "n_token_types": 0, "n_relative_buckets": 16},
    "disentangled, grouped": {"positions": "disentangled", "n_relative_buckets": 8, "n_kv_heads": 2},
    "sinusoidal, relu2": {"positions": "sinusoidal", "activation": "relu2", "gated": False, "embedding_scale": 3.0},
    "none, capped": {"positions": "none", "attention_softcap": 2.0},
    "shared, narrow embedding": BERT | {"share_layers": True, "d_embedding": 24},
    "parallel": {"parallel": "shared", "norm": "layernorm", "norm_bias": False},
    "parallel, two norms": {"parallel": "separate", "residual_scale": 0.5},
    "norms after": {"norm_position": "output", "qk_norm": True, "qk_norm_kind": "width"},
    "norms around": {"norm_position": "both", "qk_norm": True, "norm_weight": False},
    "rotated norms": {"qk_norm": True, "qk_norm_kind": "rotated", "rotary_dim": 4, "first_norm": False},
    "yarn": {"rope_scaling": "yarn", "rope_scaling_values": (4.0, 32.0, 1.0, 16.0, 1.1)},
}
HEADS = {
    "words": {"logits_scale": 0.5},
    "words, transformed": {"head_transform": True, "logits_bias": True},
    "words, untied": {"tie_embeddings": False, "logits_scale": 0.5, "logits_softcap": 5.0},
    "first": {"n_labels": 3, "pooling": "first", "pooled_activation": "tanh"},
    "mean": {"n_labels": 2, "pooling": "mean", "pooled_activation": "gelu"},
    "last": {"n_labels": 1, "pooling": "last", "problem": "regression"},
    "tokens": {"n_labels": 4, "head": "tokens"},
    "tokens, transformed": {"n_labels": 4, "head": "tokens", "head_transform": True, "head_transform_bias": False},
    "span": {"n_labels": 2, "head": "span"},
}


def source_of(folder, files=None, **fields):
    """Write a random model, with every bias and norm another than at the start."""
    model = LanguageModel(ModelConfig(**(SIZE | {"pad_id": 0} | fields)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return write_artifact(folder, model.config, model.state_dict(), files=files or {}, provenance={})


def run(file, ids, mask, **more):
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": ids, "attention_mask": mask, **more})


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block, int8, tmp_path):
    record = export_onnx(source_of(tmp_path / "m", **BLOCKS[block]), tmp_path / "out", int8=int8)
    proof = record["proof"]
    assert proof["cosine"] > 0.98 if int8 else proof["difference"] < 1e-5
    assert record["inputs"][2:] == (["token_type_ids"] if BLOCKS[block].get("n_token_types") == 2 else [])
    assert record["bytes"] == (tmp_path / "out" / "onnx" / FILES[record["type"]]).stat().st_size
    assert proof["tensors_equal"] == len(onnx.load(record["file"]).graph.initializer)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("head", HEADS)
def test_heads(head, int8, tmp_path):
    record = export_onnx(source_of(tmp_path / "m", **(BERT | HEADS[head])), tmp_path / "out", int8=int8)
    assert record["outputs"] == (["start_logits", "end_logits"] if head == "span" else ["logits"])
    proof = record["proof"]
    assert proof["cosine"] > 0.98 if int8 else proof["difference"] < 1e-5


def sentence_encoder(folder, models):
    files = read_artifact(models["bert"]).files | pooling_files("first", 32)
    bert = read_artifact(models["bert"])
    model = LanguageModel(bert.config)
    model.load_state_dict(bert.state())
    return write_artifact(folder, model.config, model.state_dict(), files=files, provenance={})


def test_a_sentence_encoder_keeps_its_files(models, tmp_path):
    source = sentence_encoder(tmp_path / "m", models)
    assert read_artifact(source).architecture == "BertModel"
    record = export_onnx(source, tmp_path / "out")
    assert record["outputs"] == ["last_hidden_state"]
    assert record["proof"]["texts_equal"] == len(PROBES)
    theirs = {path.relative_to(source).as_posix() for path in source.rglob("*.json")}
    assert theirs == {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.json")}
    for name in theirs:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"]


def test_padding_on_either_side_and_any_length_change_nothing(models, tmp_path):
    source = source_of(tmp_path / "m", **(BERT | {"position_offset": 2, "n_token_types": 0, "pad_id": 1}))
    file = export_onnx(source, tmp_path / "out")["file"]
    model, ids = load_model(source, device="cpu").model, torch.tensor([[5, 9, 4, 77, 30]])
    with torch.no_grad():
        expected = model(ids)[0].numpy()
    for before, after in ((0, 0), (0, 7), (4, 0), (3, 30)):
        row = np.pad(ids.numpy(), ((0, 0), (before, after)), constant_values=1)
        mask = (row != 1).astype(np.int64)
        [found] = run(file, np.repeat(row, 3, 0), np.repeat(mask, 3, 0))
        np.testing.assert_allclose(found[1, before : before + 5], expected, atol=2e-5)


def test_in_8_bits_a_text_does_not_depend_on_its_batch(tmp_path):
    file = export_onnx(source_of(tmp_path / "m", **(BERT | HEADS["mean"])), tmp_path / "out", int8=True)["file"]
    generator = np.random.default_rng(0)
    ids, mask = generator.integers(2, 90, (8, 30)), np.ones((8, 30), np.int64)
    for row, length in enumerate((30, 3, 12, 25, 1, 7, 30, 18)):
        mask[row, length:] = 0
    [together] = run(file, ids, mask, token_type_ids=np.zeros_like(ids))
    for row, length in enumerate(mask.sum(1)):
        own = ids[row : row + 1, :length]
        [alone] = run(file, own, np.ones_like(own), token_type_ids=np.zeros_like(own))
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_8_bits_are_a_quarter(tmp_path):
    source = source_of(tmp_path / "m", vocab_size=2000, d_model=160, d_ff=480, **HEADS["words, untied"])
    sizes = [export_onnx(source, tmp_path / "out", int8=int8)["bytes"] for int8 in (False, True)]
    assert sizes[1] < 0.29 * sizes[0]


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_a_quantized_model_keeps_its_codes(scheme, tmp_path):
    source = read_artifact(source_of(tmp_path / "m", **BERT))
    plan = dict.fromkeys(("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"), SCHEMES[scheme])
    plan["model.embed_tokens"] = SCHEMES["int8"]
    state = source.state()
    own = {}
    for name, chosen in plan.items():  # codes that rounding would not choose
        grid = search(state.pop(f"{name}.weight"), chosen)
        generator = torch.Generator().manual_seed(1)
        shape = (len(grid.scales_OG), 48 if "down" in name else 32)
        own[name] = Codes(torch.randint(60, 200, shape, generator=generator).to(torch.uint8), grid)
        state |= {f"{name}.{part}": tensor for part, tensor in packed(own[name], chosen).items()}
    state.pop("lm_head.weight", None)
    there = write_artifact(tmp_path / "q", source.config, state, files={}, provenance={}, schemes=plan)
    assert read_artifact(there).architecture == "LlmctlForLanguageModel"  # BERT's layout has no packed weights
    record = export_onnx(there, tmp_path / "out", int8=True)
    assert record["outputs"] == ["last_hidden_state"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(record["file"]).graph.initializer}
    for name, codes in own.items():
        label = name.replace("q_proj", "q_proj_k_proj_v_proj")
        wanted, scales = codes.codes_OI.short().numpy() - 128, codes.grid.scales_OG.numpy()
        found = stored[f"{label}.codes"] if name == "model.embed_tokens" else stored[f"{label}.codes"].T[: len(wanted)]
        outliers = np.nonzero((found == 0).all(axis=0))[0]
        np.testing.assert_array_equal(np.delete(found, outliers, axis=1), np.delete(wanted, outliers, axis=1))
        assert len(outliers) == (0 if name == "model.embed_tokens" else N_OUTLIERS)
        if len(outliers):  # whose weights stand with the bias, in float32
            thin = stored[f"{label}.rest"][1 : 1 + N_OUTLIERS, : len(wanted)].T
            np.testing.assert_array_equal(thin, wanted[:, outliers] * scales)
    assert export_onnx(there, tmp_path / "out")["proof"]["difference"] < 1e-5


def test_an_outlier_channel_costs_the_others_nothing(tmp_path):
    source = source_of(tmp_path / "m", **(BERT | HEADS["mean"]))
    before = export_onnx(source, tmp_path / "before", int8=True)["proof"]["cosine"]
    artifact = read_artifact(source)
    state = artifact.state()
    for layer in range(
        3
    ):  # a channel of the norms a hundred times as large, and what it is multiplied by as much smaller
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{layer}.{norm}.weight"][7] *= 100
        for reader in ("mlp.up_proj", *(f"self_attn.{part}_proj" for part in "qkv" if layer)):
            state[f"model.layers.{layer}.{reader}.weight"][:, 7] /= 100
    wide = write_artifact(tmp_path / "wide", artifact.config, state, files={}, provenance={})
    after = export_onnx(wide, tmp_path / "after", int8=True)["proof"]["cosine"]
    assert after > 0.999
    assert before > 0.999


def test_both_kinds_in_one_folder_and_nothing_is_overwritten(models, tmp_path):
    out = tmp_path / "out"
    first = export_onnx(models["bert"], out)
    before = (out / "onnx" / "model.onnx").read_bytes()
    second = export_onnx(models["bert"], out, int8=True)
    assert (first["file"], second["file"]) == (
        str(out / "onnx" / "model.onnx"),
        str(out / "onnx" / "model_quantized.onnx"),
    )
    assert (out / "onnx" / "model.onnx").read_bytes() == before
    with pytest.raises(OutputError, match=r"contains `onnx/model_quantized\.onnx`"):
        export_onnx(models["bert"], out, int8=True)
    with pytest.raises(OutputError, match="already exists"):
        export_onnx(models["encoder"], out)
    export_onnx(models["bert"], out, force=True)
    assert (out / "onnx" / "model.onnx").read_bytes() == before
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_large_models_keep_their_tensors_in_a_second_file(tmp_path):
    source = source_of(tmp_path / "m", **BERT)
    whole = export_onnx(source, tmp_path / "whole")
    record = export_onnx(source, tmp_path / "out", most_bytes=1000)
    data = tmp_path / "out" / "onnx" / "model.onnx_data"
    assert data.stat().st_size > 0.7 * whole["bytes"]
    assert record["bytes"] == data.stat().st_size + (tmp_path / "out" / "onnx" / "model.onnx").stat().st_size
    ids = np.arange(12, dtype=np.int64)[None]
    inputs = {"mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    np.testing.assert_array_equal(run(record["file"], ids, **inputs), run(whole["file"], ids, **inputs))


def test_replacing_leaves_nothing_of_the_other_model(models, tmp_path):
    out, bert = tmp_path / "out", source_of(tmp_path / "m", **BERT)
    export_onnx(models["bert"], out, int8=True)
    export_onnx(bert, out, force=True, most_bytes=1000)
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "config.json",
        "model.onnx",
        "model.onnx_data",
    ]
    export_onnx(bert, out, force=True)
    export_onnx(bert, out, int8=True)
    assert sorted(path.name for path in (out / "onnx").iterdir()) == ["model.onnx", "model_quantized.onnx"]


def test_weights_that_are_not_finite_are_refused(tmp_path):
    artifact = read_artifact(source_of(tmp_path / "m"))
    state = artifact.state()
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    there = write_artifact(tmp_path / "nan", artifact.config, state, files={}, provenance={})
    with pytest.raises(ArtifactError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight` of .* not finite"):
        export_onnx(there, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROKEN = {
    "no padding mask": ("share", lambda self, call: (call(), self.masks.update({0: self.graph.number(0.0)}))),
    "rotated the other way": (
        "rotated",
        lambda _, call, x, rope: call(x, type(rope)(rope.sin, rope.cos, rope.width)),
    ),
    "heads in another order": ("heads", lambda self, call, x, n: self.graph.op("Neg", call(x, n))),
    "another activation": ("activated", lambda _, call, x, __: call(x, "relu")),
}


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_wrong_graph_is_not_written(what, int8, tmp_path, monkeypatch):
    name, change = BROKEN[what]
    original = getattr(Encoder, name)
    monkeypatch.setattr(Encoder, name, lambda self, *args: change(self, lambda *given: original(self, *given), *args))
    with pytest.raises(ArtifactError, match="verification failed: outputs"):
        export_onnx(source_of(tmp_path / "m"), tmp_path / "out", int8=int8)
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_a_graph_that_cannot_run_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "heads", lambda self, x, _: self.graph.op("Reshape", x, self.graph.integers(7, 7)))
    with pytest.raises(ArtifactError, match="verification failed: ONNX Runtime cannot run it"):
        export_onnx(source_of(tmp_path / "m"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_wrong_scales_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "signed", lambda codes: (codes.codes_OI.to(torch.int16) - 120).to(torch.int8))
    with pytest.raises(ArtifactError, match="verification failed"):
        export_onnx(source_of(tmp_path / "m"), tmp_path / "out", int8=True)
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_what_other_programs_need_is_told(models, tmp_path):
    assert export_onnx(source_of(tmp_path / "m", parallel="shared"), tmp_path / "out")["missing"] == [
        "transformers, optimum and transformers.js do not know the architecture in `config.json`"
    ]
    assert export_onnx(models["bert"], tmp_path / "bert")["missing"] == []
    files = {"vocab.txt": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]).encode()}
    record = export_onnx(source_of(tmp_path / "old", files, **BERT), tmp_path / "of old")
    assert record["missing"] == ["transformers.js needs `tokenizer.json`, which is not among the files of this model"]
    assert record["proof"]["texts_equal"] == len(PROBES)


def test_other_families_are_refused(models, tmp_path):
    for name, said in (("decoder", "is a decoder"), ("encoder_decoder", "is an encoder-decoder")):
        with pytest.raises(ArtifactError, match=f"{said}, which is not exported as ONNX"):
            export_onnx(models[name], tmp_path / "out")
    mixture = source_of(tmp_path / "m", n_experts=2, n_active_experts=1)
    with pytest.raises(ArtifactError, match=r"another block \(`model.n_experts` 2"):
        export_onnx(mixture, tmp_path / "out")
    assert not (tmp_path / "out").exists()
