"""Our figures against transformers' loss and lm-evaluation-harness, on model folders as they stand."""

import json
import math
import subprocess
import sys

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import EvaluateConfig, ModelConfig, TokenizerConfig
from llmctl.data.examples import read_examples
from llmctl.evaluating.choices import evaluate_choice
from llmctl.evaluating.text import evaluate_text
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = pytest.mark.interop
TEXT = "a list of strings 中文，诗。 returns the strings of a list\n" * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a model folder that transformers reads."""
    tokenizer = train_tokenizer([TEXT], TokenizerConfig(vocab_size=340))
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_positions": 512, "init_std": 0.3}
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **shape, **ids))
    initialize(model, 0)
    path = tmp_path_factory.mktemp("evaluate") / "model"
    return write_artifact(path, model.config, model.state_dict(), files=tokenizer.files(), provenance={})


@pytest.mark.parametrize("stride", [64, 20])
def test_the_loss_of_windows_is_transformers(folder, stride: int):
    loaded = load_model(folder, device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT)["input_ids"]
    if ids[0] != tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
    nats, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + 64, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, : max(done - begin, 0)] = -100
        with torch.no_grad():
            loss = float(model(input_ids=window, labels=labels).loss)
        n_counted = int((labels[:, 1:] != -100).sum())
        nats, count, done = nats + loss * n_counted, count + n_counted, end
        if end == len(ids):
            break
    figures = evaluate_text(loaded, [TEXT], EvaluateConfig(seq_len=64, stride=stride)).figures
    assert figures["n_labels"] == count
    assert figures["loss"] == pytest.approx(nats / count, rel=1e-5)


def test_bits_per_byte_are_those_of_the_harness(folder):
    pytest.importorskip("lm_eval", reason="pip install '.[bench]'")
    script = (
        "import json, sys\n"
        "from lm_eval.api.instance import Instance\n"
        "from lm_eval.models.huggingface import HFLM\n"
        "model = HFLM(pretrained=sys.argv[1], device='cpu', dtype='float32', batch_size=1)\n"
        "request = Instance('loglikelihood_rolling', {}, (sys.stdin.read(),), 0)\n"
        "print(json.dumps([model.loglikelihood_rolling([request], disable_tqdm=True)[0], model.max_length]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], input=TEXT.encode(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    log_likelihood, max_length = json.loads(done.stdout.splitlines()[-1])
    assert max_length == 512
    loaded = load_model(folder, device="cpu")
    assert len(loaded.tokenizer.encode(TEXT)) < max_length, "one window: both predict every byte after the begin token"
    figures = evaluate_text(loaded, [TEXT], EvaluateConfig()).figures
    assert figures["n_bytes"] == len(TEXT.encode())
    expected = -log_likelihood / math.log(2) / len(TEXT.encode())
    assert figures["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_tasks_of_the_harness_agree_with_ours(folder, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install '.[bench]'")
    pytest.importorskip("datasets", reason="pip install '.[bench]'")
    words = ["list", "strings", "returns", "of a list", "the strings of"]
    rows = [
        {"goal": f"a {words[n % 5]}", "sol1": words[n % 3], "sol2": words[(n + 2) % 5], "label": n % 2}
        for n in range(20)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        "task: own_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {{validation: {data}}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "Question: {{goal}}\\nAnswer:"\ndoc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    command = [sys.executable, "-P", "-m", "llmctl", "evaluate", str(folder), "--tasks", str(tmp_path / "own.yaml")]
    import os

    environment = os.environ | {"HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, "--json", "-q"], capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)["models"][0]["tasks"]["own_choice"]
    examples = list(read_examples([str(data)], "choice", EvaluateConfig().columns))
    figures = evaluate_choice(load_model(folder, device="cpu"), examples, EvaluateConfig()).figures
    assert found == {"acc": figures["accuracy"], "acc_norm": figures["accuracy_norm"]}
