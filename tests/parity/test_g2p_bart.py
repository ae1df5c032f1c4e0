"""g2p-bart-us, a trained BART that spells out American pronunciation: states, logits, and 300 words decoded."""

import json

import numpy as np
import pytest
import torch

from llmctl.model.cache import KVCache


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "models" / "g2p-bart-us"


@pytest.fixture(scope="module")
def model(folder, load):
    return load(folder)


@torch.no_grad()
def test_encoder_states_and_logits(model, folder, figure):
    arrays, worst = np.load(folder / "reference.npz"), {"encoder states": 0.0, "logits": 0.0}
    for index in range(4):
        ids, targets = (
            torch.tensor(arrays[f"{name}_{index}"]).long()[None] for name in ("input_ids", "decoder_input_ids")
        )
        memory = model.encode(ids)
        logits = model.head(model.decode(targets, memory))
        for name, tensor, expected in (
            ("encoder states", memory, arrays[f"encoder_last_hidden_{index}"]),
            ("logits", logits, arrays[f"logits_{index}"]),
        ):
            worst[name] = max(worst[name], float(np.abs(tensor[0].numpy() - expected).max()))
    for name, difference in worst.items():
        figure("g2p-bart-us", f"max |difference|, {name}", f"{difference:.2e}")
        assert difference < 1e-4, name


@torch.no_grad()
def pronounce(model, hf, word: str) -> tuple[list[int], str]:
    """Decode one word as the reference did: from token 1, the argmax, until token 2 or 64 tokens."""
    letters = hf["grapheme_chars"]
    ids = [1, *(letters.index(letter) if letter in letters else 3 for letter in word), 2]
    memory, cache, out = model.encode(torch.tensor([ids])), KVCache(model.config, 1, 64), [1]
    while out[-1] != 2 and len(out) < 64:
        hidden = model.decode(torch.tensor([out[-1:]]), memory, cache=cache)
        out.append(int(model.head(hidden)[0, -1].argmax()))
    return out, "".join(hf["phoneme_chars"][token] for token in out if token > 3)


def edits(a: str, b: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def test_300_words_are_pronounced_as_by_the_reference(model, folder, figure):
    hf, reference = (json.loads((folder / name).read_text()) for name in ("config.json", "reference.json"))
    for row in reference["probe"]:
        assert pronounce(model, hf, row["word"]) == (row["greedy_ids"], row["text"])
    sample = reference["gold_sample"]
    said = [pronounce(model, hf, word)[1] for word, _, _ in sample["rows"]]
    n_same = sum(text == expected for text, (_, _, expected) in zip(said, sample["rows"], strict=True))
    n_exact = sum(text == gold for text, (_, gold, _) in zip(said, sample["rows"], strict=True))
    n_edits = sum(edits(text, gold) for text, (_, gold, _) in zip(said, sample["rows"], strict=True))
    error_rate = n_edits / sum(len(gold) for _, gold, _ in sample["rows"])
    figure("g2p-bart-us", "greedy text equal", f"{n_same} of 300")
    figure("g2p-bart-us", "phoneme error rate, exact words", f"{error_rate:.1%}, {n_exact / 300:.1%}")
    assert n_same == 300
    assert error_rate == pytest.approx(sample["phoneme_error_rate"], abs=1e-9)
    assert n_exact / 300 == pytest.approx(sample["exact"], abs=1e-9)
