"""The loop's equalities: accumulation = large batch, resumed = uninterrupted, same seed = same bits, sums exact."""

import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.config import ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from llmctl.data.batches import CausalBatches, Ids
from llmctl.data.stream import PackedRows
from llmctl.engine import checkpoint, runtime
from llmctl.engine.loop import Training, fit
from llmctl.engine.objectives import LabelPrediction
from llmctl.engine.planner import Planner
from llmctl.engine.progress import Silent
from llmctl.engine.state import State
from llmctl.errors import DivergedError, InterruptedRunError
from llmctl.losses import IGNORE
from llmctl.model.transformer import LanguageModel, initialise
from tests.data.test_stream import Memory

V = 24


def source() -> Memory:
    rng = np.random.default_rng(0)
    # each token is the last one plus one or two: there is something to learn
    return Memory([np.cumsum(rng.integers(1, 3, rng.integers(4, 30))) % (V - 4) + 4 for _ in range(60)])


class Masked:
    """Batches of which some rows have no label and others few: processes get unequal shares of what is predicted."""

    def __init__(self, batches: CausalBatches) -> None:
        self.batches, self.n_rows = batches, batches.n_rows

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        arrays = self.batches.batch(numbers)
        for row, number in enumerate(numbers):
            arrays["labels"][row, : (16, 3, 11, 0)[number % 4]] = IGNORE
        return arrays


def training(
    folder: Path,
    *,
    dropout: float = 0.1,
    optim: OptimConfig | None = None,
    parallel: ParallelConfig | None = None,
    masked: bool = False,
    **train: object,
) -> Training:
    torch.manual_seed(12345 + int(train.get("steps", 0)))  # type: ignore[call-overload]
    settings = {"steps": 12, "batch_size": 8, "seq_len": 16, "dtype": "float32", "device": "cpu", "eval_every": 4}
    config = TrainConfig(**(settings | train))  # type: ignore[arg-type]
    shape = ModelConfig(vocab_size=V, d_model=16, n_layers=2, n_heads=2, max_positions=32, dropout=dropout)
    model = LanguageModel(shape)
    initialise(model, config.seed)
    ids = Ids(0, 2, 0, np.zeros(V, dtype=bool))
    memory = source()

    def batches(documents: range, *, shuffle: bool) -> CausalBatches | Masked:
        rows = PackedRows(
            memory, np.array(documents), seq_len=config.seq_len, overlap=1, seed=config.seed, shuffle=shuffle
        )
        return Masked(CausalBatches(rows, ids)) if masked else CausalBatches(rows, ids)

    return Training(
        objective=LabelPrediction(model, torch.ones(V, dtype=torch.int32), config.loss_chunk_tokens),
        model=model,
        train=batches(range(50), shuffle=True),
        held_out=batches(range(50, 60), shuffle=False),
        config=config,
        optim=optim or OptimConfig(),
        runtime=runtime.start(config, parallel),
        folder=folder,
        progress=Silent(),
        resume_command="llmctl pretrain --resume x",
        state=State(),
    )


def weights(job: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in job.model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_it_learns_and_the_same_seed_gives_the_same_bits(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = training(tmp_path / "a"), training(tmp_path / "b")
    fitted = fit(first)
    fit(second)
    assert fitted.after["loss"] < fitted.before["loss"] - 0.3
    assert_same(weights(first), weights(second))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulation_equals_the_large_batch(tmp_path, micro_batch_size: int):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    # A large epsilon keeps adamw from magnifying the rounding of gradients near zero.
    optim = OptimConfig(name="adamw", eps=1e-2)
    whole = training(tmp_path / "a", dropout=0.0, optim=optim)
    parts = training(tmp_path / "b", dropout=0.0, optim=optim, micro_batch_size=micro_batch_size)
    fit(whole)
    fit(parts)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=2e-6)


class Stopping(Silent):
    """Sends this process a signal after a step, as a person or a scheduler would."""

    def __init__(self, after_step: int, number: int) -> None:
        self.after_step, self.number = after_step, number

    def step(self, record, total_steps, eta_seconds) -> None:  # noqa: ARG002
        if record["step"] == self.after_step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("after_step", [1, 4, 7])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, after_step: int, name: str):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    optim = OptimConfig(name=name)
    straight = training(tmp_path / "a", optim=optim, log_every=1, micro_batch_size=4)
    expected = fit(straight)
    stopped = training(tmp_path / "b", optim=optim, log_every=1, micro_batch_size=4)
    stopped.progress = Stopping(after_step, signal.SIGTERM)
    with pytest.raises(InterruptedRunError) as caught:
        fit(stopped)
    assert caught.value.exit_code == 143
    assert "--resume" in caught.value.hint
    resumed = training(tmp_path / "b", optim=optim, log_every=1, micro_batch_size=4)
    saved, _ = checkpoint.Store(tmp_path / "b" / "checkpoints").load_newest()
    assert saved.state["step"] == after_step
    got = fit(resumed, saved)
    assert_same(weights(straight), weights(resumed))
    assert (got.before, got.after) == (expected.before, expected.after)

    def course(folder: Path) -> list[tuple[int, str, float]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return sorted((line["step"], line["kind"], line["loss"]) for line in lines)

    assert course(tmp_path / "a") == course(tmp_path / "b")


def test_evaluation_is_the_same_in_any_batch_size(tmp_path):
    from llmctl.engine.loop import _Loop

    results = []
    for size in (1, 3, 8):
        job = training(tmp_path, batch_size=size)
        loop = _Loop(job, job.runtime.prepare(job.objective), {})
        results.append(loop.evaluate(None))
    lengths = [len(text) for text in source().texts[50:]]
    for result in results:
        assert result.count == sum(lengths) - len(lengths)
        assert result.nats == pytest.approx(results[0].nats, rel=1e-6)


def test_the_best_weights_are_kept_when_the_last_are_worse(tmp_path):
    # A rate this high ruins the model in the course of the run.
    job = training(tmp_path, optim=OptimConfig(name="adamw", lr=0.5, schedule="constant"), steps=20, eval_every=1)
    fitted = fit(job)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    course = {line["step"]: line["loss"] for line in lines if line["kind"] == "eval" and not line.get("full")}
    best = min(course, key=lambda step: course[step])
    assert fitted.kept_step == best
    assert fitted.after["loss"] == pytest.approx(course[best], rel=1e-5)


def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run(tmp_path):
    job = training(tmp_path, steps=50, eval_every=100)
    with torch.no_grad():
        job.model.model.norm.weight[0] = math.nan
    before = weights(job)
    with pytest.raises(DivergedError) as caught:
        fit(job)
    assert caught.value.exit_code == 6
    assert job.state.skipped_steps == job.config.max_bad_steps
    for name, tensor in weights(job).items():
        assert torch.equal(tensor.nan_to_num(0), before[name].nan_to_num(0)), name


def test_a_budget_of_tokens_is_rounded_up_to_steps(tmp_path):
    job = training(tmp_path, steps=0, tokens=8 * 16 * 3 + 1)
    assert fit(job).state.step == 4


def test_a_budget_of_minutes_divides_the_time_by_the_measured_step(tmp_path):
    import time

    job = training(tmp_path, steps=0, minutes=1.0)
    job.deadline = time.monotonic() + 60
    planner, state = Planner(job.config, job.deadline), State()
    planner.begin(state)
    planner.begun = (0, time.monotonic() - 4.0)
    state.step = 4
    planner.revise(state)
    left = 60 * (1 - Planner.RESERVE_FRAC)
    assert state.total_steps == pytest.approx(4 + left, abs=2)


def test_the_second_signal_stops_at_once(tmp_path):
    job = training(tmp_path)

    class Twice(Stopping):
        def step(self, record, total_steps, eta_seconds) -> None:  # noqa: ARG002
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)

    job.progress = Twice(1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(job)
