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
from llmctl.distributed import runtime
from llmctl.errors import DivergedError, InterruptedRunError, StoppedError
from llmctl.losses.base import IGNORE, Loss
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.runs import checkpoint
from llmctl.runs.progress import Silent
from llmctl.training.inputs import Training
from llmctl.training.loop import fit
from llmctl.training.objectives import LabelPrediction, Objective
from llmctl.training.state import State
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
    initialize(model, config.seed)
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
@pytest.mark.parametrize(
    ("name", "average"), [("adamw", {}), ("muon", {}), ("adamw", {"ema": 0.9}), ("adamw", {"average_frac": 0.5})]
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, after_step: int, name: str, average: dict[str, float]):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    optim = OptimConfig(name=name)
    straight = training(tmp_path / "a", optim=optim, log_every=1, micro_batch_size=4, **average)
    expected = fit(straight)
    stopped = training(tmp_path / "b", optim=optim, log_every=1, micro_batch_size=4, **average)
    stopped.progress = Stopping(after_step, signal.SIGTERM)
    with pytest.raises(InterruptedRunError) as caught:
        fit(stopped)
    assert caught.value.exit_code == 143
    assert "--resume" in caught.value.hint
    resumed = training(tmp_path / "b", optim=optim, log_every=1, micro_batch_size=4, **average)
    saved, _ = checkpoint.Store(tmp_path / "b" / "checkpoints").load_newest()
    assert saved.state["step"] == after_step
    got = fit(resumed, saved)
    assert_same(weights(straight), weights(resumed))
    assert (got.before, got.after) == (expected.before, expected.after)

    def course(folder: Path) -> list[tuple[int, str, float]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return sorted((line["step"], line["kind"], line.get("loss", 0.0)) for line in lines)

    assert course(tmp_path / "a") == course(tmp_path / "b")


@pytest.mark.parametrize("average", [{"ema": 0.9}, {"average_frac": 0.4}])
@pytest.mark.parametrize(("lr", "is_kept"), [(0.1, True), (1e-4, False)])
def test_an_average_is_kept_only_if_it_is_better(tmp_path, lr: float, is_kept: bool, average: dict[str, float]):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    # A high constant rate moves the weights around a minimum, a low one straight towards it.
    settings = {
        "optim": OptimConfig(name="adamw", lr=lr, schedule="constant"),
        "steps": 40,
        "eval_every": 40,
        "dropout": 0.0,
    }
    plain, averaged = training(tmp_path / "a", **settings), training(tmp_path / "b", **settings, **average)
    without, with_average = fit(plain), fit(averaged)
    (told,) = [event for event in events(tmp_path / "b") if event["event"] == "averaged"]
    assert told["text"].startswith("kept the average" if is_kept else "did not keep the average")
    if is_kept:
        assert with_average.after["loss"] < without.after["loss"]
        assert averaged_loss(averaged) == pytest.approx(with_average.after["loss"], rel=1e-6)
    else:
        assert with_average.after == without.after
        assert_same(weights(plain), weights(averaged))


def averaged_loss(job: Training) -> float:
    """Return the held-out loss of the weights that a run has left."""
    from llmctl.training.loop import _Loop

    return _Loop(job, job.runtime.prepare(job.objective), None).evaluation.measure(None)["loss"]


def test_a_tail_is_the_mean_of_its_steps():
    from llmctl.training.averaging import AVERAGE, Average

    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average = Average([weight], 0.0, 0.4)
    for step in range(1, 11):
        weight.data.fill_(step**2)
        average.note(step, 10)
        assert average.is_begun == (step > 6)
    assert average.state[weight][AVERAGE].item() == pytest.approx((49 + 64 + 81 + 100) / 4)


def test_the_average_is_that_of_its_definition():
    from llmctl.training.averaging import AVERAGE, Average

    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    average = Average([weight, frozen], 0.6)
    expected = 0.0
    for step in range(1, 9):
        with torch.no_grad():
            weight.fill_(float(step))
        average.note(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = float(step) if step == 1 else decay * expected + (1 - decay) * step
    assert average.state[weight][AVERAGE].item() == pytest.approx(expected, rel=1e-12)
    average.swap()
    assert (weight.item(), average.state[weight][AVERAGE].item()) == (pytest.approx(expected), 8.0)
    assert frozen not in average.state


def test_evaluation_is_the_same_in_any_batch_size(tmp_path):
    from llmctl.training.loop import _Loop

    results = []
    for size in (1, 3, 8):
        job = training(tmp_path, batch_size=size)
        loop = _Loop(job, job.runtime.prepare(job.objective), None)
        results.append(loop.evaluation.measure(None))
    lengths = [len(text) for text in source().texts[50:]]
    for result in results:
        assert result["n_labels"] == sum(lengths) - len(lengths)
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


def test_the_best_weights_are_kept_when_the_last_are_worse(tmp_path):
    # A rate this high ruins the model in the course of the run.
    job = training(tmp_path, optim=OptimConfig(name="adamw", lr=0.5, schedule="constant"), steps=20, eval_every=1)
    fitted = fit(job)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    course = {line["step"]: line["loss"] for line in lines if line["kind"] == "eval" and not line.get("full")}
    best = min(course, key=lambda step: course[step])
    assert fitted.kept_step == best
    assert fitted.after["loss"] == pytest.approx(course[best], rel=1e-5)


def test_a_model_that_became_worse_is_said_to_be(tmp_path):
    job = training(tmp_path, optim=OptimConfig(name="adamw", lr=0.5, schedule="constant"), steps=3, eval_every=3)
    fitted = fit(job)
    assert fitted.after["loss"] > fitted.before["loss"]
    (told,) = [event for event in events(tmp_path) if event["event"] == "worse"]
    assert f"loss {fitted.before['loss']:.4g} -> {fitted.after['loss']:.4g}" in told["text"]


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


def test_the_second_signal_stops_at_once(tmp_path):
    job = training(tmp_path)

    class Twice(Stopping):
        def step(self, record, total_steps, eta_seconds) -> None:  # noqa: ARG002
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)

    job.progress = Twice(1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(job)


class Poisoned:
    """Batches of which those with certain rows carry a mark."""

    def __init__(self, batches: CausalBatches, rows: range) -> None:
        self.batches, self.n_rows, self.rows = batches, batches.n_rows, rows

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        mark = np.array([any(number in self.rows for number in numbers)])
        return self.batches.batch(numbers) | {"poison": mark}


class PoisonedObjective(Objective):
    """Turns the loss of marked batches into something else, as broken data or hardware would."""

    def __init__(self, objective: LabelPrediction, factor: float) -> None:
        super().__init__()
        self.objective, self.factor = objective, factor
        self.parts, self.figures = objective.parts, objective.figures

    def forward(self, batch: dict[str, torch.Tensor]) -> Loss:
        is_poisoned = bool(batch.get("poison", torch.zeros(1)).any())
        loss = self.objective({name: tensor for name, tensor in batch.items() if name != "poison"})
        return Loss(loss.sum * self.factor, loss.count, loss.parts) if is_poisoned else loss


def poisoned(folder: Path, rows: range, *, factor: float = math.nan, **settings: object) -> Training:
    folder.mkdir(exist_ok=True)
    job = training(folder, log_every=1, **settings)  # type: ignore[arg-type]
    job.train = Poisoned(job.train, rows)  # type: ignore[arg-type]
    job.objective = PoisonedObjective(job.objective, factor)  # type: ignore[arg-type]
    return job


def events(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "event"]


def test_a_step_that_is_not_finite_is_skipped_and_noted(tmp_path):
    job = poisoned(tmp_path, range(16, 24))  # the third step
    fitted = fit(job)
    assert (job.state.skipped_steps, job.state.bad_steps) == (1, 0)
    assert [(event["event"], event["step"]) for event in events(tmp_path)] == [("not finite", 3)]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fitted.weights.values())


def test_a_rollback_goes_on_with_other_data_and_a_smaller_rate(tmp_path):
    # Steps 7 to 9 (from 1) are poisoned; the last checkpoint before them is that of step 4.
    settings = {"max_bad_steps": 3, "on_divergence": "rollback", "optim": OptimConfig(schedule="constant", lr=1e-3)}
    job = poisoned(tmp_path, range(48, 72), **settings)
    fit(job)
    state = job.state
    assert (state.rollbacks, state.lr_scale, state.skipped_steps) == (1, 0.5, 3)
    assert state.skipped_batches == 9 - 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates == [1e-3] * 9 + [5e-4] * 8
    assert state.step == 12


def test_rollbacks_end_too(tmp_path):
    job = poisoned(tmp_path, range(48, 10**6), max_bad_steps=2, on_divergence="rollback", max_rollbacks=2)
    with pytest.raises(DivergedError):
        fit(job)
    assert job.state.rollbacks == 2


def test_a_run_that_was_rolled_back_resumes_bit_for_bit(tmp_path):
    settings = {"max_bad_steps": 2, "on_divergence": "rollback"}
    straight = poisoned(tmp_path / "a", range(40, 56), **settings)
    fit(straight)
    stopped = poisoned(tmp_path / "b", range(40, 56), **settings)
    # Step 9 is reached once, after the rollback from step 7 to step 4.
    stopped.progress = Stopping(9, signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        fit(stopped)
    saved, _ = checkpoint.Store(tmp_path / "b" / "checkpoints").load_newest()
    assert (saved.state["step"], saved.state["rollbacks"]) == (9, 1)
    resumed = poisoned(tmp_path / "b", range(40, 56), **settings)
    fit(resumed, saved)
    assert_same(weights(straight), weights(resumed))


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_noted_and_skipped_if_asked(tmp_path, skip: bool):
    job = poisoned(tmp_path, range(40 * 8, 41 * 8), factor=50.0, steps=42, eval_every=50, skip_spikes=skip)
    fit(job)
    assert [(event["event"], event["step"]) for event in events(tmp_path)] == [("spike", 41)]
    assert job.state.skipped_steps == int(skip)


def test_sigusr1_saves_and_goes_on(tmp_path):
    job = training(tmp_path, eval_every=100, keep_checkpoints=0)
    job.progress = Stopping(5, signal.SIGUSR1)
    fitted = fit(job)
    assert fitted.state.step == 12
    assert [checkpoint.step_of(path) for path in checkpoint.published(tmp_path / "checkpoints")] == [12, 5]


def test_the_time_limit_saves_and_ends_resumable(tmp_path):
    import time

    job = training(tmp_path, steps=10**6)
    job.limit = time.monotonic()
    with pytest.raises(StoppedError) as caught:
        fit(job)
    assert caught.value.exit_code == 75
    assert checkpoint.Store(tmp_path / "checkpoints").load_newest()[0].state["step"] == 0


def test_a_signal_in_an_evaluation_ends_it_and_it_is_made_again(tmp_path):
    class Signalling:
        """Held-out rows that ask for the end when they are read for the second time."""

        def __init__(self, source: CausalBatches, after: int) -> None:
            self.source, self.n_rows, self.left = source, source.n_rows, after

        def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.source.batch(numbers)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = training(tmp_path / "a", log_every=1, batch_size=2)
    fit(straight)
    stopped = training(tmp_path / "b", log_every=1, batch_size=2)
    n_batches = -(-stopped.held_out.n_rows // 2)
    stopped.held_out = Signalling(stopped.held_out, n_batches + 2)  # type: ignore[arg-type]
    with pytest.raises(InterruptedRunError):
        fit(stopped)
    saved, _ = checkpoint.Store(tmp_path / "b" / "checkpoints").load_newest()
    assert (saved.state["step"], saved.state["checked_step"]) == (4, 0)
    resumed = training(tmp_path / "b", log_every=1, batch_size=2)
    fit(resumed, saved)
    assert_same(weights(straight), weights(resumed))
    courses = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "ab"
    ]
    kept = ("kind", "step", "loss", "lr", "grad_norm", "tokens")
    assert [[line.get(key) for key in kept] for line in courses[0]] == [
        [line.get(key) for key in kept] for line in courses[1]
    ]


def test_another_environment_is_said_in_one_line(tmp_path):
    (tmp_path / "b").mkdir()
    stopped = training(tmp_path / "b")
    stopped.progress = Stopping(3, signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        fit(stopped)
    saved, _ = checkpoint.Store(tmp_path / "b" / "checkpoints").load_newest()
    saved.state["environment"] |= {"threads": 77, "torch": "1.0"}

    class Listening(Silent):
        def __init__(self) -> None:
            self.said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    resumed = training(tmp_path / "b")
    resumed.progress = listening = Listening()
    fit(resumed, saved)
    lines = [line for line in listening.said if "bit for bit" in line]
    assert len(lines) == 1
    assert "threads 77 -> " in lines[0]
    assert "torch 1.0 -> " in lines[0]
