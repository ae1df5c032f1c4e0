"""The folder of every command's model as it stands in transformers: equal ids, logits and greedy text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.load import Loaded, load_model
from llmctl.cli import run
from llmctl.config import GenerateConfig
from llmctl.data.conversations import Message
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.inference.chat_ids import encode_prompt_chat
from llmctl.inference.chat_template import template_of
from llmctl.inference.encoding import encode_prompt, encode_rows
from llmctl.inference.generate import Prompt, end_ids, generate
from llmctl.model.transformer import LanguageModel, initialize
from tests.support.bpe import byte_level
from tests.support.tuning import SMALL

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = pytest.mark.interop

TEXTS = ["the good cat", " what is the number 7?", "猫坐在垫子上。\n", "a"]
PAIRS = [("the cat", "a bad mat"), ("猫", "number")]
SETTINGS = [part for setting in SMALL if "adapter" not in setting for part in ("--set", setting)]
MAKE = {
    "pretrained": [],
    "chat": ["finetune", "{model}", "chats.jsonl", "--task", "chat"],
    "classify": ["finetune", "{model}", "classes.jsonl", "--task", "classify"],
    "seq2seq": ["finetune", "{model}", "pairs.tsv", "--task", "translate"],
    "distilled": ["distill", "{model}", "-d", "texts.txt", "--student", "layers=1"],
    "quantized": ["quantize", "{model}", "-d", "texts.txt"],
}
CASES = [
    *[("pretrained", name) for name in ("decoder", "encoder", "bert", "encoder_decoder")],
    *[("classify", name) for name in ("decoder", "encoder", "bert", "encoder_decoder")],
    ("chat", "decoder"),
    ("seq2seq", "encoder_decoder"),
    *[("distilled", name) for name in ("decoder", "encoder", "encoder_decoder")],
    ("quantized", "decoder"),
]


def write_data() -> None:
    turns = [
        {"role": "user", "content": "what is the number 7?"},
        {"role": "assistant", "content": "the cat"},
    ]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(20)))
    Path("classes.jsonl").write_text(
        "".join(json.dumps({"text": f"cat {n} is {w}", "label": w}) + "\n" for n in range(10) for w in ("good", "bad"))
    )
    Path("pairs.tsv").write_text("".join(f"the cat {n}\tmat {n}\n" for n in range(20)))
    Path("texts.txt").write_text("".join(f"the good cat {n} sat on a bad mat.\n\n" for n in range(60)))


def made(case: str, model: Path) -> Path:
    """Return the folder that a command writes for a model."""
    if not MAKE[case]:
        return model
    write_data()
    line = [part.format(model=model) for part in MAKE[case]]
    settings = ["--set", "train.seq_len=64"] if case == "quantized" else ["--steps", "2", *SETTINGS]
    assert run([*line, *settings, "-o", "out", "-q"]) == 0
    return Path("out")


@pytest.mark.parametrize(("case", "family"), CASES)
def test_ids_and_outputs_are_those_of_transformers(case, family, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = made(case, teachers[family])
    ours, tokenizer = load_model(folder, device="cpu"), transformers.AutoTokenizer.from_pretrained(folder)
    kind = ours.model.config.family
    for text in TEXTS:
        expected = encode_rows(ours, [(text,)], 64)[0].ids if kind == "encoder" else encode_prompt(ours, text)
        assert tokenizer(text).input_ids == expected
    for pair in PAIRS if kind != "decoder" else []:
        assert tokenizer(*pair).input_ids == encode_rows(ours, [pair], 64)[0].ids
    if case == "quantized":  # its weights are for compressed-tensors, see test_quantized.py
        return
    if ours.model.config.n_labels:
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        rows = encode_rows(ours, [(text,) for text in TEXTS], 64)
        for text, row in zip(TEXTS, rows, strict=True):
            found = theirs(**tokenizer(text, return_tensors="pt")).logits
            assert torch.allclose(found, ours.model.classify(torch.tensor([row.ids])), atol=1e-4)
    elif kind == "encoder":
        theirs = (transformers.AutoModel if family == "bert" else transformers.AutoModelForMaskedLM).from_pretrained(
            folder
        )
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            found = theirs.eval()(ids)[0]
            expected = ours.model.hidden(ids) if family == "bert" else ours.model(ids)
            assert torch.allclose(found, expected, atol=1e-4)
    else:
        check_greedy(ours, folder, [encode_prompt(ours, text) for text in TEXTS])


def check_greedy(ours: Loaded, folder: Path, prompts: list[list[int]]) -> None:
    kind = "CausalLM" if ours.model.config.family == "decoder" else "Seq2SeqLM"
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    settings = GenerateConfig(max_tokens=8, temperature=0.0)
    found = generate(ours, [Prompt(n, ids, "") for n, ids in enumerate(prompts)], settings)
    ends = end_ids(ours)
    for ids, completion in zip(prompts, found, strict=True):
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, num_beams=1)[0].tolist()
        out = out[len(ids) :] if kind == "CausalLM" else out[1:]
        assert out == [*completion.ids, *out[len(completion.ids) :]]
        assert not set(out[: len(completion.ids)]) & ends
        assert completion.finish != "eos" or out[len(completion.ids)] in ends


@pytest.mark.parametrize("beams", [1, 3])
def test_a_forced_first_token_comes_first(beams, teachers, tmp_path):
    source = read_artifact(teachers["encoder_decoder"])
    settings = json.loads(source.files["generation_config.json"]) | {"forced_bos_token_id": 17}
    files = source.files | {"generation_config.json": json.dumps(settings).encode()}
    folder = write_artifact(tmp_path / "m", source.config, source.state(), files=files, provenance={})
    ours = load_model(folder, device="cpu")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    ids = encode_prompt(ours, "the good cat")
    config = GenerateConfig(max_tokens=6, temperature=0.0, beams=beams)
    (completion,) = generate(ours, [Prompt(0, ids, "")], config)
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, num_beams=beams)[0].tolist()
    assert completion.ids[0] == 17
    assert out[1 : 1 + len(completion.ids)] == completion.ids


def test_a_classifier_takes_batches_there(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = read_artifact(teachers["decoder"])
    config = {"bos_token": "<|end|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = byte_level("smollm") | {"tokenizer_config.json": json.dumps(config).encode()}
    shape = replace(source.config, vocab_size=304, bos_id=0, eos_id=0, pad_id=-1)
    model = LanguageModel(shape)
    initialize(model, 1)
    base = write_artifact(tmp_path / "base", shape, model.state_dict(), files=files, provenance={})
    folder = made("classify", base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["the cat", "the cat sat on the mat"]
    found = theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    ours = load_model(folder, device="cpu")
    for logits, row in zip(found, encode_rows(ours, [(text,) for text in texts], 64), strict=True):
        assert torch.allclose(logits, ours.model.classify(torch.tensor([row.ids]))[0], atol=1e-4)


def test_a_chat_ends_its_turns_there_too(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = made("chat", teachers["decoder"])
    ours, tokenizer = load_model(folder, device="cpu"), transformers.AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "what is the number 7?"}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True).input_ids
    assert rendered == encode_prompt_chat(template_of(ours), [Message("user", turns[0]["content"])])
    listed = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(listed if isinstance(listed, list) else [listed]) == end_ids(ours)
    check_greedy(ours, folder, [rendered])


@pytest.mark.parametrize("case", ["pretrained", "chat"])
def test_llama_cpp_begins_and_ends_texts_alike(case, teachers, tmp_path, monkeypatch):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    pytest.importorskip("gguf", reason="pip install gguf")
    monkeypatch.chdir(tmp_path)
    folder = made(case, teachers["decoder"])
    assert run(["export", str(folder), "--to", "gguf", "--type", "f32", "-o", "m.gguf", "-q"]) == 0
    ours = load_model(folder, device="cpu")
    llama = llama_cpp.Llama("m.gguf", n_ctx=64, n_gpu_layers=0, verbose=False)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == encode_prompt(ours, text)
    ends = {index for index in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(llama._model.vocab, index)}
    assert end_ids(ours) <= ends
    llama.close()
