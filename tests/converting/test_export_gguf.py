"""A model out as GGUF and in again: equal weights, ids and special tokens; what is wrong with a file keeps it away."""

import json
import re

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.converting import export_gguf as module
from llmctl.converting.convert import import_model
from llmctl.converting.export_gguf import export_gguf, name_for
from llmctl.converting.gguf_check import N_GREEDY, distance
from llmctl.errors import ArtifactError, OutputError, UsageError
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.generation_settings import end_ids
from llmctl.formats.gguf import write as gguf_write
from llmctl.formats.gguf.container import read_gguf_header
from llmctl.formats.gguf.write import TYPES
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.load import load_tokenizer
from llmctl.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llmctl.tokenizer.train import train_tokenizer
from tests.support.bpe import TEXTS, byte_level

pytest.importorskip("gguf", reason="pip install gguf")

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 96, "max_positions": 128, "init_std": 0.2}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def tokenizer_of(kind):
    if kind == "bpe":
        config = {"bos_token": "<|end|>", "eos_token": "<|end|>", "add_bos_token": False}
        files = byte_level("smollm") | {"tokenizer_config.json": json.dumps(config).encode()}
        return files, 304, {"bos_id": 0, "eos_id": 0}
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=340))
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    return tokenizer.files(), tokenizer.vocab_size + 4, ids


def model_in(folder, kind="sentencepiece", **fields):
    files, vocab_size, ids = tokenizer_of(kind)
    model = LanguageModel(ModelConfig(**({"vocab_size": vocab_size} | SHAPE | ids | fields)))
    initialize(model, 5)
    files = files | {"chat_template.jinja": TEMPLATE.encode()}
    return write_artifact(folder, model.config, model.state_dict(), files=files, provenance={})


@pytest.fixture
def folder(tmp_path):
    return model_in(tmp_path / "model")


CASES = {
    "sentencepiece": {},
    "untied, grouped": {"tie_embeddings": False, "n_kv_heads": 2},
    "bpe": {"kind": "bpe", "n_kv_heads": 1},
    "qwen3": {"qk_norm": True, "n_kv_heads": 2, "rope_theta": 1e6},
    "qwen3, bpe": {"kind": "bpe", "qk_norm": True, "tie_embeddings": False},
}


EVERY_TYPE = ("sentencepiece", "untied, grouped")
"""The head has a type of its own where it is the embedding, too; tokenizers and norms do not depend on the type."""


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in (TYPES if case in EVERY_TYPE else ("f32", "q8_0", "q4_K"))],
)
def test_out_and_in_again(case, kind, tmp_path):
    source = model_in(tmp_path / "source", **CASES[case])
    record = export_gguf(source, tmp_path / "m.gguf", kind=kind)
    back = import_model(tmp_path / "m.gguf", tmp_path / "back")
    ours, theirs = load_model(source, device="cpu"), load_model(back, device="cpu")
    for text in (*TEXTS[:1], "猫 é 🙂 <s>"):
        assert theirs.tokenizer.encode(text) == ours.tokenizer.encode(text)
    for role in ("bos_id", "eos_id", "pad_id", "unk_id"):
        assert getattr(theirs.tokenizer, role) == getattr(ours.tokenizer, role)
        if role != "unk_id":
            assert getattr(theirs.model.config, role) == max(-1, getattr(ours.model.config, role))
    assert theirs.frame == ours.frame
    assert theirs.artifact.files["chat_template.jinja"].decode() == TEMPLATE
    assert theirs.artifact.architecture == ("Qwen3ForCausalLM" if ours.model.config.qk_norm else "LlamaForCausalLM")
    bound = {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2}.get(kind, 0.2)
    for name, weight in ours.model.state_dict().items():
        assert (theirs.model.state_dict()[name] - weight).norm() <= bound * weight.norm(), name
    proof = record["proof"]
    assert proof["logits_max_difference"] == 0
    assert proof["tensors_equal"] == sum(record["tensors"].values())
    assert (proof["kl"] < 1e-6 and proof["top1"] == 1) if kind == "f32" else proof["kl"] > 0
    assert record["bytes"] == (tmp_path / "m.gguf").stat().st_size
    if proof["llama_cpp_tokens"] is not None:  # it rounds activations to eight bits
        assert proof["llama_cpp_tokens"] >= N_GREEDY - 4


def test_the_end_of_a_turn_goes_round(folder, tmp_path):
    config = json.loads((folder / "generation_config.json").read_text())
    ends = [config["eos_token_id"], 5]
    source = read_artifact(folder)
    files = source.files | {"generation_config.json": json.dumps(config | {"eos_token_id": ends}).encode()}
    chat = write_artifact(tmp_path / "chat", source.config, source.state(), files=files, provenance={})
    export_gguf(chat, tmp_path / "m.gguf", kind="f32")
    assert read_gguf_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.eot_token_id"] == 5
    back = read_artifact(import_model(tmp_path / "m.gguf", tmp_path / "back"))
    assert end_ids(back.config, back.files) == ends


def test_fewer_bits_are_smaller_and_further_away(tmp_path):
    source = model_in(tmp_path / "source", d_model=256, d_ff=256, n_layers=1)
    records = {kind: export_gguf(source, tmp_path / f"{kind}.gguf", kind=kind) for kind in TYPES}
    bits = {kind: record["bits_per_weight"] for kind, record in records.items()}
    kl = {kind: record["proof"]["kl"] for kind, record in records.items()}
    assert bits["f16"] == pytest.approx(16, abs=0.1)
    assert bits["q4_K"] == pytest.approx(bits["q4_0"], abs=0.01)
    assert bits["q4_K"] < bits["q4_1"] < bits["q5_0"] < bits["q6_K"] < bits["q8_0"] < bits["f16"]
    assert kl["f32"] < kl["f16"] < kl["bf16"] < kl["q8_0"] < kl["q6_K"] < kl["q5_0"] < kl["q4_K"] < kl["q4_0"]
    assert records["q4_K"]["other_blocks"] == []


def test_rows_of_other_lengths_are_told(folder, tmp_path):
    record = export_gguf(folder, tmp_path / "m.gguf", kind="q4_K")
    assert record["other_blocks"] == [
        {"wanted": "Q4_K", "block": "IQ4_NL", "row": 64, "tensors": 12},
        {"wanted": "Q4_K", "block": "IQ4_NL", "row": 96, "tensors": 2},
        {"wanted": "Q6_K", "block": "Q8_0", "row": 64, "tensors": 1},
    ]


def broken_values(name, change):
    original = getattr(module, name)
    return name, lambda *args, **kwargs: change(original(*args, **kwargs))


def swapped(values):
    tokens = list(values["tokenizer.ggml.tokens"])
    tokens[-6], tokens[-7] = tokens[-7], tokens[-6]
    return values | {"tokenizer.ggml.tokens": tokens}


BROKEN = {
    "queries not reordered": (gguf_write, "paired", lambda rows, _: rows, "q_proj.* differs"),
    "bytes of another tensor": (
        gguf_write,
        "checked",
        lambda _, weight, block, _codes: (gguf_write.encoded(weight.flip(0), block)[0], weight),
        "embed_tokens.* differs",
    ),
    "another base of the frequencies": (
        module,
        *broken_values("model_values", lambda values: values | {"llama.rope.freq_base": 5e5}),
        "rope_theta",
    ),
    "another context": (
        module,
        *broken_values("model_values", lambda values: values | {"llama.context_length": 64}),
        "max_positions",
    ),
    "key missing": (
        module,
        *broken_values("model_values", lambda values: values | {"llama.block_count": 3}),
        r"blk\.2",
    ),
    "two tokens swapped": (module, *broken_values("tokenizer_values", swapped), "ids"),
    "no begin": (
        module,
        *broken_values("tokenizer_values", lambda values: values | {"tokenizer.ggml.bos_token_id": 5}),
        "bos_id",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_file_never_appears(case, folder, tmp_path, monkeypatch):
    place, name, broken, message = BROKEN[case]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.gguf").write_bytes(b"before")
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(ArtifactError, match=rf"was not written, verification failed: .*{message}"):
        export_gguf(folder, tmp_path / "out" / "m.gguf", kind="f16", force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.gguf"]
    assert (tmp_path / "out" / "m.gguf").read_bytes() == b"before"


def test_a_file_that_is_there_stays_unless_it_may_go(folder, tmp_path):
    out = tmp_path / "m.gguf"
    export_gguf(folder, out)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        export_gguf(folder, out)
    export_gguf(folder, out, force=True)
    assert out.read_bytes() == before


def test_the_name_is_the_models(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export_gguf(folder, None, kind="Q8_0")["path"] == "model-q8_0.gguf"
    (tmp_path / "latest").symlink_to(folder)
    with pytest.raises(OutputError, match=r"model-q8_0\.gguf"):
        export_gguf(tmp_path / "latest", None, kind="q8_0")


def test_what_is_not_exported_is_refused(models, tmp_path):
    out = tmp_path / "m.gguf"
    for name, message in (("encoder", "is an encoder"), ("bert", "WordPiece"), ("encoder_decoder", "encoder-dec")):
        with pytest.raises(ArtifactError, match=message):
            export_gguf(models[name], out)
    with pytest.raises(UsageError, match="q7_K"):
        export_gguf(models["decoder"], out, kind="q7_K")
    with pytest.raises(UsageError, match=r"X\.gguf"):
        export_gguf(models["decoder"], tmp_path / "m.safetensors")
    source = read_artifact(models["decoder"])
    bare = write_artifact(tmp_path / "bare", source.config, source.state(), files={}, provenance={})
    with pytest.raises(ArtifactError, match="no tokenizer"):
        export_gguf(bare, out)
    unigram = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=340, model_type="unigram"))
    other = write_artifact(tmp_path / "u", source.config, source.state(), files=unigram.files(), provenance={})
    with pytest.raises(ArtifactError, match="unigram"):
        export_gguf(other, out)
    assert not out.exists()


def test_a_char_tokenizer_is_one_too(tmp_path):
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(model_type="char"))
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE))
    initialize(model, 1)
    files = tokenizer.files()
    source = write_artifact(tmp_path / "m", model.config, model.state_dict(), files=files, provenance={})
    export_gguf(source, tmp_path / "m.gguf")
    back = load_tokenizer(import_model(tmp_path / "m.gguf", tmp_path / "back"))
    assert back.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_license_and_name_of_an_imported_file_stay(folder, tmp_path):
    artifact = read_artifact(folder)
    told = {"imported": {"general.name": "Cat", "general.license": "apache-2.0"}}
    named = write_artifact(tmp_path / "x", artifact.config, artifact.state(), files=artifact.files, provenance=told)
    export_gguf(named, tmp_path / "m.gguf")
    back = read_artifact(import_model(tmp_path / "m.gguf", tmp_path / "back"))
    assert back.provenance["imported"].items() >= told["imported"].items()


@pytest.mark.parametrize("name", ["my-phi3-student", "Phi-3 mini"])
def test_a_name_by_which_llama_cpp_takes_another_tokenizer_for_phi3s(name, tmp_path):
    source = model_in(tmp_path / name)
    export_gguf(source, tmp_path / "m.gguf")  # llama.cpp could not open it, where it is installed
    written = read_gguf_header(tmp_path / "m.gguf").metadata["general.name"]
    assert written == re.sub("(?i)phi-?3", "Phi 3", name)
    assert name_for(name, ["<unk>", "<s>", "</s>", "<|endoftext|>", "a"]) == name


def test_distance_is_the_textbooks():
    p_TV, q_TV = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    p, q = p_TV.softmax(-1), q_TV.softmax(-1)
    kl = sum(float(a * (a / b).log()) for row, other in zip(p, q, strict=True) for a, b in zip(row, other, strict=True))
    found, top1 = distance([p_TV[:2], p_TV[2:]], [q_TV[:2], q_TV[2:]])
    assert found == pytest.approx(kl / 5)
    assert top1 == (p_TV.argmax(-1) == q_TV.argmax(-1)).double().mean()
    assert distance([p_TV], [p_TV]) == (0.0, 1.0)


def test_every_known_pre_tokenizer_goes_round(tmp_path):
    for pre in PRE_TOKENIZERS:
        model = LanguageModel(ModelConfig(vocab_size=303, **SHAPE))
        initialize(model, 1)
        files = byte_level(pre)
        source = write_artifact(tmp_path / pre, model.config, model.state_dict(), files=files, provenance={})
        assert export_gguf(source, tmp_path / f"{pre}.gguf")["proof"]["texts_equal"] > 10
