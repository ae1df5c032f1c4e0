"""Encoders as GGUF files: written, read back, and the same vectors in llama.cpp."""

import json

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import ModelConfig
from llmctl.converting.convert import import_model
from llmctl.converting.export_gguf import export_gguf
from llmctl.converting.gguf_check import PROBES
from llmctl.errors import ArtifactError
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.sentence_encoder import pooling_files, sentence_encoder
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.load import tokenizer_from_files

pytest.importorskip("gguf", reason="pip install gguf")
pytestmark = pytest.mark.interop

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "river", "night", "number", "values", "##s", "##ing", "##er", "return", "雨", "夜", "桥", "Rain"]
BERT = {
    "family": "encoder",
    "norm": "layernorm",
    "norm_position": "post",
    "embedding_norm": True,
    "n_token_types": 2,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_positions": 128,
    "init_std": 0.2,
    "d_ff": 96,
    "tie_embeddings": True,
}
CASES = {
    "bert": {"positions": "learned", "activation": "gelu", "gated": False, "attention_bias": True, "mlp_bias": True},
    "nomic-bert": {"rope_theta": 1000.0},
}


def word_pieces(*, lower: bool) -> dict[str, bytes]:
    """Return BERT's files: all letters and digits, alone and within words, and some words."""
    letters = [chr(code) for code in range(33, 127) if not (lower and chr(code).isupper())]
    lines = dict.fromkeys([*SPECIAL, *letters, *("##" + letter for letter in letters if letter.isalnum()), *WORDS])
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    return {"vocab.txt": "\n".join([*lines, ""]).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def source_of(folder, case, *, lower=True, pooling="mean", **fields):
    tokenizer = tokenizer_from_files(word_pieces(lower=lower))
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **(BERT | CASES[case] | fields)))
    initialize(model, 5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    files = tokenizer.files() | pooling_files(pooling, 64)
    return write_artifact(folder, model.config, model.state_dict(), files=files, provenance={})


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_has_the_same_vectors(case, pooling, tmp_path):
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    proof = export_gguf(source_of(tmp_path / "m", case, pooling=pooling), tmp_path / "m.gguf", kind="f32")["proof"]
    assert proof["llama_cpp_cosine"] > 0.9999
    assert proof["texts_equal"] == len(PROBES)
    assert proof["cosine"] > 1 - 1e-6


@pytest.mark.parametrize(("kind", "least"), [("f16", 0.9999), ("q8_0", 0.998), ("q4_0", 0.8)])
@pytest.mark.parametrize("case", CASES)
def test_quantized_encoders(case, kind, least, tmp_path):
    proof = export_gguf(source_of(tmp_path / "m", case), tmp_path / "m.gguf", kind=kind)["proof"]
    assert proof["cosine"] > least


@pytest.mark.parametrize("lower", [True, False], ids=["uncased", "cased"])
@pytest.mark.parametrize("case", CASES)
def test_import_gives_the_model_back(case, lower, tmp_path):
    source = source_of(tmp_path / "m", case, lower=lower, pooling="first")
    export_gguf(source, tmp_path / "m.gguf", kind="f32")
    ours, back = load_model(source, device="cpu"), load_model(import_model(tmp_path / "m.gguf", tmp_path / "back"))
    assert back.artifact.architecture == ours.artifact.architecture in ("BertModel", "NomicBertModel")
    assert sentence_encoder(back.artifact.files).pooling == "first"
    for text in PROBES:
        assert back.tokenizer.encode(text) == ours.tokenizer.encode(text)
    assert back.frame == ours.frame
    ids = torch.arange(60)[None] * 3 % ours.model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(back.model.hidden(ids), ours.model.hidden(ids))


def test_an_encoder_with_a_prediction_head_is_refused(tmp_path):
    source = source_of(tmp_path / "m", "bert", head_transform=True, logits_bias=True)
    with pytest.raises(ArtifactError, match="prediction head"):
        export_gguf(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
