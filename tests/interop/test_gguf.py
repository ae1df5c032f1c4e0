"""GGUF files of ours as others read them: transformers' own loader, and llama.cpp where `llama_cpp` is installed."""

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.converting.export_gguf import export_gguf
from llmctl.converting.gguf_check import PROBES
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer
from tests.support.bpe import TEXTS, byte_level
from tests.support.spm import published

pytest.importorskip("gguf", reason="pip install gguf")
pytestmark = pytest.mark.interop

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "max_positions": 128, "init_std": 0.2}
CASES = {
    "llama": {},
    "llama-untied": {"tie_embeddings": False, "rope_theta": 777.0},
    "qwen3": {"qk_norm": True, "tie_embeddings": False, "head_dim": 128},  # transformers does not read its width
}
SANDWICH = {"activation": "gelu_tanh", "norm_position": "both", "embedding_scale": 8.0, "n_layers": 6}
MORE = {
    "llama-linear": {"rope_scaling": "linear", "rope_scaling_values": (4.0,)},
    "llama-yarn": {"rope_scaling": "yarn", "rope_scaling_values": (4.0, 32.0, 1.0, 32.0, 1.138629436111989, 1.0)},
    "mistral-window": {"attention_windows": (100,)},
    "phi3": {"norm_eps": 1e-6},
    "phi3-partial": {"rotary_dim": 8, "attention_windows": (100,)},
    # llama.cpp chooses the divisors by the size of its context, here 256 tokens, we by the length of a row.
    "phi3-short": {"rope_scaling": "longrope", "rope_scaling_values": (256.0, 1.19, *[1.1, 1.2] * 4, *[2.0, 3.0] * 4)},
    "phi3-long": {"rope_scaling": "longrope", "rope_scaling_values": (16.0, 1.19, *[1.1, 1.2] * 4, *[2.0, 3.0] * 4)},
    "granite": {"attention_scale": 0.05, "embedding_scale": 12.0, "residual_scale": 0.22, "logits_scale": 0.125},
    "olmo2": {"tie_embeddings": False} | {"norm_position": "output", "qk_norm": True, "qk_norm_kind": "width"},
    "stablelm": {"norm": "layernorm", "rotary_dim": 4, "attention_bias": True, "attention_output_bias": "no"}
    | {"tie_embeddings": False},
    "starcoder2": {
        "norm": "layernorm",
        "gated": False,
        "activation": "gelu_tanh",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-3": {"rope_theta": 5e5, "rope_scaling": "llama3", "rope_scaling_values": (32.0, 1.0, 4.0, 64.0)},
    "qwen2": {"attention_bias": True, "attention_output_bias": "no"},
    "gemma": {"activation": "gelu_tanh", "embedding_scale": 8.0, "head_dim": 32},
    "gemma2": SANDWICH | {"attention_softcap": 50.0, "logits_softcap": 30.0, "attention_windows": (8, 0)},
    "gemma3": SANDWICH
    | {"qk_norm": True, "rope_theta": 1e6, "attention_windows": (8, 8, 8, 8, 8, 0)}
    | {"rope_thetas": (1e4, 1e4, 1e4, 1e4, 1e4, 1e6)},
}


def source_of(folder, tokenizer, **fields):
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **(SHAPE | fields)))
    initialize(model, 5)
    return write_artifact(folder, model.config, model.state_dict(), files=tokenizer.files(), provenance={})


@pytest.fixture(scope="module")
def pieces():
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=340))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["f32", "q4_0"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_loads_it_with_the_same_logits(case, kind, pieces, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
    source = source_of(tmp_path / "m", pieces, **CASES[case])
    export_gguf(source, tmp_path / "m.gguf", kind=kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="m.gguf", dtype="float32"
    ).eval()
    from llmctl.converting.convert import import_model

    ours = load_model(import_model(tmp_path / "m.gguf", tmp_path / "back"), device="cpu").model
    ids = torch.arange(90)[None] * 3 % pieces.vocab_size
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-4)


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_llama_cpp_has_the_same_logits(case, pieces, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    source = source_of(tmp_path / "m", pieces, **(CASES | MORE)[case])
    record = export_gguf(source, tmp_path / "m.gguf", kind="f32")
    assert record["proof"]["llama_cpp_tokens"] == record["proof"]["llama_cpp_of"], "greedy text"
    ours, ids = load_model(source, device="cpu"), pieces.encode(TEXTS[0])[:64]
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_gpu_layers=0, logits_all=True, verbose=False)
    llama.eval(ids)
    with torch.no_grad():
        wanted_TV = ours.model(torch.tensor([ids]))[0]
    # Its attention keeps keys and values in 16 bits.
    assert torch.allclose(torch.tensor(llama.scores[: len(ids)]), wanted_TV, atol=3e-3 * float(wanted_TV.abs().max()))
    assert (llama.token_bos(), llama.token_eos()) == (pieces.bos_id, pieces.eos_id)
    llama.close()


@pytest.mark.parametrize("case", MORE)
def test_import_gives_the_model_back(case, pieces, tmp_path):
    from llmctl.converting.convert import import_model

    source = source_of(tmp_path / "m", pieces, **MORE[case])
    export_gguf(source, tmp_path / "m.gguf", kind="f32")
    ours, back = load_model(source, device="cpu"), load_model(import_model(tmp_path / "m.gguf", tmp_path / "back"))
    assert back.artifact.architecture == ours.artifact.architecture
    ids = torch.arange(90)[None] * 3 % pieces.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(back.model(ids), ours.model(ids))


@pytest.mark.parametrize("kind", ["q8_0", "q4_K"])
def test_fused_tensors_are_quantized_like_their_parts(kind, pieces, tmp_path):
    """Phi-3's queries, keys and values are one tensor there: its blocks are those of the three."""
    from llmctl.converting.convert import import_model

    source = source_of(tmp_path / "m", pieces, d_model=256, d_ff=256)
    assert export_gguf(source, tmp_path / "llama.gguf", kind=kind)["bits_per_weight"] > 4
    config = load_model(source, device="cpu").model.config
    from llmctl.formats.gguf.architectures import ARCHITECTURES

    assert ARCHITECTURES["phi3"].holds(config), "the same config as llama, which comes first"
    back = load_model(import_model(tmp_path / "llama.gguf", tmp_path / "back"), device="cpu").model
    other = source_of(tmp_path / "p", pieces, d_model=256, d_ff=256, rotary_dim=32)
    export_gguf(other, tmp_path / "phi3.gguf", kind=kind)
    fused = load_model(import_model(tmp_path / "phi3.gguf", tmp_path / "again"), device="cpu").model
    for name, tensor in back.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_splits_words_alike(pre, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    from llmctl.tokenizer.load import tokenizer_from_files

    tokenizer = tokenizer_from_files(byte_level(pre))
    export_gguf(source_of(tmp_path / "m", tokenizer), tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in (*PROBES, *(text[::-1] for text in PROBES)):
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
    llama.close()


AROUND = (
    "{0}the",
    "the{0}cat",
    "the {0} cat",
    "{0}{0}{1}",
    " {0} ",
    "{1}",
    "the\n{0}\nmat",
    "{0}  猫é",
    "",
    " ",
    "  the",
)
"""Texts around user-defined tokens, of which one begins with the other and one is white space."""


@pytest.mark.parametrize("has_prefix", [True, False], ids=["prefix", "no-prefix"])
def test_llama_cpp_has_the_same_spaces_around_user_defined_tokens(has_prefix, tmp_path):
    """It splits the text at them first, and gives every other part the dummy space."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    from llmctl.converting.convert import import_model
    from llmctl.tokenizer.load import tokenizer_from_files

    symbols = ["<|user|>", "<|user|>x", "\t\t"]
    proto = published(TEXTS, 340, user_defined_symbols=symbols, add_dummy_prefix=has_prefix)
    source = source_of(tmp_path / "m", tokenizer_from_files({"tokenizer.model": proto}))
    export_gguf(source, tmp_path / "m.gguf")
    tokenizer = load_model(import_model(tmp_path / "m.gguf", tmp_path / "back"), device="cpu").tokenizer
    # The same again through a file of its own.
    export_gguf(tmp_path / "back", tmp_path / "again.gguf")
    again = load_model(import_model(tmp_path / "again.gguf", tmp_path / "last"), device="cpu").tokenizer
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in (
        form.format(*pair) for form in AROUND for pair in zip(symbols, symbols[1:] + symbols[:1], strict=True)
    ):
        expected = llama.tokenize(text.encode(), add_bos=False)
        assert tokenizer.encode(text) == again.encode(text) == expected, text
    llama.close()


def test_transformers_has_our_ids_after_export_and_import(pieces, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
    from llmctl.converting.convert import import_model

    export_gguf(source_of(tmp_path / "m", pieces), tmp_path / "m.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(import_model(tmp_path / "m.gguf", tmp_path / "back"))
    for text in (*(text for text in PROBES if "<" not in text), "  the  cat\n", ""):
        assert theirs(text, add_special_tokens=False).input_ids == pieces.encode(text)
        assert theirs(text).input_ids == [pieces.bos_id, *pieces.encode(text)]
