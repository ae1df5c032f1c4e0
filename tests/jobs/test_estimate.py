"""A dry run's figures against what a real step does, and against the published ones."""

import gc
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from llmctl.cli import run
from llmctl.config import ModelChoice, ModelConfig, OptimConfig, PretrainConfig, TrainConfig
from llmctl.errors import UsageError
from llmctl.jobs.dry_run import dry_run
from llmctl.jobs.estimate import duration, size
from llmctl.model.flops import Rows, flops_per_token, keys_seen, row_flops
from llmctl.model.parameters import count_parameters
from llmctl.model.presets import preset_config
from llmctl.model.training_memory import Memory, activation_bytes, memory
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tables.objectives import OBJECTIVES
from llmctl.training.objectives import LabelPrediction
from llmctl.training.optim import make_optimizers, named_state

VOCABULARY = 512
N_ROWS = 3
SMALL = {"vocab_size": VOCABULARY, "d_model": 128, "n_layers": 3, "n_heads": 4, "d_ff": 320}


def small(preset: str, family=None, **fields) -> ModelConfig:
    return ModelConfig(**(vars(preset_config(preset, family)) | SMALL | fields))


SHAPES = {
    "decoder": small("tiny", "decoder"),
    "decoder, grouped": small("tiny", "decoder", n_kv_heads=1),
    "decoder, qk-norm": small("tiny", "decoder", qk_norm=True, n_kv_heads=2, head_dim=40),
    "encoder": small("tiny", "encoder"),
    "encoder-decoder": small("tiny", "encoder_decoder"),
    "gpt2": small("gpt2"),
    "pangu-alpha": small("pangu-alpha-2.6b"),
    "bert": small("bert-base"),
    "transformer": small("transformer-base"),
    "bart": small("bart-base"),
}


def saved_bytes(model: LanguageModel, inputs: dict[str, torch.Tensor], *, bfloat16: bool) -> int:
    """Return the bytes that autograd keeps for the backward pass, every storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16),
    ):
        hidden = model.hidden(**inputs)
    del hidden
    return sum(kept.values())


def random_inputs(config: ModelConfig, rows: Rows, n_rows: int = N_ROWS) -> dict[str, torch.Tensor]:
    """Return ids of both sides, and two documents per row if packed."""
    sides = {"": rows.source} | ({"decoder_": rows.target} if rows.target else {})
    inputs = {f"{side}input_ids_BT": torch.randint(0, config.vocab_size, (n_rows, n)) for side, n in sides.items()}
    if rows.packed:
        for side, n in sides.items():
            inputs[f"{side}documents_BT"] = 1 + (torch.arange(n) > n // 2).long().expand(n_rows, n)
    return inputs


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_keeps(name: str, bfloat16: bool, packed: bool):
    config = SHAPES[name]
    rows = Rows(N_ROWS, 96, 40 if config.family == "encoder_decoder" else 0, packed=packed)
    model = LanguageModel(config)
    measured = saved_bytes(model, random_inputs(config, rows), bfloat16=bfloat16)
    if bfloat16:  # autograd also keeps the converted weights, which are the estimate's `copies`
        measured -= 2 * count_parameters(config).matrices
    assert activation_bytes(config, rows, N_ROWS, 2 if bfloat16 else 4) == pytest.approx(measured, rel=0.06)


def peak_bytes(config: ModelConfig, rows: Rows, micro: int, optimizer: str) -> int:
    """Return the most memory that building a model and two real optimizer steps hold at once."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = LanguageModel(config)
        initialize(model, 0)
        objective = LabelPrediction(model, torch.zeros(config.vocab_size, dtype=torch.int32), 2048)
        optimizers = make_optimizers(model, OptimConfig(name=optimizer)).values()  # type: ignore[arg-type]
        for _ in range(2):
            for _ in range(rows.batch_size // micro):
                inputs = random_inputs(config, rows, micro)
                labels = inputs.get("decoder_input_ids_BT", inputs["input_ids_BT"])
                objective({**inputs, "labels": labels}).sum.backward()
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)
    return highest(profiler)


def highest(profiler: profile) -> int:
    """Read the highest level of allocated memory out of a trace; the counter goes on from earlier traces."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    levels = [event["args"]["Total Allocated"] for event in events]
    return max(levels) - levels[0]


@pytest.mark.parametrize(
    ("preset", "family", "rows", "micro", "optimizer"),
    [
        ("mini", "decoder", Rows(3, 192), 3, "muon"),
        ("mini", "encoder", Rows(3, 192), 1, "adamw"),
        ("mini", "encoder_decoder", Rows(2, 96, 64), 1, "muon"),
        ("tiny", "decoder", Rows(8, 256), 8, "muon"),
    ],
)
def test_memory_is_what_a_real_step_holds(preset: str, family: str, rows: Rows, micro: int, optimizer: str):
    config = ModelConfig(**(vars(preset_config(preset, family)) | {"vocab_size": 2048}))  # type: ignore[arg-type]
    kind = {"chunk_tokens": 2048, "optimizer": optimizer, "product_bytes": 4, "n_devices": 1}
    part = memory(config, rows, micro_batch_size=micro, **kind)
    assert part.peak == pytest.approx(peak_bytes(config, rows, micro, optimizer), rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["decoder", "encoder-decoder", "bert", "pangu-alpha"])
def test_states_are_counted_exactly(name: str, optimizer: str):
    config = SHAPES[name]
    model = LanguageModel(config)
    optimizers = make_optimizers(model, OptimConfig(name=optimizer))  # type: ignore[arg-type]
    rows = Rows(N_ROWS, 8, 8 if config.family == "encoder_decoder" else 0)
    model(**random_inputs(config, rows)).logsumexp(-1).sum().backward()
    for each in optimizers.values():
        each.step()
    kind = {"chunk_tokens": 2048, "optimizer": optimizer, "product_bytes": 4}
    part = memory(config, rows, micro_batch_size=0, n_devices=1, **kind)
    states = sum(t.nbytes for key, t in named_state(model, optimizers) if not key.endswith("/step"))
    assert part.optimizer == states
    assert part.weights == part.gradients == sum(p.nbytes for p in model.parameters())
    shared = memory(config, rows, micro_batch_size=0, n_devices=8, **kind)
    assert 0 <= 8 * shared.optimizer - part.optimizer < 8


@pytest.mark.parametrize("name", SHAPES)
def test_flops_of_the_products_are_exact(name: str):
    config = SHAPES[name]
    is_pair = config.family == "encoder_decoder"
    rows = Rows(N_ROWS, 24, 16 if is_pair else 0)
    model = LanguageModel(config)
    objective = LabelPrediction(model, torch.zeros(VOCABULARY, dtype=torch.int32), 2048)
    inputs = random_inputs(config, rows)
    labels = inputs.get("decoder_input_ids_BT", inputs["input_ids_BT"])
    with FlopCounterMode(display=False) as counter:
        objective({**inputs, "labels": labels}).sum.backward()
    by_kind = {str(kind): n for kind, n in counter.get_flop_counts()["Global"].items()}
    counted = sum(n for kind, n in by_kind.items() if kind in ("aten.mm", "aten.addmm"))
    counted += 2 * labels.numel() * config.d_model * VOCABULARY  # the head's gradient: `addmm_` is not in its list
    width = 12 * model.config.n_heads * model.config.head_dim
    n_layers = config.n_layers + config.query_layer
    looks_back = 24 * (24 + 1) / 2 if config.family == "decoder" else 24 * 24
    scores = n_layers * width * looks_back
    if is_pair:
        scores += model.config.n_decoder_layers * width * (16 * (16 + 1) / 2 + 24 * 16)
    assert row_flops(config, rows.source, rows.target) - scores == pytest.approx(counted / N_ROWS, rel=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 5, 11, 50])
def test_keys_seen_are_counted_by_a_loop(window: int, causal: bool):
    pairs = itertools.product(range(11), range(11))
    seen = [(not window or abs(t - s) < window) and (s <= t or not causal) for t, s in pairs]
    wanted = sum(seen) / 11
    if window <= 6:  # a band reaching over both ends of a short row is taken as unclipped on one side
        assert keys_seen(11, window, causal=causal) == pytest.approx(wanted)
    else:
        assert keys_seen(11, window, causal=causal) == keys_seen(11, 0, causal=causal) == pytest.approx(wanted, rel=0.1)


def test_predicting_fewer_positions_costs_less_in_the_head_only():
    config = SHAPES["encoder"]
    difference = row_flops(config, 64) - row_flops(config, 64, label_frac=0.25)
    assert difference == pytest.approx(6 * 128 * VOCABULARY * 48)


def test_flops_per_token_of_pairs_is_per_token_of_either_side():
    config = SHAPES["encoder-decoder"]
    assert flops_per_token(config, 32) == row_flops(config, 32, 32) / 64
    assert flops_per_token(SHAPES["gpt2"], 32) == row_flops(SHAPES["gpt2"], 32) / 32


@pytest.mark.parametrize(
    ("preset", "parameters", "flops"),
    [
        ("gpt3-small", 125e6, 2.25e20),
        ("gpt3-xl", 1.3e9, 2.38e21),
        ("gpt3-13b", 13e9, 2.31e22),
        ("gpt3-175b", 175e9, 3.14e23),
    ],
)
def test_gpt3_compute_is_the_published(preset: str, parameters: float, flops: float):
    # Brown et al. 2020, arXiv:2005.14165, table D.1; the paper leaves the attention scores out.
    answer = dry_run(PretrainConfig(model=ModelChoice(preset)))
    assert answer.parameters.total == pytest.approx(parameters, rel=0.03)
    assert answer.flops == pytest.approx(flops, rel=0.2 if preset == "gpt3-small" else 0.12)
    assert answer.tokens == pytest.approx(300e9, rel=1e-6)
    assert answer.rows.source == 2048


def test_devices_share_what_can_be_shared():
    answer = dry_run(PretrainConfig(model=ModelChoice("gpt3-small")))
    peaks = [part.peak for part in answer.memory.values()]
    assert peaks == sorted(peaks, reverse=True)
    eight, many = answer.memory[8], answer.memory[1024]
    assert eight.weights == pytest.approx(answer.parameters.total * 4 / 8, abs=1)
    assert eight.activations == many.activations, "one row is the least a device works on"
    assert eight.copies == many.copies > 0, "a sharded block is gathered whole"


def test_gradients_add_to_the_peak_only_when_they_accumulate():
    whole = Memory(100, 100, 200, 0, 500, 50, accumulates=False)
    assert whole.peak == 100 + 200 + 500 + 50
    assert Memory(**(vars(whole) | {"accumulates": True})).peak == whole.peak + 100
    assert Memory(**(vars(whole) | {"activations": 10, "logits": 10})).peak == 100 + 200 + 100


def test_micro_batches_are_those_of_one_process():
    train = TrainConfig(batch_size=64, micro_batch_size=4, seq_len=128)
    memories = dry_run(PretrainConfig(train=train)).memory
    assert memories[1].activations == memories[8].activations == 4 * memories[64].activations
    assert memories[1].accumulates
    assert not memories[64].accumulates


def plan(objective: str = "clm", preset: str = "auto", overrides=None, **train):
    choice = ModelChoice(preset, overrides or {})
    return dry_run(PretrainConfig(objective=objective, model=choice, train=TrainConfig(**train)))  # type: ignore[arg-type]


def test_budget_is_the_first_that_is_named():
    assert plan(steps=7).steps == 7
    assert plan(tokens=10_000, batch_size=2, seq_len=100).steps == 50
    assert plan(steps=7, tokens=10_000).steps == 7, "as in training"
    assert plan(preset="gpt3-small", steps=7).steps == 7
    assert plan(preset="gpt2").steps == OBJECTIVES["clm"].default_steps, "no published number of tokens"
    assert plan("mlm").steps == OBJECTIVES["mlm"].default_steps
    short, long = plan(minutes=0.001).steps, plan(minutes=1).steps
    assert 1 <= short < long
    assert plan(minutes=60, steps=7).steps == 7
    assert plan(preset="gpt3-175b", minutes=0.001).steps == 1


def test_minutes_are_divided_by_a_measured_step_of_a_small_model(monkeypatch):
    """A matrix product is many times faster than a step of a small model; a large model is not built."""
    import torch

    from llmctl.jobs.step_rate import step_rate
    from llmctl.model.transformer import LanguageModel

    config = PretrainConfig()
    rate = step_rate(config, preset_config("tiny"), 1e15, torch.float32)
    assert 0 < rate < 1e14
    monkeypatch.setattr(LanguageModel, "__init__", None)
    assert step_rate(config, preset_config("gpt2"), 1e15, torch.float32) == 1e15


def test_context_and_vocabulary_are_the_systems_own_unless_named():
    assert plan().rows.source == 256
    assert plan().config.vocab_size == preset_config("tiny").vocab_size
    assert plan(preset="bert-base").rows.source == 512
    assert plan(preset="bert-base", seq_len=128).rows.source == 128
    assert plan(overrides={"vocab_size": 999}).config.vocab_size == 999
    wider = plan(preset="bert-base", seq_len=1024)
    assert wider.config.max_positions == 1024
    assert wider.parameters.total == 109_514_298 + 512 * 768


def test_spans_split_a_row_between_encoder_and_decoder():
    rows = plan("span", seq_len=200).rows
    # 15 % of 200 are 30 tokens in 10 spans; each side has a mark per span and an end.
    assert (rows.source, rows.target) == (200 - 30 + 10 + 1, 30 + 10 + 1)
    pairs = plan("seq2seq", seq_len=200).rows
    assert (pairs.source, pairs.target) == (200, 200)
    published = plan("seq2seq", "transformer-base")
    assert published.tokens == pytest.approx(5e9, rel=1e-3), "source and target tokens together"


def test_masked_words_are_few():
    assert plan("mlm").rows.label_frac == 0.15
    assert plan("mlm").memory[1].logits < plan().memory[1].logits


def test_a_published_encoder_needs_no_objective():
    assert plan(preset="bert-base").config.family == "encoder"


def test_impossible_settings_are_refused():
    with pytest.raises(UsageError, match="unknown preset `gpt5`"):
        plan(preset="gpt5")
    with pytest.raises(UsageError, match=r"`model\.d_model` 511"):
        plan(preset="transformer-base", overrides={"d_model": 511})
    with pytest.raises(UsageError, match=r"`train\.batch_size` is 0"):
        plan(batch_size=0)


def test_answer_fits_a_terminal_and_names_its_assumptions():
    text = plan(preset="gpt3-175b").render()
    assert max(map(len, text.splitlines())) <= 80
    assert "174,604,259,328" in text
    assert "assumed 40% of 989 TFLOP/s" in text
    assert "matmuls in" in text
    for answer in (plan("span"), plan("mlm"), plan(preset="pangu-alpha")):
        assert max(map(len, answer.render().splitlines())) <= 80


def test_command_prints_the_estimate_and_leaves_no_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["pretrain", "--model", "gpt3-175b", "--dry-run", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == 174_604_259_328
    assert set(record["memory_bytes"]) == {"1", "8", "64", "1024"}
    assert record["memory_bytes"]["1"]["weights"] == 4 * record["parameters"]
    assert record["assumed_gpu_utilization"] == 0.4
    assert record["flops"] == pytest.approx(record["flops_per_token"] * record["tokens"])
    assert run(["pretrain", "--dry-run"]) == 0
    assert "parameters   1,016,960" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_of_a_whole_run_is_as_said(tmp_path, monkeypatch):
    """Of the process: Python, torch and the data are most of a small run."""
    monkeypatch.chdir(tmp_path)
    # Not the resource usage of the child: before it runs a program it is a copy of this process.
    code = (
        "import sys; from llmctl.cli import run; code = run(sys.argv[1:]); "
        "lines = open('/proc/self/status').read().splitlines(); "
        "sys.stderr.write(next(line.split()[1] for line in lines if line.startswith('VmHWM'))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "pretrain", "--dtype", "float32", "--set", "data.val_frac=0.005"]
    dry = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True)
    said = json.loads(dry.stdout)["memory_bytes"]["1"]["peak"]
    few = ["--steps", "2", "--set", "train.eval_tokens=2048", "-q"]
    ended = subprocess.run([*command, *few], check=True, capture_output=True, text=True)
    assert said == pytest.approx(int(ended.stderr.split()[-1]) * 1024, rel=0.15)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of a process is read from /proc")
def test_175_billion_parameters_need_no_memory():
    code = (
        "import sys; from llmctl.cli import run; code = run(['pretrain', '-m', 'gpt3-175b', '--dry-run']); "
        "lines = open('/proc/self/status').read().splitlines(); "
        "kilobytes = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')); "
        "sys.exit(code or kilobytes > 1_000_000)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_units():
    assert size(999) == "999 B"
    assert size(999_600) == "1 MB"
    assert size(1.5e9) == "1.5 GB"
    assert size(1.2e15) == "1,200 TB"
    assert duration(0.0213) == "0.0213 seconds"
    assert duration(90) == "90 seconds"
    assert duration(86400 * 3) == "3.0 days"
    assert duration(86400 * 365.25 * 2000) == "2,000.0 years"
