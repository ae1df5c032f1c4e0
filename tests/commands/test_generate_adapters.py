"""Adapters in a shell: `--adapter`, an adapter in the place of a model, and what is said when one does not fit."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.adapters import save_adapter
from llmctl.artifacts.load import load_model
from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.lora import adapter_state, add_adapters
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with a decoder and an encoder of random weights and adapters of them, DoRA for the encoder."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a list of strings 中文，诗。\n\n"] * 20, TokenizerConfig(vocab_size=330))
    for number, family in enumerate(("decoder", "encoder")):
        mask_id = tokenizer.mask_id if family == "encoder" else None
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, max_positions=40, init_std=0.4,
            family=family, bos_id=2, eos_id=3, mask_id=-1 if mask_id is None else mask_id,
        )  # fmt: skip
        model = LanguageModel(config)
        initialize(model, number)
        base = write_artifact(folder / family, model.config, model.state_dict(), files=tokenizer.files(), provenance={})
        for name, seed in (("one", 1), ("two", 2)):
            loaded = load_model(base)
            add_adapters(loaded.model, rank=2, alpha=4, targets=("q_proj", "down_proj"), dora=family == "encoder")
            generator = torch.Generator().manual_seed(seed)
            for tensor in adapter_state(loaded.model).values():
                tensor.add_(torch.randn(tensor.shape, generator=generator))
            provenance = {"recipe": "猫"}
            save_adapter(loaded.model, folder / f"{family}-{name}", base=loaded.artifact, provenance=provenance)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(shell):
    """Return a caller of the command line: (exit code, stdout, stderr)."""
    return shell


def test_generate_with_an_adapter_is_generate_with_the_merged_model(call, models, tmp_path):
    base, adapter = models / "decoder", models / "decoder-one"
    options = ["-n", "12", "-t", "0", "-q"]
    _, plain, _ = call("generate", "a list", "-m", base, *options)
    status, adapted, err = call("generate", "a list", "-m", base, "--adapter", adapter, *options)
    assert (status, err) == (0, "")
    assert adapted != plain
    assert call("export", adapter, "--to", "single", "-o", "m.safetensors", "--json")[0] == 0
    for named in (
        ["--adapter", adapter],
        ["-m", adapter],
        ["-m", "m.safetensors"],
        ["-m", base, "--adapter", f"{adapter}=1"],
    ):
        assert call("generate", "a list", *named, *options) == (0, adapted, "")
    assert call("generate", "a list", "-m", base, "--adapter", f"{adapter}=0", *options)[1] == plain
    both = ["--adapter", f"{adapter}=2", "--adapter", models / "decoder-two"]
    assert call("generate", "a list", "-m", base, *both, *options)[1] not in (plain, adapted)
    assert call("generate", "-", *both, *options, stdin="a list\n诗\n".encode())[1].count("\n") == 2


def test_what_is_used_is_said(call, models):
    status, _, err = call("generate", "a", "--adapter", models / "decoder-one", "-n", "1")
    assert status == 0
    assert err.startswith(f"model: {models / 'decoder'} (")
    _, _, err = call("generate", "a", "-m", models / "decoder-one", "-n", "1")
    assert err.startswith(f"model: {models / 'decoder-one'} (named, an adapter for `")


def test_fill_with_an_adapter(call, models):
    text = ["fill", "a <mask> of strings", "-q"]
    _, plain, _ = call(*text, "-m", models / "encoder")
    status, adapted, err = call(*text, "-m", models / "encoder", "--adapter", models / "encoder-one")
    assert (status, err) == (0, "")
    assert adapted != plain
    assert call(*text, "-m", models / "encoder-one")[1] == adapted


def test_inspect_says_what_an_adapter_is(call, models):
    status, out, _ = call("inspect", models / "encoder-one", "--tensors")
    assert status == 0
    for fact in (
        "format        PEFT adapter",
        "adapter       DoRA, rank 2",
        "alpha         4",
        "targets       down_proj, q_proj",
        "layers        2",
        f"base          {models / 'encoder'}",
        "provenance:   recipe = 猫",
        "  base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  F32 [2, 16]",
    ):
        assert fact in out, out
    _, out, _ = call("inspect", models / "encoder-one" / "adapter_model.safetensors", "--json", "--tensors")
    record = json.loads(out)
    assert record["config"]["peft_type"] == "LORA"
    assert record["parameters"] == sum(math.prod(shape) for _, shape in record["tensors"].values()) > 0
    code = "import sys; from llmctl.cli import run; code = run(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    command = [sys.executable, "-P", "-c", code, "inspect", str(models / "encoder-one")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_use_takes_an_adapter(call, models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert call("use", models / "decoder-one")[0] == 0
    assert call("generate", "a", "-n", "1", "-q")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["-m", "decoder", "--adapter", "nowhere"], 3, "nowhere`"),
        (["-m", "decoder", "--adapter", "decoder"], 2, "is not an adapter folder"),
        (["-m", "decoder", "--adapter", "decoder-one=x"], 2, "the weight `x` is not a finite number"),
        (["-m", "decoder", "--adapter", ""], 2, "empty"),
        (["-m", "decoder", "--adapter", "encoder-one"], 4, "trained on weights other"),
        (["--adapter", "encoder-one"], 2, "cannot generate"),
        (["-m", "encoder-one"], 2, "cannot generate"),
    ],
)
def test_mistakes_are_answered(call, models, arguments, status, part, monkeypatch):
    monkeypatch.chdir(models)
    got, out, err = call("generate", "a", *arguments)
    assert (got, out) == (status, ""), err
    assert part in err
    assert "hint: " in err
    assert "Traceback" not in err


def test_a_base_that_is_gone_is_named(call, models, tmp_path):
    values = json.loads((models / "decoder-one" / "adapter_config.json").read_text())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "org/model"}))
    weights = (models / "decoder-one" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(weights)
    for arguments in (["-m", "a"], ["--adapter", "a"]):
        status, _, err = call("generate", "a", *arguments)
        assert status == 3
        assert "`org/model`, the base of the adapter `a`, does not exist" in err
        assert "hint: pass the base: -m BASE --adapter a" in err
    assert call("generate", "a", "-m", models / "decoder", "--adapter", "a", "-n", "1")[0] == 0
    assert call("inspect", "a")[0] == 0
