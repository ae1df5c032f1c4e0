"""SIGKILL at random moments: whatever a run is doing, it can be resumed to the same bits.

usage: python -m tests.crash.kill [--trials 200] [--ranks 2] [--seed 0]

A trial trains, is killed one to three times at uniformly random moments, also while text is encoded, a checkpoint is
saved or the model is written, and is resumed to the end. Model file, last checkpoint with its optimizer state and
numbers, and the course of the losses must be those of the run that nobody killed. With two ranks either or both are
killed; a rank that is left must end by itself, and its exit codes are counted. Prints one line of JSON.
"""

import argparse
import json
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmctl.config import PretrainConfig
from llmctl.distributed import runtime
from llmctl.errors import StoppedError
from llmctl.files import file_sha256
from llmctl.jobs.begin import begin
from llmctl.jobs.resume import resume
from llmctl.recipe import load
from llmctl.runs import checkpoint
from llmctl.runs.folder import read_record
from llmctl.runs.metrics_file import MetricsFile
from tests.crash import forked

SETTINGS = {
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.dropout": 0.1,
    "train.seq_len": 32,
    "train.batch_size": 8,
    "train.micro_batch_size": 2,
    "train.steps": 30,
    "train.eval_every": 10,
    "train.save_every": 2,
    "train.log_every": 1,
    "train.dtype": "float32",
    "train.device": "cpu",
    "train.threads": 1,
    "tokenizer.model_type": "char",
    "parallel.timeout_seconds": 12,
}
PATIENCE_SECONDS = 60
"""After this long a process that should have ended is called stuck: five times what it may wait for another."""

VOLATILE = {"seconds", "environment", "recipe"}


@dataclass
class Tally:
    """What the kills hit."""

    kills: int = 0
    in_save: int = 0
    in_rotation: int = 0
    before_a_checkpoint: int = 0
    stuck: int = 0
    survivors: Counter[str] = field(default_factory=Counter)


@dataclass
class Harness:
    """Where trials happen, and how many processes they take."""

    folder: Path
    n_ranks: int
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        texts = self.folder / "texts"
        texts.mkdir(parents=True)
        for number in range(40):
            (texts / f"{number:02d}.txt").write_text(f"the cat {number} sat on the mat. 猫。\n" * 3, encoding="utf-8")

    def train(self, run: Path) -> None:
        """Begin the run, or go on with it, as a person would after a crash."""
        if (run / "recipe.yaml").is_file():
            resume("pretrain", str(run), quiet=True)
        else:
            settings = [
                f"{key}={value}" for key, value in {"data.paths": f"[{self.folder / 'texts'}]", **SETTINGS}.items()
            ]
            resolved = load(PretrainConfig, settings=settings, environment={})
            begin("pretrain", resolved.config, resolved.origins, out=run, quiet=True)
        if torch.distributed.is_initialized():
            runtime.leave(0)

    def start(self, run: Path) -> list[forked.Child]:
        """Start the processes of a run."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        children = []
        for rank in range(self.n_ranks):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.n_ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(self.n_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            log = self.folder / f"rank{rank}.log"
            children.append(forked.start(lambda: self.train(run), log, environment if self.n_ranks > 1 else {}))
        return children

    def finish(self, run: Path) -> list[int | None]:
        """Train to the end and return the exit codes."""
        return end(self.start(run))

    def disturb(self, run: Path, rng: random.Random, longest_seconds: float) -> None:
        """Train, and kill some of the processes at a random moment; the others must end."""
        before = leftovers(run)
        children = self.start(run)
        victims = rng.choice([[0]] if self.n_ranks == 1 else [[0], [1], [0, 1]])
        children[victims[0]].wait(rng.uniform(0, longest_seconds))
        for victim in victims:
            children[victim].kill()
        codes = end(children)
        killed = sum(codes[victim] == -9 for victim in victims)
        if killed:
            new = leftovers(run) - before
            self.tally.kills += killed
            self.tally.in_save += any(name.endswith(".tmp") for name, _ in new)
            self.tally.in_rotation += any(name.endswith(".trash") for name, _ in new)
            self.tally.before_a_checkpoint += not checkpoint.published(run / "checkpoints")
            left = [code for rank, code in enumerate(codes) if rank not in victims]
            self.tally.survivors.update(map(str, left))
            self.tally.stuck += left.count(None)
            if not set(left) <= {0, StoppedError.exit_code}:
                sys.stderr.write(f"a rank that was left ended with {left}\n{self.logs()}\n")

    def logs(self) -> str:
        """Return what the processes of the last start wrote."""
        return "\n".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("rank*.log")))


def end(children: Sequence[forked.Child]) -> list[int | None]:
    """Wait for all; who is stuck is killed and has no exit code."""
    codes = [child.wait(PATIENCE_SECONDS) for child in children]
    for child in children:
        child.kill()
        child.wait()
    return codes


def leftovers(run: Path) -> set[tuple[str, int]]:
    """Return what is half-written or half-deleted among the checkpoints; a new one of an old name is another."""
    return {(path.name, path.stat().st_ino) for path in (run / "checkpoints").glob(".step-*")}


def outcome(run: Path) -> dict[str, Any]:
    """Return all of a finished run that must not depend on where it was killed."""
    last, skipped = checkpoint.Store(run / "checkpoints").load_newest()
    digests = {path.name: file_sha256(path) for path in sorted(last.path.glob("*.safetensors"))}
    return {
        "status": read_record(run)["status"],
        "model": file_sha256(run / "model.safetensors"),
        "skipped": skipped,
        "last": digests,
        "state": {name: value for name, value in last.state.items() if name not in VOLATILE},
        "leftovers": sorted(name for name, _ in leftovers(run)),
        "course": course(run),
    }


def course(run: Path) -> list[list[Any]]:
    """Return the losses in the order of the file."""
    lines = MetricsFile(run / "metrics.jsonl").read()
    return [[line["kind"], line["step"], line.get("loss"), line.get("full", False)] for line in lines]


def main(trials: int, n_ranks: int, seed: int) -> bool:
    """Do all trials; print the line of JSON; tell whether every run ended in the same bits."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        harness = Harness(Path(temporary), n_ranks)
        tally = harness.tally
        begun = time.monotonic()
        run_seconds = float("inf")
        for name in ("first", "second"):  # the first one is slower: nothing is cached yet
            started = time.monotonic()
            codes = harness.finish(harness.folder / name)
            run_seconds = min(run_seconds, time.monotonic() - started)
            assert codes == [0] * n_ranks, harness.logs()
        expected = outcome(harness.folder / "first")
        assert outcome(harness.folder / "second") == expected, "two runs that nobody killed differ"
        ok = 0
        for trial in range(trials):
            run = harness.folder / "run"
            kills = tally.kills
            while tally.kills == kills:  # a run that ended before its kill came is no trial
                shutil.rmtree(run, ignore_errors=True)
                for _ in range(rng.randint(1, 3)):
                    harness.disturb(run, rng, 0.95 * run_seconds)
            finished = read_record(run).get("status") == "finished"
            codes = [0] * n_ranks if finished else harness.finish(run)
            found = outcome(run) if codes == [0] * n_ranks else {}
            differs = [name for name, value in expected.items() if found.get(name) != value]
            if differs:
                sys.stderr.write(f"trial {trial}: exit codes {codes}, other {differs}\n{harness.logs()}\n")
                for name in differs:
                    sys.stderr.write(f"  {name}: {expected[name]}\n  not {found.get(name)}\n")
            ok += not differs
    report = {
        "trials": trials,
        "ranks": n_ranks,
        "ok": ok,
        "kills": tally.kills,
        "kills_inside_a_save": tally.in_save,
        "kills_inside_a_rotation": tally.in_rotation,
        "kills_before_a_checkpoint": tally.before_a_checkpoint,
        "stuck": tally.stuck,
        "exit_codes_of_survivors": dict(tally.survivors),
        "run_seconds": round(run_seconds, 2),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(report), flush=True)  # noqa: T201  the result of the command
    return ok == trials and not tally.stuck


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(0 if main(arguments.trials, arguments.ranks, arguments.seed) else 1)
