"""What a run has logged is there once, wherever it was killed."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llmctl.runs import checkpoint
from llmctl.runs.metrics_file import MetricsFile
from llmctl.training.loop import fit
from tests.crash.test_items import Scenario
from tests.training.test_loop import Stopping

PLAIN = Scenario(-1, {"steps": 8, "eval_every": 4})
ONE_BAD = Scenario(-1, {"steps": 8, "eval_every": 4}, poisoned={4: "nan"})


class Killed(Stopping):
    """Ends the run at once, without a checkpoint, after a step or when a sample is shown."""

    def __init__(self, after_step: int = -1, *, at_sample: bool = False) -> None:
        super().__init__(after_step, signal.SIGINT)
        self.at_sample = at_sample

    def step(self, record, total_steps, eta_seconds) -> None:  # noqa: ARG002
        if record["step"] == self.after_step:
            self.end()

    def say(self, text: str) -> None:
        if self.at_sample and text.startswith("  "):
            self.end()

    def end(self) -> None:
        for _ in range(2):  # the first signal would be obeyed after the step
            os.kill(os.getpid(), self.number)


def lines(folder: Path, scenario: Scenario, killed: Killed | None, name: str = "metrics.jsonl") -> list[Any]:
    """Train, perhaps killed once and resumed; return what was logged, without times."""
    folder.mkdir()
    for progress in (killed, None) if killed else (None,):
        job = scenario.job(folder)
        job.sample = lambda: [{"prompt": "a", "text": "b"}]
        saved = None
        if checkpoint.published(folder / "checkpoints"):
            saved, _ = checkpoint.Store(folder / "checkpoints").load_newest()
        if progress is None:
            fit(job, saved)
        else:
            job.progress = progress
            with pytest.raises(KeyboardInterrupt):
                fit(job, saved)
    parts = ("kind", "step", "loss", "event", "samples", "full")
    return [[line.get(part) for part in parts] for line in MetricsFile(folder / name).read()]


def test_the_lines_of_steps_that_are_taken_again_are_there_once(tmp_path):
    assert lines(tmp_path / "killed", PLAIN, Killed(6)) == lines(tmp_path / "whole", PLAIN, None)


def test_a_run_that_begins_again_has_its_first_lines_once(tmp_path):
    assert lines(tmp_path / "killed", PLAIN, Killed(2)) == lines(tmp_path / "whole", PLAIN, None)


def test_the_event_of_a_step_that_is_taken_again_is_there_once(tmp_path):
    assert lines(tmp_path / "killed", ONE_BAD, Killed(6)) == lines(tmp_path / "whole", ONE_BAD, None)


def test_the_samples_of_an_evaluation_that_is_made_again_are_there_once(tmp_path):
    saving = Scenario(-1, PLAIN.settings | {"save_every": 3})
    killed = lines(tmp_path / "killed", saving, Killed(at_sample=True), "samples.jsonl")
    assert killed == lines(tmp_path / "whole", PLAIN, None, "samples.jsonl")


def test_the_best_weights_are_those_of_a_checkpoint(tmp_path):
    # After step 6 nothing changes for two steps, and is evaluated again; then the model gets worse.
    poisoned = {6: "nan", 7: "nan"} | dict.fromkeys(range(8, 14), "ascent")
    job = Scenario(-1, {"steps": 14, "eval_every": 2}, poisoned=poisoned).job(tmp_path)
    assert fit(job).kept_step == 6
