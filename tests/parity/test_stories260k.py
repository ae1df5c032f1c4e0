"""stories260K, a trained Llama: logits and greedy text from the Hugging Face folder and from GGUF."""

import gzip
import json

import numpy as np
import pytest
import torch

from llmctl.converting.convert import import_model
from llmctl.inference.session import Session
from llmctl.model.cache import CACHES


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def reference(folder):
    return json.loads((folder / "reference.json").read_text())["prompts"], np.load(folder / "reference.npz")


def source(folder, kind, tmp_path):
    if kind == "hf":
        return folder / "hf"
    return import_model(folder / "gguf" / f"stories260K-{kind}.gguf", tmp_path / kind)


def largest_difference(model, arrays) -> float:
    differences = []
    for index in range(4):
        with torch.no_grad():
            logits_TV = model(torch.tensor(arrays[f"ids_{index}"])[None])[0].numpy()
        differences.append(np.abs(logits_TV - arrays[f"logits_{index}"]).max())
    return float(max(differences))


@pytest.mark.parametrize("kind", ["hf", "f32"])
def test_logits_and_greedy_text(kind, folder, reference, tmp_path, load, greedy, figure):
    prompts, arrays = reference
    model = load(source(folder, kind, tmp_path))
    difference = largest_difference(model, arrays)
    equal = [greedy(model, row["ids"], len(row["greedy_new_ids"])) == row["greedy_new_ids"] for row in prompts]
    figure(f"stories260K ({kind})", "max |logit difference|", f"{difference:.2e}")
    figure(f"stories260K ({kind})", "greedy text equal", f"{sum(equal)} of {len(equal)}")
    assert difference < 1e-4
    assert all(equal)


@torch.inference_mode()
def test_keys_and_values_in_eight_bits(folder, reference, load, figure):
    model, nats, n_equal, n_tokens = load(folder / "hf"), dict.fromkeys(CACHES, 0.0), 0, 0
    for row in reference[0]:
        sessions = {kv: Session(model, [row["ids"]], 220, kv=kv) for kv in CACHES}
        logits = {kv: session.begin()[0] for kv, session in sessions.items()}
        for token in row["greedy_new_ids"]:
            best = logits["float"].topk(2)
            is_equal = int(logits["int8"].argmax()) == int(best.indices[0])
            assert is_equal or float(best.values[0] - best.values[1]) < 0.25
            n_equal, n_tokens = n_equal + is_equal, n_tokens + 1
            for kv, session in sessions.items():
                nats[kv] -= float(logits[kv].log_softmax(0)[token])
                logits[kv] = session.step(torch.tensor([token]))[0]
    figure("stories260K (--kv int8)", "top-1 agreement", f"{n_equal} of {n_tokens}")
    figure("stories260K (--kv int8)", "nats more a token", f"{(nats['int8'] - nats['float']) / n_tokens:.4f}")
    assert n_equal > 0.95 * n_tokens
    assert abs(nats["int8"] - nats["float"]) < 0.005 * n_tokens


@pytest.mark.parametrize(("kind", "bound"), [("q8_0", 0.3), ("q4_1", 3.5)])
def test_quantized_files_load_and_stay_near(kind, bound, folder, reference, tmp_path, load, figure):
    difference = largest_difference(load(source(folder, kind, tmp_path)), reference[1])
    figure(f"stories260K ({kind})", "max |logit difference|", f"{difference:.2f}")
    assert 0.01 < difference < bound


def test_loss_on_the_first_50_stories(folder, load, figure, shared_data):
    sentencepiece = pytest.importorskip("sentencepiece")
    expected = json.loads((folder / "reference.json").read_text())["first_50_stories"]
    with gzip.open(shared_data / "tinystories-1k" / "tinystories_1000.json.gz", "rt", encoding="utf-8") as file:
        stories = json.load(file)[:50]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "hf" / "tokenizer.model"))
    model, n_targets, total = load(folder / "hf"), 0, 0.0
    for story, (n_expected, _) in zip(stories, expected["rows"], strict=True):
        ids = torch.tensor([[1, *pieces.encode(story)][: model.config.max_positions]])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum")
        assert ids.shape[1] - 1 == n_expected
        n_targets, total = n_targets + n_expected, total + float(losses)
    figure("stories260K (hf)", "loss on 50 stories (reference 1.3180)", f"{total / n_targets:.4f}")
    assert total / n_targets == pytest.approx(expected["mean"], abs=1e-4)
