"""Two processes, shares of the weights, and micro-batches distill what one process does in one piece."""

import json
from pathlib import Path

import pytest

from tests.jobs.test_distill import TINY, here  # noqa: F401
from tests.support.jobs import finish, finish_two_ranks
from tests.support.warm import WARM


def losses(folder: Path) -> list[float]:
    """Return the training losses of every step, and the figures at the end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    student = report["models"]["student"]
    return [line["loss"] for line in lines if line["kind"] == "train"] + [student["loss"], student["kl"]]


def distill(teacher: Path, out: str, *arguments: str, n_ranks: int = 1) -> list[float]:
    # In float64, so that nothing but the order of sums could differ.
    settings = [*TINY, "student.shape=layers=1", "train.log_every=1", "train.dtype=float64", "teacher.dtype=auto"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = ["distill", str(teacher), "-d", "text.txt", *flags, "-o", out, *arguments]
    finish_two_ranks(command) if n_ranks == 2 else finish([*WARM, *command])
    return losses(Path(out))


@pytest.mark.parametrize(
    ("family", "ways"),
    [
        ("decoder", [(2, []), (2, ["--parallel", "fsdp"]), (1, ["--set", "train.micro_batch_size=1"])]),
        ("encoder", [(2, []), (1, ["--set", "train.micro_batch_size=2"])]),
    ],
)
def test_all_ways_are_one(teachers, family, ways):
    whole = distill(teachers[family], "whole")
    for number, (n_ranks, way) in enumerate(ways):
        found = distill(teachers[family], f"way-{number}", *way, n_ranks=n_ranks)
        assert found == pytest.approx(whole, rel=1e-5), way
