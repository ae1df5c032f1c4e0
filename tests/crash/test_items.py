"""Every saved item is needed: without it, or with a fresh value in its place, a resumed run is refused or another one.

Each scenario is a run in which the items that it is about matter, stopped in the middle. Resumed as it is it equals
the run that nobody stopped; resumed with one item taken out (and the manifest made again, so that nothing else is
amiss) it must not.
"""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.config import OptimConfig
from llmctl.errors import ArtifactError, DivergedError, InterruptedRunError, LlmctlError, NotFoundError
from llmctl.files import file_sha256
from llmctl.formats.safetensors import read_tensors, write_safetensors
from llmctl.losses.base import Loss
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.runs import checkpoint
from llmctl.runs.metrics_file import MetricsFile
from llmctl.training.inputs import Training
from llmctl.training.loop import fit
from llmctl.training.objectives import Objective
from llmctl.training.state import State
from tests.training.test_loop import Stopping, training

POISONS = ("none", "nan", "loss", "gradient", "ascent")


class Poisoned(Objective):
    """An objective that some batches harm: no number, a high loss or a large gradient alone, or the opposite aim."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.parts, self.figures = objective.parts, objective.figures  # type: ignore[method-assign]

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Loss:
        loss: Loss = self.objective({name: tensor for name, tensor in batch.items() if name != "poison"})
        kind = POISONS[int(batch["poison"].max())] if "poison" in batch else "none"
        total = {
            "none": loss.sum,
            "nan": loss.sum * math.nan,
            "loss": loss.sum + 100 * loss.count,
            "ascent": 2 * loss.sum.detach() - loss.sum,
            "gradient": 1000 * loss.sum - 999 * loss.sum.detach(),
        }[kind]
        return replace(loss, sum=total)


class Marked:
    """Batches that say how their rows are poisoned: those of some steps are."""

    def __init__(self, batches: Any, poisoned: Mapping[int, str], batch_size: int) -> None:
        self.batches, self.n_rows = batches, batches.n_rows
        self.poisoned, self.batch_size = poisoned, batch_size

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        arrays = self.batches.batch(numbers)
        arrays["poison"] = np.array(
            [POISONS.index(self.poisoned.get(number // self.batch_size, "none")) for number in numbers]
        )
        return arrays


class Listening(Stopping):
    """Keeps what is said, and stops the run after a step."""

    def __init__(self, after_step: int) -> None:
        super().__init__(after_step, signal.SIGTERM)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@dataclass(frozen=True)
class Scenario:
    """A run: its settings, the steps whose batches harm it and how, and after which step it is stopped."""

    stop_after: int
    settings: dict[str, Any] = field(default_factory=dict)
    poisoned: Mapping[int, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    deadline: float | None = None

    def job(self, folder: Path, stop_after: int = -1) -> Training:
        job = training(folder, **({"log_every": 1, "micro_batch_size": 4} | self.settings))
        job.objective = Poisoned(job.objective)
        job.train = Marked(job.train, self.poisoned, job.config.batch_size)
        job.progress = Listening(stop_after)
        job.recipe, job.deadline = self.recipe, self.deadline
        return job


BAD = {"steps": 10, "eval_every": 4, "max_bad_steps": 3}
ROLLBACK = {"steps": 16, "on_divergence": "rollback", "max_bad_steps": 2, "max_rollbacks": 1}
SPIKES = {"steps": 42, "eval_every": 21, "skip_spikes": True, "micro_batch_size": 0}
MINUTES = {"steps": 0, "minutes": 1000.0}
FAR = 1e12
"""A moment so late that a plan never ends by the clock."""

SCENARIOS = {
    "plain": Scenario(5, {"steps": 8}),
    "adamw": Scenario(5, {"steps": 8, "optim": OptimConfig(name="adamw")}),
    # From step 6 on the loss is made to rise: the best weights are those before.
    "best": Scenario(9, {"steps": 10, "eval_every": 2}, poisoned=dict.fromkeys(range(6, 10), "ascent")),
    # Stopped when one evaluation was worse; the second one ends it before its budget does.
    "patient": Scenario(
        9, {"steps": 30, "eval_every": 2, "patience": 2}, poisoned=dict.fromkeys(range(6, 30), "ascent")
    ),
    "three bad": Scenario(6, BAD, poisoned=dict.fromkeys((4, 5, 6), "nan")),
    "two bad": Scenario(6, BAD, poisoned=dict.fromkeys((4, 5), "nan")),
    "rolled back": Scenario(8, ROLLBACK, poisoned=dict.fromkeys((4, 5), "nan")),
    "rolled back twice": Scenario(8, ROLLBACK, poisoned=dict.fromkeys((4, 5, 12, 13), "nan")),
    "high loss": Scenario(36, SPIKES, poisoned={40: "loss"}),
    "large gradient": Scenario(36, SPIKES, poisoned={40: "gradient"}),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a run; `error` is the class and the text of what ended it."""

    weights: dict[str, torch.Tensor]
    state: dict[str, Any]
    course: list[Any]
    figures: list[Any]
    error: tuple[type, str] | None
    said: list[str]

    def differences(self, other: "Outcome") -> set[str]:
        """Return in what two runs differ."""
        found = {name for name in ("course", "figures", "error") if getattr(self, name) != getattr(other, name)}
        if any(not torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items()):
            found.add("weights")
        return found | {f"state.{name}" for name, value in self.state.items() if value != other.state[name]}


def run(scenario: Scenario, folder: Path, saved: checkpoint.Checkpoint | None = None, stop_after: int = -1) -> Outcome:
    """Train to the end, to an error or to a stop."""
    job = scenario.job(folder, stop_after)
    error, figures = None, []
    try:
        fitted = fit(job, saved)
        figures = [fitted.before, fitted.after, fitted.kept_step]
    except LlmctlError as caught:
        error = (type(caught), str(caught).replace(str(folder), ""))
    course = [
        [line.get(name) for name in ("kind", "step", "loss", "lr", "grad_norm", "tokens", "event", "full")]
        for line in MetricsFile(folder / "metrics.jsonl").read()
    ]
    state = {name: value for name, value in job.state.to_dict().items() if name != "seconds"}
    assert isinstance(job.progress, Listening)
    weights = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    return Outcome(weights, state, course, figures, error, job.progress.said)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep the threads of tiny products from waiting for each other where other processes are busy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, Path]]:
    """Return a scenario's uninterrupted outcome and the folder of its stopped run, made when first asked for."""
    made: dict[str, tuple[Outcome, Path]] = {}

    def get(name: str) -> tuple[Outcome, Path]:
        if name not in made:
            scenario, folder = SCENARIOS[name], tmp_path_factory.mktemp("items")
            for part in ("whole", "stopped"):
                (folder / part).mkdir()
            whole = run(scenario, folder / "whole")
            stopped = run(scenario, folder / "stopped", stop_after=scenario.stop_after)
            assert stopped.error is not None
            assert stopped.error[0] is InterruptedRunError
            made[name] = whole, folder / "stopped"
        return made[name]

    return get


def remake(path: Path) -> None:
    """Make the manifest again for the files that are there."""
    digests = {file.name: file_sha256(file) for file in path.iterdir() if file.name != checkpoint.MANIFEST}
    step = checkpoint.step_of(path)
    (path / checkpoint.MANIFEST).write_text(json.dumps({"format": 2, "step": step, "sha256": digests}))


def newest(folder: Path) -> Path:
    return checkpoint.published(folder / "checkpoints")[0]


def change_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the numbers of a checkpoint."""
    state = json.loads((path / checkpoint.STATE).read_text())
    change(state)
    (path / checkpoint.STATE).write_text(json.dumps(state))
    remake(path)


def change_tensors(path: Path, kind: str, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Change the tensors of a checkpoint; None takes one out, from file and index."""
    file = path / f"{kind}.safetensors"
    old = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    new = {name: change(name, tensor) for name, tensor in old.items()}
    write_safetensors(file, {name: tensor for name, tensor in new.items() if tensor is not None}, {"format": "pt"})
    gone = [name for name, tensor in new.items() if tensor is None]
    change_state(path, lambda state: [state["index"][kind].pop(name) for name in gone])


def resumed(
    runs: Callable[[str], tuple[Outcome, Path]], name: str, folder: Path, change: Callable[[Path], None] | None = None
) -> tuple[Outcome, Outcome]:
    """Return the outcome of the run that nobody stopped, and that of the one resumed with a changed checkpoint."""
    whole, stopped = runs(name)
    copy = folder / "copy"
    shutil.copytree(stopped, copy)
    if change is not None:
        change(newest(copy))
    saved, _ = checkpoint.Store(copy / "checkpoints").load_newest()
    assert saved.path == newest(copy)
    return whole, run(SCENARIOS[name], copy, saved)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_is_the_uninterrupted_one(runs, tmp_path, name: str):
    whole, again = resumed(runs, name, tmp_path)
    assert again.differences(whole) == set()


def test_the_scenarios_are_what_they_are_called(runs):
    def events(name: str) -> list[tuple[int, str]]:
        return [(line[1], line[6]) for line in runs(name)[0].course if line[0] == "event"]

    assert runs("best")[0].figures[2] == 6
    assert runs("patient")[0].figures[2] == 6
    assert runs("patient")[0].state["step"] == 10
    assert runs("three bad")[0].error[0] is DivergedError
    assert runs("two bad")[0].error is None
    assert [kind for _, kind in events("rolled back")].count("rollback") == 1
    assert runs("rolled back")[0].error is None
    assert runs("rolled back twice")[0].error[0] is DivergedError
    assert [kind for _, kind in events("high loss")] == ["spike"]
    assert [kind for _, kind in events("large gradient")] == ["spike"]


FRESH = State()
NEEDED: dict[str, tuple[str, str]] = {
    "step": ("plain", "weights"),
    "labels": ("plain", "state.labels"),
    "tokens": ("plain", "state.tokens"),
    "checked_step": ("plain", "course"),
    "before": ("plain", "figures"),
    "best_value": ("best", "weights"),
    "best_step": ("best", "weights"),
    "checks_since_best": ("patient", "state.step"),
    "bad_steps": ("three bad", "error"),
    "skipped_steps": ("two bad", "state.skipped_steps"),
    "rollbacks": ("rolled back twice", "error"),
    "lr_scale": ("rolled back", "weights"),
    "skipped_batches": ("rolled back", "weights"),
    "losses": ("high loss", "weights"),
    "norms": ("large gradient", "weights"),
}
"""For each number: the scenario in which it matters, and in what the run differs without it."""

SEPARATE = {"total_steps", "eval_rows", "seconds", "trackers"}
"""Numbers that have a test of their own below."""


def test_every_number_is_looked_at():
    assert set(NEEDED) | SEPARATE == {item.name for item in fields(State)}
    assert not set(NEEDED) & SEPARATE


def test_a_checkpoint_from_before_there_were_parts_of_evaluations_takes_all_rows(runs, tmp_path):
    whole, again = resumed(
        runs, "plain", tmp_path, lambda path: change_state(path, lambda state: state.pop("eval_rows"))
    )
    assert again.differences(whole) == set()


@pytest.mark.parametrize("item", [item.name for item in fields(State) if item.name != "eval_rows"])
def test_a_checkpoint_without_a_number_is_refused(runs, tmp_path, item: str):
    with pytest.raises(ArtifactError, match=f"no `{item}`"):
        raise_error(resumed(runs, "plain", tmp_path, lambda path: change_state(path, lambda state: state.pop(item)))[1])


def raise_error(outcome: Outcome) -> None:
    """Raise what ended a run."""
    if outcome.error is not None:
        kind, text = outcome.error
        raise kind(text)


@pytest.mark.parametrize("item", NEEDED)
def test_a_fresh_number_in_its_place_makes_another_run(runs, tmp_path, item: str):
    name, difference = NEEDED[item]

    def refresh(path: Path) -> None:
        change_state(path, lambda state: state.update({item: getattr(FRESH, item)}))

    whole, again = resumed(runs, name, tmp_path, refresh)
    assert difference in again.differences(whole)


def planned(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Outcome:
    """Resume a run with a budget of minutes, of which an earlier process has found that it is 8 steps."""
    scenario = Scenario(5, MINUTES, recipe={"train": {"minutes": 1000.0}}, deadline=FAR)
    folder.mkdir()
    run(scenario, folder, stop_after=5)
    change_state(newest(folder), lambda state: state.update(total_steps=8))
    change_state(newest(folder), change)
    saved, _ = checkpoint.Store(folder / "checkpoints").load_newest()
    # The plan is made again at step 9: who knows it has ended by then, who does not is stopped at step 10.
    return run(scenario, folder, saved, stop_after=10)


@pytest.mark.parametrize("harm", ["total_steps", "recipe"])
def test_a_plan_is_kept(tmp_path, harm: str):
    kept = planned(tmp_path / "kept", dict.copy)
    assert kept.error is None
    assert kept.state["step"] == 8
    changes = {"total_steps": lambda state: state.update(total_steps=0), "recipe": lambda state: state.pop("recipe")}
    lost = planned(tmp_path / "lost", changes[harm])
    assert {"course", "error", "weights"} <= lost.differences(kept)
    assert lost.state["step"] == 10


def test_the_time_used_is_carried_on(runs, tmp_path):
    finals = []
    for seconds in (1e6, 0.0):
        folder = tmp_path / str(seconds)
        shutil.copytree(runs("plain")[1], folder)
        change_state(newest(folder), lambda state, seconds=seconds: state.update(seconds=seconds))
        job = SCENARIOS["plain"].job(folder)
        fit(job, checkpoint.Store(folder / "checkpoints").load_newest()[0])
        finals.append(job.state.seconds)
    assert finals[0] >= 1e6 > finals[1]


class Service:
    """A tracker of a service, which has given the run an id."""

    def __init__(self) -> None:
        self.tracker = SimpleNamespace(id="7")

    def log(self, figures: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


def test_the_ids_of_trackers_are_in_every_checkpoint(tmp_path):
    # They are read where trackers are made: a service then adds to the run that it knows.
    job = SCENARIOS["plain"].job(tmp_path)
    job.trackers = {"service": Service()}
    fit(job)
    for path in checkpoint.published(tmp_path / "checkpoints"):
        assert checkpoint.load(path).state["trackers"] == {"service": "7"}


def test_another_environment_is_said_only_where_the_old_one_is_known(runs, tmp_path):
    def other(state: dict[str, Any]) -> None:
        state["environment"]["torch"] = "1.0"

    _, told = resumed(runs, "plain", tmp_path / "a", lambda path: change_state(path, other))
    _, silent = resumed(
        runs, "plain", tmp_path / "b", lambda path: change_state(path, lambda state: state.update(environment={}))
    )
    assert any("not the same bit for bit: torch 1.0" in line for line in told.said)
    assert told.said != silent.said


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_without_a_file_is_refused(runs, tmp_path, name: str):
    _, stopped = runs("plain")
    shutil.copytree(stopped, tmp_path / "copy")
    for path in checkpoint.published(tmp_path / "copy" / "checkpoints"):
        (path / name).unlink()
        if name != checkpoint.MANIFEST:
            remake(path)
    job = SCENARIOS["plain"].job(tmp_path / "copy")
    with pytest.raises((ArtifactError, NotFoundError)) as caught:
        fit(job, checkpoint.Store(tmp_path / "copy" / "checkpoints").load_newest()[0])
    assert name in str(caught.value)


@pytest.mark.parametrize("kind", checkpoint.KINDS)
def test_a_checkpoint_without_a_file_and_any_word_of_it_is_not_resumed_as_it_was(runs, tmp_path, kind: str):
    def forget(path: Path) -> None:
        (path / f"{kind}.safetensors").unlink()
        change_state(path, lambda state: state["index"].update({kind: {}}))

    whole, again = resumed(runs, "plain", tmp_path, forget)
    assert {"error" if kind == "model" else "weights"} <= again.differences(whole)


def test_a_checkpoint_without_its_index_is_passed_over(runs, tmp_path):
    _, stopped = runs("plain")
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    last = newest(copy)
    change_state(last, lambda state: state.pop("index"))
    saved, skipped = checkpoint.Store(copy / "checkpoints").load_newest()
    assert saved.path < last
    assert any(last.name in line and "index" in line for line in skipped)
    with pytest.raises(ArtifactError, match="index"):
        checkpoint.open_checkpoint(last)


def kinds(names: Iterable[str]) -> set[tuple[str, str]]:
    return {(name.split("/")[0], name.split("/")[2]) for name in names}


TENSORS = [
    ("plain", "muon", "momentum_buffer"),
    ("plain", "adamw", "exp_avg"),
    ("adamw", "adamw", "exp_avg"),
    ("adamw", "adamw", "exp_avg_sq"),
    ("adamw", "adamw", "step"),
]


def test_every_kind_of_optimizer_tensor_is_looked_at(runs):
    found = set()
    for name in ("plain", "adamw"):
        saved = checkpoint.load(newest(runs(name)[1]))
        found |= kinds(saved.names("optimizer"))
    assert found == {(optimizer, key) for _, optimizer, key in TENSORS}


@pytest.mark.parametrize(("name", "optimizer", "key"), TENSORS)
@pytest.mark.parametrize("which", ["all", "one"])
def test_zeros_for_an_optimizer_tensor_make_another_run(runs, tmp_path, name, optimizer, key, which):
    changed: list[str] = []

    def zero(tensor_name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_it = kinds([tensor_name]) == {(optimizer, key)} and (which == "all" or not changed)
        if is_it:
            changed.append(tensor_name)
        return torch.zeros_like(tensor) if is_it else tensor

    whole, again = resumed(runs, name, tmp_path, lambda path: change_tensors(path, "optimizer", zero))
    assert changed
    assert "weights" in again.differences(whole)


@pytest.mark.parametrize(("name", "optimizer", "key"), TENSORS)
@pytest.mark.parametrize("which", ["all", "one"])
def test_a_checkpoint_without_an_optimizer_tensor_is_not_resumed_as_it_was(runs, tmp_path, name, optimizer, key, which):
    gone: list[str] = []

    def drop(tensor_name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        is_it = kinds([tensor_name]) == {(optimizer, key)} and (which == "all" or not gone)
        if is_it:
            gone.append(tensor_name)
        return None if is_it else tensor

    whole, again = resumed(runs, name, tmp_path, lambda path: change_tensors(path, "optimizer", drop))
    assert gone
    if optimizer == "adamw":  # of which there is more than one per parameter, so that a hole can be seen
        assert again.error is not None
        assert again.error[0] is ArtifactError
        assert key in again.error[1]
    else:
        assert "weights" in again.differences(whole)


def weight_names() -> list[str]:
    return ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("weight", weight_names())
def test_a_checkpoint_without_a_weight_is_refused(runs, tmp_path, weight: str):
    _, again = resumed(
        runs,
        "plain",
        tmp_path,
        lambda path: change_tensors(path, "model", lambda name, tensor: None if name == weight else tensor),
    )
    assert again.error is not None
    assert again.error[0] is ArtifactError
    assert weight in again.error[1]


@pytest.mark.parametrize("weight", weight_names())
def test_a_fresh_weight_makes_another_run(runs, tmp_path, weight: str):
    job = SCENARIOS["plain"].job(tmp_path)
    assert isinstance(job.model, LanguageModel)
    initialize(job.model, job.config.seed)
    fresh = job.model.state_dict()

    def change(path: Path) -> None:
        change_tensors(path, "model", lambda name, tensor: fresh[name].clone() if name == weight else tensor)

    whole, again = resumed(runs, "plain", tmp_path, change)
    assert "weights" in again.differences(whole)
