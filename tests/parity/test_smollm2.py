"""SmolLM2-135M-Instruct from its 4-bit GGUF: logits, greedy text, and GGUF again; `test_evaluate.py` has its perplexity."""

import json

import numpy as np
import pytest
import torch

from llmctl.converting.convert import import_model
from llmctl.converting.export_gguf import export_gguf
from llmctl.data.conversations import Message
from llmctl.inference.chat_ids import encode_conversation, encode_prompt_chat, end_of_turn_ids
from llmctl.inference.chat_template import chat_template
from llmctl.tokenizer.load import load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")


@pytest.fixture(scope="module")
def folder(smollm2):
    return smollm2


@pytest.fixture(scope="module")
def model(folder, load):
    return load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(shared_data):
    where = shared_data / "models" / "smollm2-135m-instruct-q4_1"
    return json.loads((where / "reference.json").read_text()), np.load(where / "reference.npz")


@torch.no_grad()
def test_logits(model, reference, figure):
    _, arrays = reference
    worst = 0.0
    for index in range(4):
        logits_TV = model(torch.tensor(arrays[f"ids_{index}"]).long()[None])[0]
        top = torch.tensor(arrays[f"top20_ids_{index}"]).long()
        found = logits_TV.gather(1, top).numpy(), logits_TV.logsumexp(-1).numpy()
        expected = arrays[f"top20_logits_{index}"], arrays[f"logsumexp_{index}"]
        worst = max([worst, *(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))])
    figure("SmolLM2-135M-Instruct Q4_1", "max |logit difference|, top 20 and sum", f"{worst:.2e}")
    assert worst < 1e-3


def test_token_ids_and_greedy_text(model, tokenizer, reference, greedy, figure):
    rows = reference[0]["prompts"]
    equal = []
    for row in rows:
        if isinstance(row["input"], str):
            assert tokenizer.encode(row["input"]).ids == row["ids"]
        new = greedy(model, row["ids"], len(row["greedy_new_ids"]))
        equal.append(
            new == row["greedy_new_ids"] and tokenizer.decode(new, skip_special_tokens=False) == row["greedy_text"]
        )
    assert all(tokenizer.encode(row["text"]).ids == row["ids"] for row in reference[0]["tokenization"])
    figure("SmolLM2-135M-Instruct Q4_1", "greedy text equal", f"{sum(equal)} of {len(equal)}")
    assert all(equal)


def test_chat_ids(folder, reference, figure):
    own = load_tokenizer(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jinja")}
    template = chat_template(own, files, begins_with_bos=False)
    assert not template.is_plain
    for row in reference[0]["prompts"]:
        if isinstance(row["input"], list):
            messages = [Message(**message) for message in row["input"]]
            assert encode_prompt_chat(template, messages) == row["ids"]
            encoded = encode_conversation(template, [*messages, Message("assistant", row["greedy_text"])])
            n_prompt, n_new = len(row["ids"]), len(row["greedy_new_ids"])
            assert encoded.ids == [*row["ids"], *row["greedy_new_ids"], own.special_id("<|im_end|>"), *own.encode("\n")]
            assert encoded.is_trained == [False] * n_prompt + [True] * (n_new + 1) + [False]
    assert end_of_turn_ids(template) == {own.special_id("<|im_end|>")}
    figure("SmolLM2-135M-Instruct Q4_1", "ids of the reference chat equal", "yes")


@pytest.mark.parametrize(
    ("kind", "bits", "kl"),
    [
        ("q8_0", 8.51, 0.003),
        ("q4_1", 5.75, 1e-6),
        pytest.param("q4_K", 5.36, 0.15, marks=pytest.mark.slow),
        pytest.param("f16", 16.01, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_out_as_gguf_and_in_again(kind, bits, kl, folder, model, tmp_path, load, figure):
    pytest.importorskip("gguf", reason="pip install gguf")
    record = export_gguf(folder, tmp_path / "m.gguf", kind=kind)
    proof = record["proof"]
    back = import_model(tmp_path / "m.gguf", tmp_path / "back")
    ids = load_tokenizer(folder).encode("The capital of France is")
    with torch.no_grad():
        found, wanted = load(back)(torch.tensor([ids]))[0], model(torch.tensor([ids]))[0]
    figure(
        f"SmolLM2-135M-Instruct {kind} GGUF",
        "bits per weight, KL, top-1 agreement",
        f"{record['bits_per_weight']:.2f}, {proof['kl']:.2g}, {proof['top1']:.1%}",
    )
    assert load_tokenizer(back).encode("The capital of France is") == ids
    assert record["bits_per_weight"] < bits
    assert proof["kl"] < kl
    assert int(found[-1].argmax()) == int(wanted[-1].argmax())
    if kind == "q4_1":  # it came as Q4_1: the search finds the grid that its weights are on
        assert proof["logits_max_difference"] == 0
        assert torch.equal(found, wanted)
